"""A forward pass over shapes: what a model makes and keeps, worked out without weights and without numbers.

The model is copied to torch's meta device, where results have a shape and no contents, so a pass of any size allocates
nothing. What a pass wants to read out of a tensor is answered as if no condition held (no image, nothing to leave out);
what it wants to select, as if all were selected; attention is one kernel where a device has one. Layers of one kind run
once: the others repeat its result, and what it stored counts for each of them.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from .hooks import ExpertLayer

BLOCK = 128
"""Texts of a multiple of so many tokens: where a cache joins tokens, what it joins goes into them evenly."""
_PROBE = 8
_EXPERTS = "grouped_mm"
_META = torch.device("meta")
_ATEN: Any = torch.ops.aten
_NUMBERS: dict[Any, Any] = {
    torch.Tensor.item: 0,
    torch.Tensor.__bool__: False,
    torch.Tensor.__int__: 0,
    torch.Tensor.__float__: 0.0,
    torch.Tensor.__index__: 0,
}
_ATTENTION = nn.functional.scaled_dot_product_attention
_GROUPED = {
    function
    for function in (
        getattr(nn.functional, "grouped_mm", None),
        getattr(torch, "_grouped_mm", None),
    )
    if function is not None
}
_MASKED = {
    _ATEN.index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
    _ATEN._index_put_impl_.default,
}
_PLACES = ("idx", "layer_number", "layer_id")
"""What modules call their layer's number, which tells no kind of layer."""

Stages = dict[str, list[int]]
"""Live bytes after each allocation of a pass, by the module that was entered or left last."""


class Dry(NamedTuple):
    """Live bytes of a pass over prompts and of the pass behind it, the cache left out."""

    prefill: Stages
    behind: Stages


class _NoNumbers(TorchFunctionMode):
    """Answers what is asked of tensors without contents."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if not args or not isinstance(args[0], torch.Tensor) or args[0].device != _META:
            return func(*args, **given)
        if func in _NUMBERS:
            return _NUMBERS[func]
        if func in _GROUPED:
            return args[0].new_empty((args[0].shape[0], args[1].shape[-1]))
        if func is _ATTENTION and args[0].shape[-1] == args[2].shape[-1]:
            return torch.empty_like(args[0])
        return func(*args, **given)


class _Everything(TorchDispatchMode):
    """Selects everything where contents would decide."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if not args or not isinstance(args[0], torch.Tensor) or args[0].device != _META:
            return func(*args, **given)
        if func is _ATEN.nonzero.default:
            return _all_places(args[0])
        if func in _MASKED:
            return func(args[0], list(_places(args[1])), *args[2:], **given)
        return func(*args, **given)


def _all_places(mask: torch.Tensor) -> torch.Tensor:
    return torch.empty((mask.numel(), mask.dim()), dtype=torch.long, device=_META)


def _places(indices: Sequence[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            yield from _all_places(index).unbind(1)
        else:
            yield index


class _Ledger(_Everything):
    """Counts live bytes too: one row for each allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""
        self.live_bytes = 0
        self.rows: list[tuple[str, int]] = []
        self.born: dict[int, int] = {}
        self._owners: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device == _META:
                self._count(leaf, given)
        return result

    def _count(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place not in self._owners:
            if place in given:
                return  # a view of something made before: a weight
            self._owners[place] = 0
            self.live_bytes += size
            self.born[place] = len(self.rows)
            self.rows.append((self.stage, self.live_bytes))
        self._owners[place] += 1
        weakref.finalize(tensor, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        if place not in self._owners:
            return
        self._owners[place] -= 1
        if not self._owners[place]:
            del self._owners[place], self.born[place]
            self.live_bytes -= size

    def take(self, beside: int, held: dict[int, int]) -> Stages:
        """The rows so far, less `beside` bytes and less the cache's storages from their birth on."""
        births = sorted(
            (self.born[place], size) for place, size in held.items() if place in self.born
        )
        found: Stages = defaultdict(list)
        for number, (stage, live) in enumerate(self.rows):
            while births and births[0][0] <= number:
                beside += births.pop(0)[1]
            found[stage].append(live - beside)
        self.rows.clear()
        return found


class DryModel:
    """A copy of a model without contents, to be run over shapes. `model` may have weights or none.

    `is_whole`: all of it runs, its head included; else only the text part. `echoes`: layers of one kind run once.
    """

    def __init__(
        self, model: Any, layers: Sequence[ExpertLayer], *, is_whole: bool, echoes: bool
    ) -> None:
        self._model = _without_contents(model)
        for layer in layers:
            self._model.get_submodule(layer.name).config._experts_implementation = _EXPERTS
        self._is_whole = is_whole
        self._has_encoder = bool(model.config.is_encoder_decoder)
        stack = _stack_of(layers[0].name)
        self._text = self._model.get_submodule(stack.rpartition(".")[0])
        self._echoes: list[_Echo] = []
        self._counts: dict[int, int] = {}
        self._ledger: _Ledger | None = None
        if echoes and not self._has_encoder:
            self._let_layers_repeat(self._model.get_submodule(stack))

    def try_out(self) -> None:
        """Run a few tokens, of one sequence and of two. Raises whatever the family does where it cannot."""
        for batch in (1, 2):
            self.cache_bytes(batch, _PROBE)
            with _dry(_Everything()):
                out = self._prompts(batch, _PROBE)
                self._pass(batch, 1, _PROBE + 1, out.past_key_values)

    def cache_bytes(self, batch: int, tokens: int) -> tuple[int, int]:
        """Positions of each sequence in the cache after so many tokens of each, and the bytes it then holds."""
        with _dry(_Everything()):
            cache = self._prompts(batch, tokens).past_key_values
        return tokens + self._has_encoder, self._held_bytes(cache)

    def run(self, batch: int, tokens: int, more: int = 1) -> Dry:
        """Prompts of so many tokens in one pass, and a pass with `more` tokens of each sequence behind them."""
        if self._ledger is None:
            self._mark_modules()
        self._ledger = ledger = _Ledger()
        with _dry(ledger):
            # Its logits are alive until the next pass has its own, as in any loop.
            out = self._prompts(batch, tokens)
            held = {place: size for place, (_, size) in _held(out.past_key_values).items()}
            prefill = ledger.take(0, held)
            out = self._pass(batch, more, tokens + more, out.past_key_values)
            behind = ledger.take(sum(held.values()), {})
            del out
        return Dry(prefill, behind)

    def _prompts(self, batch: int, tokens: int) -> Any:
        if self._has_encoder:
            self._encoded = self._model.get_encoder()(**self._inputs(batch, tokens, tokens))
            tokens = 1
        return self._pass(batch, tokens, tokens, None)

    def _pass(self, batch: int, tokens: int, context: int, cache: Any) -> Any:
        inputs = self._inputs(batch, tokens, context)
        if self._has_encoder:
            out = self._model(
                encoder_outputs=self._encoded,
                decoder_input_ids=inputs["input_ids"][:, -1:],
                past_key_values=cache,
                use_cache=True,
            )
        elif self._is_whole:
            last = "logits_to_keep" in inspect.signature(self._model.forward).parameters
            kept = {"logits_to_keep": 1} if last else {}
            out = self._model(**inputs, **kept, past_key_values=cache, use_cache=True)
        else:
            out = self._text(**inputs, past_key_values=cache, use_cache=True)
            config = self._model.config.get_text_config(decoder=True)
            out["logits"] = out[0].new_empty((batch, config.vocab_size))
        for echo in self._echoes:
            echo.result = None
        return out

    def _inputs(self, batch: int, tokens: int, context: int) -> dict[str, torch.Tensor]:
        """What a loop makes for a pass. One sequence alone is not padded, and needs no mask."""
        ids, mask, positions = (
            torch.empty((batch, size), dtype=torch.long, device=_META)
            for size in (tokens, context, context)
        )
        self._made = (mask, positions)
        if batch == 1:
            return {"input_ids": ids}
        placed = {} if self._has_encoder else {"position_ids": positions[:, -tokens:]}
        return {"input_ids": ids, "attention_mask": mask, **placed}

    def _held_bytes(self, cache: Any) -> int:
        """Bytes of a cache in which every layer has stored what the one of its kind has."""
        held = _held(cache).values()
        strange = {layer for layer, _ in held} - set(self._counts)
        if self._counts and strange:
            raise LookupError(f"The cache's places {strange} are no layers.")
        return sum(size * self._counts.get(layer, 1) for layer, size in held)

    def _let_layers_repeat(self, stack: Any) -> None:
        config = self._model.config.get_text_config(decoder=True)
        for numbers in _kinds(list(stack), config):
            first = stack[numbers[0]]
            echo = _Echo(first.forward)
            self._echoes.append(echo)
            self._counts[numbers[0]] = len(numbers)
            first.forward = echo.run
            for number in numbers[1:]:
                stack[number].forward = echo.repeat

    def _mark_modules(self) -> None:
        for name, module in self._model.named_modules():
            module.register_forward_pre_hook(self._mark(f"into {name}"))
            module.register_forward_hook(self._mark(f"out of {name}"))

    def _mark(self, stage: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._ledger is not None:
                self._ledger.stage = stage

        return hook


class _Echo:
    """Runs a layer once a pass, and gives its result to the others of its kind."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self.result: Any = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own pass."""
        self.result = self._forward(*args, **kwargs)
        return self.result

    def repeat(self, *args: Any, **kwargs: Any) -> Any:
        """What it gave."""
        return self.result


def dry_model(model: Any, layers: Sequence[ExpertLayer]) -> DryModel | None:
    """The model's dry copy, in the first way that runs; None if none does."""
    for is_whole in (True, False):
        for echoes in (True, False):
            try:
                made = DryModel(model, layers, is_whole=is_whole, echoes=echoes)
                made.try_out()
            except Exception:  # a family can look at contents in as many ways as there are families
                continue
            return made
    return None


@contextmanager
def _dry(mode: _Everything) -> Iterator[None]:
    with torch.inference_mode(), _NoNumbers(), mode:
        yield


def _without_contents(model: nn.Module) -> Any:
    """A copy of the model's modules whose tensors are on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device=_META)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(model, memo)


def _stack_of(name: str) -> str:
    """The path of the list of layers that a module is in."""
    parts = name.split(".")
    return ".".join(parts[: next(n for n, part in enumerate(parts) if part.isdigit())])


def _kinds(layers: Sequence[nn.Module], config: Any) -> list[list[int]]:
    """Numbers of the layers of each kind: the same modules and settings, and the same in every list of the config.

    The first is a kind of its own: what it reads is the embedding, which stays alive beside what all others read.
    """
    lists = [
        value
        for value in vars(config).values()
        if isinstance(value, list | tuple) and len(value) == len(layers)
    ]
    found: dict[Any, list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        modules = tuple((name, type(one), _settings(one)) for name, one in layer.named_modules())
        tensors = tuple((name, t.shape, t.dtype) for name, t in layer.named_parameters())
        told = tuple(repr(value[number]) for value in lists)
        found[modules, tensors, told, number == 0].append(number)
    return list(found.values())


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, repr(value))
        for name, value in sorted(vars(module).items())
        if isinstance(value, int | float | str | None) and not any(word in name for word in _PLACES)
    )


def _held(cache: Any) -> dict[int, tuple[int, int]]:
    """Storages that a cache keeps alive, by address: the layer that stored it (-1: none), and bytes.

    A view keeps all of what it is a view of.
    """
    found: dict[int, tuple[int, int]] = {}
    seen: set[int] = set()

    def walk(value: Any, layer: int) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.device == _META and value.dim():
                storage = value.untyped_storage()
                found[storage._cdata] = (layer, storage.nbytes())
        elif isinstance(value, dict):
            for part in value.values():
                walk(part, layer)
        elif isinstance(value, list | tuple):
            for number, part in enumerate(value):
                walk(part, number if layer < 0 else layer)
        elif type(value).__module__.startswith("transformers."):
            walk(vars(value), layer)

    walk(cache, -1)
    return found

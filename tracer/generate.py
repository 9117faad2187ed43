"""Greedy generation in plain sight: the loop the tracer and the runtime both drive.

It does what `model.generate(do_sample=False)` does for a left-padded batch, token for token (tested),
but shows each forward pass to an observer, so that steps can be timed and routing can be tied to
sequences and positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from .batch_inputs import joined_inputs
from .errors import UsageError
from .timing import StepInfo


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tokenised prompt. `sequence` numbers it within the run.

    `forced` are tokens to be fed after it instead of what the model would choose; none: its own. `inputs` are
    further arguments of the model's first pass, such as pixels.
    """

    sequence: int
    token_ids: tuple[int, ...]
    forced: tuple[int, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(slots=True)
class Generated:
    """What one sequence became. `token_s` are the times its tokens appeared, batch start = 0."""

    sequence: int
    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    finish: Literal["length", "eos"] = "length"


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The tokens of one pass, row-major over [batch, query]: what each routing row belongs to.

    position is -1 for padding, which includes rows whose sequence has ended.
    """

    sequence: list[int]
    position: list[int]
    token_id: list[int]


class StepObserver(Protocol):
    """Sees every forward pass of a generation."""

    def begin_step(self, info: StepInfo, tokens: StepTokens) -> None:
        """A pass is about to run."""
        ...

    def end_step(self) -> float:
        """The pass has run; returns the seconds it took."""
        ...


@torch.inference_mode()
def greedy(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    pad_id: int,
    first_step: int,
    observer: StepObserver,
) -> list[Generated]:
    """Generate greedily for one batch; the first pass is the prefill.

    Stops when every sequence has ended or reached `max_new_tokens`. An ended sequence stays in the
    batch as padding, as in the library's own loop. Forced sequences end where the given text does, whatever
    marks it holds. Encoder-decoder and diffusing models have loops of their own, which see fewer or more passes.
    """
    own_loop = _own_loop(model)
    if own_loop is not None:
        _require_text_only(model, prompts)
        return own_loop(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            pad_id=pad_id,
            first_step=first_step,
            observer=observer,
        )
    accepted = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    outputs = [Generated(prompt.sequence) for prompt in prompts]
    lengths = [len(prompt.token_ids) for prompt in prompts]
    width = max(lengths)
    input_ids, mask = left_padded(prompts, width, pad_id)
    is_done = [False] * len(prompts)
    is_forced = [bool(prompt.forced) for prompt in prompts]
    cache: Any = None
    clock = 0.0
    for count in range(max_new_tokens):
        query = input_ids.shape[1]
        info = StepInfo(
            step=first_step + count,
            phase="prefill" if cache is None else "decode",
            batch=len(prompts),
            tokens=len(prompts) * query,
            context=width + count,
        )
        tokens = _step_tokens(prompts, input_ids, width, lengths, is_done, count)
        observer.begin_step(info, tokens)
        out = model(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            **_where(model, prompts, mask, query),
            **(_inputs(model, prompts, device) if cache is None else {}),
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": 1} if "logits_to_keep" in accepted else {}),
        )
        cache = out.past_key_values
        chosen = out.logits[:, -1].argmax(dim=-1).tolist()
        clock += observer.end_step()
        chosen = forced_tokens(prompts, chosen, count)
        append_tokens(outputs, chosen, is_done, is_forced, eos_ids, clock)
        end_forced(prompts, is_done, count)
        if all(is_done):
            break
        input_ids = torch.tensor(
            [[pad_id if done else token] for token, done in zip(chosen, is_done, strict=True)]
        )
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], dim=1)
    return outputs


def writes_otherwise(model: Any) -> bool:
    """Whether a model does not write one token per pass from the left to the right."""
    return _own_loop(model) is not None


def _own_loop(model: Any) -> Callable[..., list[Generated]] | None:
    """The loop of models that do not write one token per pass from the left to the right."""
    from .denoise import denoise, is_diffusing
    from .translate import translate

    if model.config.is_encoder_decoder:
        return translate
    return denoise if is_diffusing(model) else None


def left_padded(
    prompts: Sequence[Prompt], width: int, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [prompts, width], the prompts at the right end."""
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        ids[row, width - length :] = torch.tensor(prompt.token_ids)
        mask[row, width - length :] = 1
    return ids, mask


def _require_text_only(model: Any, prompts: Sequence[Prompt]) -> None:
    if any(prompt.inputs for prompt in prompts):
        raise UsageError(
            f"{type(model).__name__} is run on text only; leave images out of its prompts."
        )


def _inputs(model: Any, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Any]:
    """Arguments of the first pass beside tokens, on the device, pixels in the model's own type."""
    lengths = [len(prompt.token_ids) for prompt in prompts]
    given = joined_inputs([prompt.inputs for prompt in prompts], lengths)
    return {name: _placed(value, model, device) for name, value in given.items()}


def _placed(value: Any, model: Any, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, model.dtype) if value.is_floating_point() else value.to(device)


def _where(
    model: Any, prompts: Sequence[Prompt], mask: torch.Tensor, query: int
) -> dict[str, torch.Tensor]:
    """Positions of the tokens. Where images span several axes, the model counts those of the first pass itself."""
    positions = _positions(mask, query).to(next(model.parameters()).device)
    parts: tuple[Any, ...] = (getattr(model, "model", None), model)
    owners = [part for part in parts if hasattr(part, "rope_deltas")]
    if not owners or not any(prompt.inputs for prompt in prompts):
        return {"position_ids": positions}
    if query > 1:
        return {}
    # Such models say how far the images have moved what follows them.
    moved = owners[0].rope_deltas
    return {"position_ids": (positions + moved)[None].expand(3, -1, -1)}


def _positions(mask: torch.Tensor, query: int) -> torch.Tensor:
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return positions[:, -query:]


def _step_tokens(
    prompts: Sequence[Prompt],
    input_ids: torch.Tensor,
    width: int,
    lengths: list[int],
    is_done: list[bool],
    count: int,
) -> StepTokens:
    query = input_ids.shape[1]
    sequences: list[int] = []
    positions: list[int] = []
    for row, prompt in enumerate(prompts):
        sequences += [prompt.sequence] * query
        if query > 1 or count == 0:
            padding = width - lengths[row]
            positions += [-1] * padding + list(range(lengths[row]))
        else:
            positions.append(-1 if is_done[row] else lengths[row] + count - 1)
    return StepTokens(sequences, positions, input_ids.flatten().tolist())


def forced_tokens(prompts: Sequence[Prompt], chosen: list[int], count: int) -> list[int]:
    """What is fed next: the given text where there is one, else what the model chose."""
    return [
        prompt.forced[count] if count < len(prompt.forced) else token
        for prompt, token in zip(prompts, chosen, strict=True)
    ]


def end_forced(prompts: Sequence[Prompt], is_done: list[bool], count: int) -> None:
    """End the sequences whose given text ends with this pass."""
    for row, prompt in enumerate(prompts):
        if prompt.forced and count + 1 >= len(prompt.forced):
            is_done[row] = True


def append_tokens(
    outputs: list[Generated],
    chosen: list[int],
    is_done: list[bool],
    is_forced: list[bool],
    eos_ids: frozenset[int],
    clock: float,
) -> None:
    """Add one pass's tokens to the sequences that go on, and end those whose token is an end mark."""
    for row, token in enumerate(chosen):
        if is_done[row]:
            continue
        outputs[row].token_ids.append(token)
        outputs[row].token_s.append(clock)
        if token in eos_ids and not is_forced[row]:
            outputs[row].finish = "eos"
            is_done[row] = True

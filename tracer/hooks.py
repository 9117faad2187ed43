"""The tracer's side of the model seam: finding MoE layers and taking over their experts.

transformers 5 dispatches every experts module through a registry. One function is registered here,
under one name; it hands the call to whatever handler sits on the module. The tracer's handlers record
and delegate to the stock function; the runtime's handler computes on its slot arena. Nothing else in
this package knows how transformers is built inside; families that need more than that have a file in
`adapters`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from .errors import ResourceError, UsageError
from .kept import kept_bytes
from .types import ModelShape

IMPLEMENTATION = "expertflow"
_HANDLER = "_expertflow_handler"
_ARGUMENTS = "_expertflow_arguments"
_GATE_NAMES = ("gate", "router")
_OTHER_TOWERS = frozenset({"vision", "visual", "vision_tower", "vision_model", "vision_moe", "mtp"})
"""Parts of a model whose experts see no text token: words in a module's path."""
_BATCHED_GATES = frozenset({"AfmoeTokenChoiceRouter"})
"""Gates that insist on [batch, tokens, hidden]."""
_OWN_STATE = ("pre_expert_proj", "fc1_latent_proj", "pre_feedforward_layernorm_2")
"""Modules between what a gate reads and what the experts beside it read."""
ALIGNMENT_BYTES = 16
"""Every tensor inside a packed block starts here: what CUDA's grouped kernel asks of strides."""


class ExpertsHandler(Protocol):
    """Computes one layer's experts for one forward pass.

    hidden_states is [tokens, hidden]; top_k_index and top_k_weights are [tokens, top_k].
    """

    def __call__(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Output of the layer's experts: [tokens, hidden]."""
        ...


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """One MoE layer: its number among MoE layers, its place in the model, and its parts.

    `gate` is None where it cannot be applied early: it was not found, or reads another state than the
    experts do. `input_size` are the elements of one token's state as the experts read it. `tower` tells an
    encoder's layers from a decoder's; empty if there is only one.
    """

    index: int
    name: str
    decoder_layer: int
    module: nn.Module
    gate: nn.Module | None
    weight_names: tuple[str, ...]
    input_size: int
    tower: str


def _dispatch(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    handler = getattr(module, _HANDLER, None)
    if handler is None:
        raise ResourceError(
            f"A {type(module).__name__} outside the traced layers was called: tokens that are not text "
            "have experts of their own in this model, and these are not recorded. Give prompts of text only."
        )
    return handler(module, hidden_states, top_k_index, top_k_weights)


class StackedExperts(nn.Module):
    """Experts of a family that keeps them in its own way, as stacked weights behind the registry.

    `weights` are the library's names and shapes: gate_up_proj [experts, 2 × inner, hidden] or up_proj
    [experts, inner, hidden], down_proj [experts, hidden, inner], and their biases.
    """

    def __init__(
        self, config: Any, weights: dict[str, torch.Tensor], activation: nn.Module, top_k: int
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = len(weights["down_proj"]), top_k
        self.hidden_dim = weights["down_proj"].shape[1]
        self.act_fn = activation
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Output of the layer's experts: [tokens, hidden], expert by expert."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            rows, places = torch.where(top_k_index == expert)
            states = self._one(expert, hidden_states[rows])
            states = states * top_k_weights[rows, places, None]
            output.index_add_(0, rows, states.to(output.dtype))
        return output

    def _one(self, expert: int, states: torch.Tensor) -> torch.Tensor:
        inner = self._linear("gate_up_proj" if self.has_gate else "up_proj", expert, states)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)  # type: ignore[operator]
        return self._linear("down_proj", expert, inner)

    def _linear(self, name: str, expert: int, states: torch.Tensor) -> torch.Tensor:
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return nn.functional.linear(states, weight.T if self.is_transposed else weight, bias)


@use_experts_implementation
class GatedExperts(StackedExperts):
    """Two projections in, one gating the other, and one out."""


@use_experts_implementation(is_transposed=True)
class TransposedExperts(StackedExperts):
    """Gated ones whose weights are stored as [experts, in, out]."""


@use_experts_implementation(has_gate=False)
class PlainExperts(StackedExperts):
    """One projection in, one out."""


@use_experts_implementation(has_gate=False, has_bias=True)
class BiasedExperts(StackedExperts):
    """One projection in, one out, each with a bias."""


def register_experts(module: Any, config: Any) -> None:
    """Put an experts module that lacks nothing but the registry's decorator behind the registry."""
    kind = type(module)
    registered: Any = type(kind.__name__, (kind,), {})
    module.__class__ = use_experts_implementation(registered)
    module.config = config
    module.has_gate = module.is_concatenated = True
    module.has_bias = module.has_post_expert_norm = module.is_transposed = False
    module._is_expert_parallel = False


def stock_function(module: nn.Module, implementation: str) -> Callable[..., torch.Tensor]:
    """The library's own experts function of that name ("eager" is the class's own forward)."""
    if implementation == "eager":
        return type(module).forward.__wrapped__  # type: ignore[attr-defined]
    known = set(ALL_EXPERTS_FUNCTIONS.valid_keys()) - {IMPLEMENTATION}
    if implementation not in known:
        allowed = ", ".join(["eager", *sorted(known)])
        raise UsageError(f"Unknown experts implementation {implementation!r}; allowed: {allowed}.")
    return ALL_EXPERTS_FUNCTIONS[implementation]


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Find the MoE layers that text tokens pass, in forward order; an encoder's come before its decoder's.

    Raises ResourceError if there are none that go through the experts registry, or if they differ in the
    number or the size of their experts.
    """
    modules = dict(model.named_modules())
    found: list[ExpertLayer] = []
    for name, module in modules.items():
        if not _is_experts(module) or _OTHER_TOWERS & set(name.split(".")):
            continue
        parent = modules[name.rpartition(".")[0]]
        found.append(
            ExpertLayer(
                index=len(found),
                name=name,
                decoder_layer=_layer_number(name, default=len(found)),
                module=module,
                gate=_early_gate(parent, module),
                weight_names=_weight_names(module),
                input_size=_input_size(module),
                tower=_tower(model, name),
            )
        )
    if not found:
        raise ResourceError(
            f"{type(model).__name__} has no experts that transformers dispatches through its "
            "experts registry. Allowed: MoE models of transformers 5.17 or later. "
            "Check with `expertflow-trace doctor`."
        )
    _require_alike(model, found)
    return found


def _is_experts(module: nn.Module) -> bool:
    return (
        hasattr(module, "is_transposed")
        and hasattr(module, "has_gate")
        and hasattr(module, "num_experts")
    )


def _require_alike(model: nn.Module, layers: list[ExpertLayer]) -> None:
    shapes = {_expert_shapes(layer): layer for layer in layers}
    if len(shapes) > 1:
        (_, first), (_, other), *_ = shapes.items()
        raise ResourceError(
            f"{type(model).__name__} has experts of different number or size: {first.name} and {other.name} "
            "differ. A trace describes one kind of expert. Allowed: models whose MoE layers are alike."
        )


def _expert_shapes(layer: ExpertLayer) -> tuple[Any, ...]:
    weights = ((name, getattr(layer.module, name)) for name in layer.weight_names)
    return tuple((name, tuple(weight.shape), weight.dtype) for name, weight in weights)


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    num_experts = int(module.num_experts)  # type: ignore[arg-type]
    return tuple(
        name
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 1 and parameter.shape[0] == num_experts
    )


def _input_size(module: Any) -> int:
    return module.down_proj.shape[2 if module.is_transposed else 1]


def _early_gate(parent: nn.Module, experts: nn.Module) -> nn.Module | None:
    """The gate beside the experts, if it can be asked with the state they read; see gate_choice."""
    if any(hasattr(parent, name) for name in _OWN_STATE):
        return None
    children = {name: child for name, child in parent.named_children() if child is not experts}
    gate = next((children[name] for name in _GATE_NAMES if name in children), None)
    if gate is None:
        return None
    gate = getattr(
        gate, "classifier", gate
    )  # the gate proper, in families whose router answers with masks
    taken = list(inspect.signature(gate.forward).parameters.values())[1:]
    arguments = {one.name: getattr(parent, one.name, None) for one in taken}
    if any(one.default is one.empty and arguments[one.name] is None for one in taken):
        return None
    setattr(gate, _ARGUMENTS, {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)})
    return gate


def _layer_number(name: str, default: int) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else default


def _tower(model: Any, name: str) -> str:
    if not model.config.is_encoder_decoder:
        return ""
    return "encoder" if "encoder" in name.split(".") else "decoder"


def _encoder_layers(model: Any) -> int:
    config = model.config
    return getattr(config, "encoder_layers", None) or config.num_layers


def gate_choice(gate: nn.Module, hidden_states: torch.Tensor, top_k: int) -> torch.Tensor:
    """The experts a gate picks for hidden states [tokens, hidden] it was not meant to see yet: [tokens, top_k].

    Gates return their logits first and, in most families, the chosen ids as their integer output. Biases that
    a gate gets from its block are the block's own.
    """
    is_batched = type(gate).__name__ in _BATCHED_GATES
    states = hidden_states[None] if is_batched else hidden_states
    # Not getattr: a module looks for what it lacks in many places, and this is asked for every event.
    output = gate(states, **gate.__dict__.get(_ARGUMENTS, {}))
    parts = output if isinstance(output, tuple) else (output,)
    for part in parts:
        if not part.is_floating_point():
            return part.reshape(hidden_states.shape[0], -1)[:, :top_k]
    return parts[0].topk(top_k, dim=-1).indices.reshape(hidden_states.shape[0], -1)


@contextmanager
def installed(
    model: Any, layers: list[ExpertLayer], make: Callable[[ExpertLayer], ExpertsHandler]
) -> Iterator[None]:
    """Route every MoE layer through a handler while the context is open."""
    restore = install(model, layers, make)
    try:
        yield
    finally:
        restore()


def install(
    model: Any, layers: list[ExpertLayer], make: Callable[[ExpertLayer], ExpertsHandler]
) -> Callable[[], None]:
    """Route every MoE layer through `make(layer)`; returns the function that undoes it."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _dispatch)
    configs = _configs(layers)
    before = [config._experts_implementation for config in configs]
    for layer in layers:
        setattr(layer.module, _HANDLER, make(layer))
    for config in configs:
        config._experts_implementation = IMPLEMENTATION

    def restore() -> None:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation = implementation or "eager"
        for layer in layers:
            if hasattr(layer.module, _HANDLER):
                delattr(layer.module, _HANDLER)

    return restore


def choose_implementation(layers: list[ExpertLayer], implementation: str) -> None:
    """Let the layers run the library's experts function of that name. Raises UsageError if there is none."""
    stock_function(layers[0].module, implementation)
    for config in _configs(layers):
        config._experts_implementation = implementation


def _configs(layers: list[ExpertLayer]) -> list[Any]:
    """The configs that the layers' modules read their implementation from, each once."""
    return list({id(layer.module.config): layer.module.config for layer in layers}.values())


def model_shape(
    model: Any, layers: list[ExpertLayer], *, model_id: str, revision: str | None
) -> ModelShape:
    """Read a model's shape from its modules and config."""
    config = model.config.get_text_config(decoder=True)
    first = layers[0]
    expert_parameters = {
        id(parameter)
        for layer in layers
        for name, parameter in layer.module.named_parameters(recurse=False)
        if name in layer.weight_names
    }
    tensors = [*model.parameters(), *model.buffers()]
    non_expert = sum(
        t.numel() * t.element_size() for t in tensors if id(t) not in expert_parameters
    )
    return ModelShape(
        model_id=model_id,
        revision=revision,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=_num_layers(model),
        moe_layers=tuple(layer.decoder_layer for layer in layers),
        num_experts=int(first.module.num_experts),  # type: ignore[arg-type]
        top_k=_top_k(config, first),
        expert_bytes=packed_bytes(first),
        non_expert_bytes=non_expert,
        kv_bytes_per_token=kept_bytes(model, layers).per_token,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
    )


def packed_bytes(layer: ExpertLayer) -> int:
    """Bytes of one packed expert: each tensor padded to the alignment."""
    total = 0
    for name in layer.weight_names:
        one = getattr(layer.module, name)[0]
        total += align(one.numel() * one.element_size())
    return total


def align(num_bytes: int) -> int:
    """Round up to the alignment inside a packed block."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)


def _top_k(config: Any, layer: ExpertLayer) -> int:
    own = getattr(layer.module, "top_k", None)
    values = [own, *(getattr(config, name, None) for name in _TOP_K_NAMES)]
    for value in values:
        if isinstance(value, list) and len(set(value)) == 1:
            return value[0]
        if isinstance(value, int):
            return value
    raise ResourceError(
        f"{type(config).__name__} does not say how many experts a token uses, or says it differently for "
        "each layer. Allowed: models that use the same number in every MoE layer."
    )


def _num_layers(model: Any) -> int:
    config = model.config.get_text_config(decoder=True)
    if not model.config.is_encoder_decoder:
        return config.num_hidden_layers
    decoder = getattr(config, "decoder_layers", None) or config.num_decoder_layers
    return _encoder_layers(model) + decoder

"""The tracer's side of the model seam: finding MoE layers and taking over their experts.

transformers 5 dispatches every experts module through a registry. One function is registered here,
under one name; it hands the call to whatever handler sits on the module. The tracer's handlers record
and delegate to the stock function; the runtime's handler computes on its slot arena. Nothing else in
this package knows how transformers is built inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .errors import ResourceError, UsageError
from .types import ModelShape

IMPLEMENTATION = "expertflow"
_HANDLER = "_expertflow_handler"
_GATE_NAMES = ("gate", "router")
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
    """One MoE layer: its number among MoE layers, its place in the model, and its parts."""

    index: int
    name: str
    decoder_layer: int
    module: nn.Module
    gate: nn.Module | None
    weight_names: tuple[str, ...]


def _dispatch(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    handler = getattr(module, _HANDLER)
    return handler(module, hidden_states, top_k_index, top_k_weights)


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
    """Find the model's MoE layers in forward order.

    Raises ResourceError if the model has none that go through the experts registry.
    """
    modules = dict(model.named_modules())
    found: list[ExpertLayer] = []
    for name, module in modules.items():
        if not _is_experts(module):
            continue
        parent = modules[name.rpartition(".")[0]]
        found.append(
            ExpertLayer(
                index=len(found),
                name=name,
                decoder_layer=_layer_number(name, default=len(found)),
                module=module,
                gate=_find_gate(parent, module),
                weight_names=_weight_names(module),
            )
        )
    if not found:
        raise ResourceError(
            f"{type(model).__name__} has no experts that transformers dispatches through its "
            "experts registry. Allowed: MoE models of transformers 5.17 or later. "
            "Check with `expertflow-trace doctor`."
        )
    return found


def _is_experts(module: nn.Module) -> bool:
    return (
        hasattr(module, "is_transposed")
        and hasattr(module, "has_gate")
        and hasattr(module, "num_experts")
    )


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    num_experts = int(module.num_experts)  # type: ignore[arg-type]
    return tuple(
        name
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 1 and parameter.shape[0] == num_experts
    )


def _find_gate(parent: nn.Module, experts: nn.Module) -> nn.Module | None:
    children = {name: child for name, child in parent.named_children() if child is not experts}
    for name in _GATE_NAMES:
        if name in children:
            return children[name]
    return None


def _layer_number(name: str, default: int) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else default


def gate_choice(gate: nn.Module, hidden_states: torch.Tensor, top_k: int) -> torch.Tensor:
    """The experts a gate picks for hidden states it was not meant to see yet: [tokens, top_k].

    Gates return their logits first and, in most families, the chosen ids as their integer output.
    """
    output = gate(hidden_states)
    parts = output if isinstance(output, tuple) else (output,)
    for part in parts:
        if not part.is_floating_point():
            return part.reshape(hidden_states.shape[0], -1)[:, :top_k]
    return parts[0].topk(top_k, dim=-1).indices


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
    before = model.config.get_text_config()._experts_implementation
    for layer in layers:
        setattr(layer.module, _HANDLER, make(layer))
    model.set_experts_implementation(IMPLEMENTATION)

    def restore() -> None:
        model.set_experts_implementation(before or "eager")
        for layer in layers:
            if hasattr(layer.module, _HANDLER):
                delattr(layer.module, _HANDLER)

    return restore


def model_shape(
    model: Any, layers: list[ExpertLayer], *, model_id: str, revision: str | None
) -> ModelShape:
    """Read a model's shape from its modules and config."""
    config = model.config.get_text_config()
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
        num_layers=config.num_hidden_layers,
        moe_layers=tuple(layer.decoder_layer for layer in layers),
        num_experts=int(first.module.num_experts),  # type: ignore[arg-type]
        top_k=_top_k(config),
        expert_bytes=packed_bytes(first),
        non_expert_bytes=non_expert,
        kv_bytes_per_token=_kv_bytes_per_token(config, model.dtype),
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


def _top_k(config: Any) -> int:
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ResourceError(f"{type(config).__name__} does not say how many experts a token uses.")


def _kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    latent = getattr(config, "kv_lora_rank", None)
    if latent:  # latent attention caches one compressed state and one rotated key for all heads
        return config.num_hidden_layers * (latent + config.qk_rope_head_dim) * dtype.itemsize
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize

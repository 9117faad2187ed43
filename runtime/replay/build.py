"""A model of any size from its config, with random weights, never twice in memory.

It is built on torch's meta device, where tensors take no room. Experts are then drawn one by one straight into the
host's packed blocks (or into the modules, for runs without offloading), and all other weights on the device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...tracer.adapters import adapt
from ...tracer.blocks import HostBlocks, Tier
from ...tracer.errors import ResourceError
from ...tracer.hooks import choose_implementation, expert_layers, model_shape
from ...tracer.load import (
    DEFAULT_IMPLEMENTATION,
    LoadedModel,
    choose_dtype,
    model_class,
    quiet_transformers,
)
from ...tracer.types import ExpertKey

LABEL = "routing replay, random weights"
_DRAWN_AT_ONCE = 1 << 28
"""Bytes that are drawn on the device before they are brought to the host."""


def unfilled_model(config: Any, *, name: str, dtype: torch.dtype) -> LoadedModel:
    """The model on the meta device, its experts found. Raises ResourceError if there is none of them."""
    if config.is_encoder_decoder:
        raise ResourceError(
            f"{type(config).__name__} describes an encoder-decoder model, and a replay feeds tokens one by one. "
            "Allowed: causal models."
        )
    kind = model_class(config)
    make = getattr(kind, "from_config", None) or kind._from_config
    try:
        with quiet_transformers(), torch.device("meta"):
            model = make(config, dtype=dtype).eval()
    except Exception as cause:  # a config can be wrong in as many ways as there are families
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ResourceError(
            f"No model can be built from this {type(config).__name__}: {first} Check the config against the installed "
            "transformers (`expertflow-trace doctor`)."
        ) from None
    notes = adapt(model)
    layers = expert_layers(model)
    choose_implementation(layers, DEFAULT_IMPLEMENTATION)
    shape = model_shape(model, layers, model_id=f"{name} ({LABEL})", revision=None)
    return LoadedModel(
        model=model,
        tokenizer=None,
        layers=layers,
        shape=shape,
        eos_ids=frozenset(),
        pad_id=0,
        implementation=DEFAULT_IMPLEMENTATION,
        notes=notes,
    )


def replay_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, and float32 on the CPU, where half types are slow."""
    chosen = choose_dtype(name, device)
    return chosen if isinstance(chosen, torch.dtype) else torch.bfloat16


def random_blocks(
    loaded: LoadedModel,
    device: torch.device,
    *,
    tier: Tier = "ram",
    pin: bool = False,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> HostBlocks:
    """Packed experts of an unfilled model, drawn one by one: no two have the same bytes. Its modules are left empty."""
    draw = Draw(loaded, device, seed)
    blocks = HostBlocks(loaded.layers, tier=tier, pin=pin, is_empty=True)
    for layer in loaded.layers:
        for expert in range(blocks.num_experts):
            for weight in blocks.weights(ExpertKey(layer.index, expert)).values():
                draw.fill(weight)
        blocks.take_over(layer)
        advance(blocks.num_experts)
    return blocks


class Draw:
    """Draws weights on a device, as wide as the model's config says, and hands them to where they are kept."""

    def __init__(self, loaded: LoadedModel, device: torch.device, seed: int) -> None:
        text = loaded.model.config.get_text_config(decoder=True)
        self._std = float(getattr(text, "initializer_range", None) or 0.02)
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def fill(self, target: torch.Tensor) -> None:
        """Overwrite with normal numbers. What lies elsewhere than the device gets them in pieces."""
        if target.device.type == self._device.type:
            target.normal_(0.0, self._std, generator=self._generator)
            return
        rows = max(1, _DRAWN_AT_ONCE // max(1, target[0].numel() * target.element_size()))
        for start in range(0, len(target), rows):
            part = target[start : start + rows]
            drawn = torch.empty(part.shape, dtype=part.dtype, device=self._device)
            part.copy_(drawn.normal_(0.0, self._std, generator=self._generator))


def fill_others(loaded: LoadedModel, device: torch.device, seed: int = 0) -> None:
    """Make all weights but the experts' on the device, as the library initialises them. Experts must be filled."""
    model = loaded.model
    kept = {
        (id(layer.module), name): getattr(layer.module, name).data
        for layer in loaded.layers
        for name in layer.weight_names
    }
    for layer in loaded.layers:  # to_empty would lose them, or make room for them again
        for name in layer.weight_names:
            _put(layer.module, name, torch.empty(0, dtype=kept[id(layer.module), name].dtype))
    model.to_empty(device=device)
    with torch.random.fork_rng(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # "initializing zero-element tensors": the experts
        torch.manual_seed(seed)
        model.init_weights()
    for layer in loaded.layers:
        for name in layer.weight_names:
            _put(layer.module, name, kept[id(layer.module), name])
    model.eval()


def fill_modules(
    loaded: LoadedModel, place: torch.device, device: torch.device, seed: int = 0
) -> None:
    """Draw the experts into their own modules on `place`, and all else on it too: for runs without offloading."""
    draw = Draw(loaded, device, seed)
    for layer in loaded.layers:
        for name in layer.weight_names:
            meta = getattr(layer.module, name)
            held = torch.empty(meta.shape, dtype=meta.dtype, device=place)
            draw.fill(held)
            _put(layer.module, name, held)
    fill_others(loaded, place, seed)


def expert_room(loaded: LoadedModel) -> int:
    """Host bytes that all packed experts take."""
    return math.prod((loaded.shape.total_experts, loaded.shape.expert_bytes))


def _put(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(weight, requires_grad=False))

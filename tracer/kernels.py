"""Measures what the size of a pool costs the experts kernel.

Grouped kernels visit every slot of the stacked weights, used or not. A pool of another size than the
model's own number of experts therefore computes in another time, which no trace of the resident model shows.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from .blocks import BlockLayout, SlotArena, StandIn
from .hooks import ExpertLayer, stock_function
from .types import ModelShape

_REPEATS = 30


@torch.inference_mode()
def measure_group_s(
    layer: ExpertLayer,
    layout: BlockLayout,
    shape: ModelShape,
    device: torch.device,
    implementation: str,
) -> float:
    """Seconds that one more slot in a layer's pool adds to a call for one token. Never negative."""
    small, large = shape.num_experts, 3 * shape.num_experts
    seconds = [
        _call_s(layer, layout, shape, device, implementation, groups) for groups in (small, large)
    ]
    return max(0.0, (seconds[1] - seconds[0]) / (large - small))


def _call_s(
    layer: ExpertLayer,
    layout: BlockLayout,
    shape: ModelShape,
    device: torch.device,
    implementation: str,
    groups: int,
) -> float:
    arena = SlotArena(layout, groups, device)
    stand_in = StandIn(layer.module, arena.part(range(groups)))
    stock = stock_function(layer.module, implementation)
    dtype = layout.places[0].dtype
    states = torch.zeros(1, layer.input_size, dtype=dtype, device=device)
    chosen = torch.arange(shape.top_k, device=device)[None, :]
    weights = torch.ones(1, shape.top_k, dtype=dtype, device=device)
    seconds: list[float] = []
    for repeat in range(_REPEATS + 3):
        began = time.perf_counter()
        stock(stand_in, states, chosen, weights)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= 3:
            seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))

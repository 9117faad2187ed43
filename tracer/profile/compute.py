"""Times what a device computes for one layer: its experts, the read-back of the routing, and launches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from ..hooks import ExpertLayer, stock_function
from ..types import ModelShape
from .document import ExpertPoint, ReadbackPoint
from .fit import sample

TOKENS = (1, 4, 16, 64)
_WARM_UPS = 3
_LAUNCHES = 200


@torch.inference_mode()
def measure_experts(
    layer: ExpertLayer,
    shape: ModelShape,
    device: torch.device,
    implementation: str,
    repeats: int,
) -> tuple[ExpertPoint, ...]:
    """Calls of the stock kernel by tokens and distinct experts, weights resident on the device."""
    stock = stock_function(layer.module, implementation)
    weight = getattr(layer.module, layer.weight_names[0])
    points: list[ExpertPoint] = []
    for tokens, distinct in grid(shape.num_experts, shape.top_k):
        states = torch.randn(tokens, shape.hidden_size, device=device).to(weight.dtype)
        chosen = choice(tokens, distinct, shape.top_k).to(device)
        weights = torch.full((tokens, shape.top_k), 1 / shape.top_k, device=device)
        weights = weights.to(weight.dtype)
        seconds = _timed(
            lambda s=states, c=chosen, w=weights: stock(layer.module, s, c, w), device, repeats
        )
        points.append(ExpertPoint(tokens=tokens, distinct=distinct, time=sample(seconds)))
    return tuple(points)


def grid(num_experts: int, top_k: int) -> Iterator[tuple[int, int]]:
    """Tokens, and the numbers of distinct experts they can choose: fewest, most, and doublings between."""
    for tokens in TOKENS:
        most = min(num_experts, tokens * top_k)
        distinct = top_k
        while distinct < most:
            yield tokens, distinct
            distinct *= 2
        yield tokens, most


def choice(tokens: int, distinct: int, top_k: int) -> torch.Tensor:
    """A choice [tokens, top_k] of exactly `distinct` experts, none twice by one token."""
    return (torch.arange(tokens * top_k) % distinct).reshape(tokens, top_k)


@torch.inference_mode()
def measure_readback(top_k: int, device: torch.device, repeats: int) -> tuple[ReadbackPoint, ...]:
    """Bringing a router's choice to the host, by tokens: waiting for the device included."""
    points: list[ReadbackPoint] = []
    for tokens in TOKENS:
        chosen = choice(tokens, top_k, top_k).to(device)
        seconds = _timed(lambda c=chosen: c.cpu().numpy().copy(), device, repeats)
        points.append(ReadbackPoint(tokens=tokens, time=sample(seconds)))
    return tuple(points)


@torch.inference_mode()
def measure_launch_s(device: torch.device, repeats: int) -> float:
    """The host's seconds for one small operation: enqueued on CUDA, done on the CPU."""
    one = torch.ones(8, device=device)

    def launches() -> None:
        for _ in range(_LAUNCHES):
            one.add_(0)

    seconds: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        launches()
        seconds.append((time.perf_counter() - began) / _LAUNCHES)
        _synchronize(device)
    return sample(seconds).seconds


def _timed(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    seconds: list[float] = []
    for number in range(repeats + _WARM_UPS):
        _synchronize(device)
        began = time.perf_counter()
        work()
        _synchronize(device)
        if number >= _WARM_UPS:
            seconds.append(time.perf_counter() - began)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

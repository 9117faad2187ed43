"""What one expert takes on the CPU, from the events of a run that computed some there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..simulator.costs import Linear
from ..simulator.policy.spec import PolicySpec, make_spec
from ..tracer.types import ModelShape
from .cpu_experts import CpuWork

_FREE = {"copy_s": 0.0, "expert_s": 0.0, "token_s": 0.0}
"""`cpu` sends every miss to the CPU, whatever it costs."""


def cpu_spec(shape: ModelShape, slots: int) -> PolicySpec:
    """A run in which all but the same few experts are computed on the CPU."""
    even = [[1] * shape.num_experts] * shape.num_moe_layers
    return make_spec(slots=slots, cache="static", misses="cpu", popularity=even, cpu_times=_FREE)


def fit_cpu_expert(work: Sequence[CpuWork]) -> Linear:
    """Seconds of one expert by (1, tokens): never negative, fitted to relative errors.

    Events of one kind (so many experts and tokens) count as one, with their median: a preemption is not a trend, and a
    decode pass, of which there are many, must not drown the few of prompts.
    """
    kinds: dict[tuple[int, int], list[float]] = {}
    for experts, pairs, seconds in work:
        kinds.setdefault((experts, pairs), []).append(seconds)
    if not kinds:
        return Linear((0.0, 0.0))
    features = np.asarray(list(kinds), dtype=np.float64)
    seconds = np.asarray([np.median(found) for found in kinds.values()])
    counts = np.sqrt([len(found) for found in kinds.values()])
    scaled = features / seconds[:, None] * counts[:, None]
    weights, *_ = np.linalg.lstsq(scaled, counts, rcond=None)
    if (weights < 0).any():
        # One of the two explains it all.
        alone = [_slope(scaled[:, [place]], counts) for place in (0, 1)]
        place = int(np.argmin([error for _, error in alone]))
        weights = np.zeros(2)
        weights[place] = alone[place][0]
    error = np.abs(features @ weights - seconds) / seconds
    return Linear(tuple(weights.tolist()), float(np.median(error)))


def _slope(feature: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    [slope], *_ = np.linalg.lstsq(feature, target, rcond=None)
    return float(slope), float(np.square(feature[:, 0] * slope - target).sum())

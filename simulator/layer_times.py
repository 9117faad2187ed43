"""How long a copy and a layer take on a machine: what members that fetch ahead of need weigh against each other."""

from __future__ import annotations

import numpy as np

from ..tracer.types import Phase
from .costs import NO_TRAFFIC, CostModel
from .workload import Workload


def layer_times(costs: CostModel, workload: Workload) -> dict[str, float] | None:
    """`copy_s` of one expert under computation, and `layer_s + token_s * tokens` of a layer; None if they take no time.

    A line through the mean decode and the mean prefill pass of the workload, every expert resident; a level one where
    there is one kind of pass, or where larger passes are no slower.
    """
    points = [found for phase in ("decode", "prefill") if (found := _mean(costs, workload, phase))]
    if not points:
        return None
    tokens, seconds = points[0]
    slope = 0.0
    if len(points) == 2 and points[1][0] > tokens:
        slope = max(0.0, (points[1][1] - seconds) / (points[1][0] - tokens))
    base = seconds - slope * tokens
    if base < 0.0:
        base, slope = 0.0, seconds / tokens
    if base + slope * tokens <= 0.0 or costs.busy_copy_s <= 0.0:
        return None
    return {"copy_s": costs.busy_copy_s, "layer_s": base, "token_s": slope}


def _mean(costs: CostModel, workload: Workload, phase: Phase) -> tuple[float, float] | None:
    """Tokens and seconds of one layer in the mean pass of a phase; None without such passes."""
    steps = workload.steps
    is_phase = steps.is_decode == (phase == "decode")
    if not is_phase.any():
        return None
    tokens, context = (float(np.mean(sizes[is_phase])) for sizes in (steps.tokens, steps.context))
    distinct = workload.mean_distinct(phase)
    weights = costs.phase(phase)
    seconds = weights.mixer(1, tokens, tokens * context, *NO_TRAFFIC) + weights.readback_s
    seconds += weights.decision(1, distinct, 0)
    seconds += weights.experts(1, tokens, distinct, *NO_TRAFFIC, 0)
    return tokens, seconds

"""Whether the link can keep up with computation, from the trace's own times."""

from __future__ import annotations

import numpy as np

from ..schema import WHOLE_STEP
from ..store import Trace
from .records import PaceStats

_WORK = ("mixer_s", "readback_s", "experts_s")
"""What a layer does besides waiting for loads and deciding about them."""


def pace_stats(trace: Trace, distinct: float) -> PaceStats | None:
    """Compare one decode layer's work with the loads of its `distinct` experts; None without times or link."""
    link = trace.hardware.link
    if not trace.has_times or not link.curves or not distinct:
        return None
    rows = trace.table("steps", [*_WORK, "layer", "phase"])
    kept = (rows["layer"].to_numpy() != WHOLE_STEP) & np.array(
        [phase == "decode" for phase in rows["phase"].to_pylist()], dtype=bool
    )
    if not kept.any():
        return None
    layer_s = float(np.median(sum(rows[name].to_numpy()[kept] for name in _WORK)))
    copy_s = link.curve(pinned=True, busy=False).copy_s(trace.shape.expert_bytes)
    if not (np.isfinite(layer_s) and copy_s > 0):
        return None
    return PaceStats(
        layer_s=layer_s,
        copy_s=copy_s,
        distinct=distinct,
        needed_hits=float(max(0.0, 1 - layer_s / (distinct * copy_s))),
        origin=f"times {trace.hardware.origin}, link {link.origin}",
    )

"""A simulated run as a timeline for Perfetto, drawn by the same renderer as a measured one (tracer/export)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..tracer.export.timeline import CopyColumns, Timeline, build_timeline
from .account import RunRecord
from .policy.spec import PolicySpec
from .result import Result

if TYPE_CHECKING:
    from .forecast import Forecaster


def run_timeline(title: str, record: RunRecord, window: range | None = None) -> Timeline:
    """Lay out the rows of one run, or of the steps in `window`."""
    copies = record.copies
    never = math.nan
    return build_timeline(
        title,
        record.steps,
        CopyColumns(
            step=np.array([copy.step for copy in copies]),
            layer=np.array([copy.key.layer for copy in copies]),
            expert=np.array([copy.key.expert for copy in copies]),
            bytes=np.array([copy.num_bytes for copy in copies]),
            why=[copy.why for copy in copies],
            queued_s=np.array([copy.queued_s for copy in copies]),
            start_s=np.array([copy.start_s for copy in copies]),
            end_s=np.array([copy.end_s for copy in copies]),
            needed_s=np.array([never if c.needed_s is None else c.needed_s for c in copies]),
        ),
        window,
    )


def predicted_timeline(
    ready: Forecaster, spec: PolicySpec, result: Result, window: range | None = None
) -> Timeline:
    """Predict once more, row by row (by the reference engine), and lay the rows out.

    Raises UsageError if the trace or the machine lacks what the policy needs.
    """
    origin = "declared" if ready.is_declared else result.link_origin
    title = f"predicted: {result.label} on {result.device}, link {result.link} ({origin})"
    return run_timeline(title, ready.record(spec), window)

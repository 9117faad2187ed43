"""Counts what a decision log loaded, by event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..simulator.policy.log import Entry

Places = Counter[tuple[int, int]]
"""Counts by (step, layer)."""


def loads_by_event(log: Sequence[Entry]) -> tuple[Places, Places]:
    """Demand loads and prefetches asked for by each (step, layer) event."""
    demand: Places = Counter()
    prefetch: Places = Counter()
    event = (-1, -1)
    for entry in log:
        if entry.kind == "event":
            event = (entry.step, entry.layer)
        elif entry.kind == "load" and entry.detail == "demand":
            demand[event] += 1
        elif entry.kind == "load" and entry.detail == "prefetch":
            prefetch[event] += 1
    return demand, prefetch

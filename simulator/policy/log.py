"""The decision log: everything that went into the core and everything it answered, in order.

Inputs are `event` rows (one per demanded expert), `predict`, `loaded`, `lost` (a load that failed) and `release`;
answers are the outcome and slot on the `event` rows, and `load` and `cancel`. Feeding the inputs to a fresh core must
give the same rows (replay.py).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["event", "load", "cancel", "predict", "loaded", "lost", "release"]


class Entry(NamedTuple):
    """One row. Unused numbers are -1. `detail` is the outcome (event: hit, late, miss, cpu) or the reason (load).

    `tokens`, `weight` and `is_prefill` are an event's facts by expert (weight -1: not known).
    """

    kind: Kind
    step: int
    layer: int
    expert: int
    slot: int = -1
    evicted_layer: int = -1
    evicted_expert: int = -1
    wave: int = -1
    detail: str = ""
    tokens: int = 1
    weight: float = -1.0
    is_prefill: bool = False

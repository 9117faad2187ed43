"""How far a forecast under load may be off: what a little more or less speed of the machine would change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..simulator.arrivals import Arrivals
from ..simulator.result import Result
from .verdict import SERVING_QUANTITIES, SPEED_STEP

_TIMES = {"s": 1, "tokens/s": -1}
"""By unit: how often a quantity holds time."""
SPEEDS = (1 - SPEED_STEP, 1 - SPEED_STEP / 2, 1 + SPEED_STEP / 2, 1 + SPEED_STEP)
"""How many times as long everything may take as it was forecast to."""


def speed_bands(
    found: Result, arrivals: Arrivals, at: Callable[[Arrivals], Result]
) -> dict[str, float]:
    """By quantity: how far off it would be if the machine were up to SPEED_STEP slower or faster than forecast.

    On a machine that takes `slowness` times as long for everything, arrivals are served as they would be here if
    they came so many times as fast, in so many times the time. In a closed loop nothing else changes.
    """
    if arrivals.users is not None:
        return {}
    bands = dict.fromkeys((quantity.name for quantity in SERVING_QUANTITIES), 0.0)
    for slowness in SPEEDS:
        other = at(_faster(arrivals, slowness))
        for quantity in SERVING_QUANTITIES:
            value = quantity.of(other) * slowness ** _TIMES.get(quantity.unit, 0)
            change = abs(quantity.gap(value, quantity.of(found)))
            bands[quantity.name] = max(bands[quantity.name], change)
    return bands


def _faster(arrivals: Arrivals, times: float) -> Arrivals:
    return replace(
        arrivals,
        requests=tuple(replace(one, time_s=one.time_s / times) for one in arrivals.requests),
    )

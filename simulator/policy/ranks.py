"""The formulas of caches whose order is not plain recency, as functions of numbers.

They stand apart so that the compiled caches run the very same lines: plain + − × ÷ and comparisons, in a
fixed order, no state.
"""

from __future__ import annotations


def lfru_rank(count: int, age: int) -> float:
    """Frequency × recency; `age` is 0 for what the running event uses. Lowest goes first."""
    return count / (1.0 + age)


def nearness(layer: int, current: int, layers: int) -> float:
    """How soon `layer` has its turn, 0 for the current one, which has just had it, to 1 − 1/`layers`."""
    ahead = (layer - current) % layers
    if ahead == 0:
        ahead = layers
    return 1.0 - ahead / layers


def multi_factor_rank(
    last: int, count: int, now: int, w_recency: float, w_frequency: float, near: float
) -> float:
    """HOBBIT's weighted sum; `near` is weighted already. Lowest goes first; `now` is at least 1."""
    return (w_recency * last + w_frequency * count) / now + near


def arc_target_raised(target: float, slots: int, recent_ghosts: int, frequent_ghosts: int) -> float:
    """ARC's p after a demand of a recency ghost (B1), which is one of `recent_ghosts`."""
    step = frequent_ghosts / recent_ghosts
    if step < 1.0:
        step = 1.0
    raised = target + step
    return raised if raised < slots else float(slots)


def arc_target_lowered(target: float, recent_ghosts: int, frequent_ghosts: int) -> float:
    """ARC's p after a demand of a frequency ghost (B2), which is one of `frequent_ghosts`."""
    step = recent_ghosts / frequent_ghosts
    if step < 1.0:
        step = 1.0
    lowered = target - step
    return lowered if lowered > 0.0 else 0.0


def protected_slots(share: float, slots: int) -> int:
    """Slots of SLRU's protected segment, rounded down."""
    return int(share * slots)


def plan_rank(layer: int, current: int) -> float:
    """How soon what is planned for `layer` is needed, up to 1: later layers of this pass, then those of the next."""
    ahead = layer - current
    if ahead <= 0:
        ahead += 65536
    return 1.0 / ahead

"""Outcomes of prefetches as they happen: the compiled twin of simulator.outcomes.Ledger."""

from __future__ import annotations

from .jit import compiled
from .state import Records


@compiled
def close(experts: Records, key: int) -> int:
    """End the story of a prefetch; 1 if there was one."""
    if not experts[key].is_open:
        return 0
    experts[key].is_open = 0
    victim = experts[key].victim_of
    if victim >= 0 and experts[victim].blamed == key:
        experts[victim].blamed = -1
    experts[key].victim_of = -1
    return 1


@compiled
def came_back(experts: Records, key: int) -> int:
    """An evicted expert is loaded again, or about to be; 1 if a prefetch was to blame for its absence."""
    by = experts[key].blamed
    if by < 0:
        return 0
    experts[key].blamed = -1
    experts[by].victim_of = -1
    return 1


@compiled
def prefetched(experts: Records, key: int, evicts: int) -> None:
    """A prefetch was asked for."""
    close(experts, key)
    came_back(experts, key)
    experts[key].is_open = 1
    experts[key].victim_of = evicts
    if evicts >= 0:
        came_back(experts, evicts)
        experts[evicts].blamed = key

"""Numbers that look drawn but follow from their names, so that nothing has a state to restore."""

from __future__ import annotations

_WORD = 2**64 - 1


def chance(*names: int) -> float:
    """A number from 0 to 1 (less than it) for some numbers: SplitMix64 over them."""
    state = 0
    for name in names:
        state = _mixed(state ^ (name & _WORD))
    return (state >> 11) / 2**53


def _mixed(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
    return state ^ (state >> 31)

"""What predictors share: where they are in the walk over layers, how they rank, what they keep of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from ...tracer.errors import UsageError
from ...tracer.types import ExpertKey

State = TypeVar("State")


class Walk:
    """Pass after pass over the layers, as seen by one who is told only the layer that was routed.

    Without `num_layers` it learns from the first pass how many there are; until then nothing lies ahead.
    """

    def __init__(self, num_layers: int = 0) -> None:
        self.passes = 0
        self.num_layers = num_layers
        self._layer = -1

    def enter(self, layer: int) -> bool:
        """A layer has been routed; returns whether a new pass began with it."""
        is_new = self.passes == 0 or layer <= self._layer
        if is_new:
            self.num_layers = max(self.num_layers, self._layer + 1)
            self.passes += 1
        self._layer = layer
        return is_new

    def ahead(self, horizon: int, *, wraps: bool = True) -> list[int]:
        """The next `horizon` layers, into the next pass if it `wraps`; none twice."""
        first = self._layer + 1
        layers = range(first, first + min(horizon, self.num_layers))
        if not wraps:
            return [layer for layer in layers if layer < self.num_layers]
        return [layer % self.num_layers for layer in layers]


class BySequence(Generic[State]):
    """A state for each sequence, made when it is first met; those not met for `keep` passes are forgotten."""

    def __init__(self, make: Callable[[], State], keep: int = 64) -> None:
        self._make = make
        self._keep = keep
        self._passes = 0
        self._states: dict[int, State] = {}
        self._met: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._states)

    def next_pass(self) -> None:
        """A pass begins."""
        self._passes += 1
        if self._passes % self._keep == 0:
            oldest = self._passes - self._keep
            for sequence in [found for found, met in self._met.items() if met < oldest]:
                del self._states[sequence], self._met[sequence]

    def of(self, sequence: int) -> State:
        """The state of a sequence that takes part in this pass."""
        self._met[sequence] = self._passes
        if sequence not in self._states:
            self._states[sequence] = self._make()
        return self._states[sequence]


def require_reach(name: str, horizon: int, width: int) -> None:
    """Refuse a reach that is none. Raises UsageError."""
    if horizon < 1 or width < 0:
        raise UsageError(f"{name} takes horizon >= 1 and width >= 0, got {horizon}, {width}.")


def distinct(routed: Iterable[Sequence[int]]) -> int:
    """How many experts an event asks for."""
    return len(set().union(*routed))


def ranked(layer: int, scores: Mapping[int, float], most: int = 0) -> list[ExpertKey]:
    """Experts of a layer by score, highest first, ties by number; at most `most` of them (0: all)."""
    order = sorted(scores, key=lambda expert: (-scores[expert], expert))
    return [ExpertKey(layer, expert) for expert in order[: most or None]]

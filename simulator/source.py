"""Where passes come from: a recorded workload, or requests that arrive (serving.py). Both engines ask here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..tracer.types import ExpertKey
from .account import SequenceTimes
from .workload import Workload


class Source(Protocol):
    """Hands out forward passes one by one and is told when each has ended."""

    def next(self, now_s: float) -> tuple[Workload, int] | float | None:
        """The next pass (a workload and its place in it), seconds to wait for one, or None at the end."""
        ...

    def ended(self, now_s: float) -> None:
        """The pass handed out last has ended; its sequences have a token more."""
        ...

    def sequences(self) -> Sequence[SequenceTimes]:
        """When tokens appeared, by sequence."""
        ...

    def events(self) -> Sequence[Sequence[ExpertKey]]:
        """All events to come, for members that know the future. Raises UsageError if nobody can know them."""
        ...


class Recorded:
    """A recorded workload, pass after pass without a pause."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._start_s: list[float] = []
        self._end_s: list[float] = []

    def next(self, now_s: float) -> tuple[Workload, int] | None:
        """The next pass as recorded."""
        place = len(self._start_s)
        if place == len(self.workload.steps):
            return None
        self._start_s.append(now_s)
        return self.workload, place

    def ended(self, now_s: float) -> None:
        """Remember when."""
        self._end_s.append(now_s)

    def sequences(self) -> list[SequenceTimes]:
        """Times from the start of each sequence's first pass."""
        return recorded_times(self.workload, np.asarray(self._start_s), np.asarray(self._end_s))

    def events(self) -> list[tuple[ExpertKey, ...]]:
        """The recorded events."""
        return self.workload.events()


def recorded_times(
    workload: Workload, start_s: np.ndarray, end_s: np.ndarray
) -> list[SequenceTimes]:
    """When tokens appeared, by sequence, from the start of its first pass, or from its arrival if it is a request.

    `start_s`, `end_s`: [passes].
    """
    steps = workload.steps
    place = np.repeat(np.arange(len(steps)), np.diff(steps.member_ptr))
    order = np.argsort(steps.members, kind="stable")
    sequence, place = steps.members[order], place[order]
    if not len(sequence):
        return []
    first = np.flatnonzero(np.concatenate(([True], np.diff(sequence) != 0)))
    begun = place[first]
    if workload.arrived is not None:  # a request may wait, and a long prompt takes several passes
        numbers = [workload.arrived[found] for found in sequence[first].tolist()]
        begun = np.minimum(np.searchsorted(steps.number, numbers), begun)
    times = end_s[place] - np.repeat(start_s[begun], np.diff(np.append(first, len(place))))
    is_request = workload.arrived is not None
    return [
        SequenceTimes(
            number, workload.prompt_tokens.get(number, 0), tuple(token_s.tolist()), is_request
        )
        for number, token_s in zip(
            sequence[first].tolist(), np.split(times, first[1:]), strict=True
        )
    ]


def source_of(source: Workload | Source) -> Source:
    """A workload is replayed as recorded."""
    return Recorded(source) if isinstance(source, Workload) else source

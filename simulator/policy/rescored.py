"""Residents whose ranks all change when an event begins: the lowest goes first.

Between one `begin` and the next, time stands still: a rank changes only by its own admission or demand. So
ranks are computed for all residents when the first victim of an event is asked for, O(n), and kept in a heap
until the next event, O(log n). An event without a victim costs nothing. What comes out is the same as a scan
of all residents for the lowest (rank, tie, key) each time.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Sequence

from ...tracer.types import ExpertKey
from .base import BaseCache, Facts

Resident = tuple[ExpertKey, tuple[int, int]]
Entry = tuple[float, float, ExpertKey]


class Rescored(BaseCache, ABC):
    """Base of such caches; subclasses say how residents rank.

    `now` counts events (calls of `begin`) from 1. A resident comes with (last, count): the event that
    demanded it last, or, until one does, the event begun last when it was admitted (0: none), and 1 for its
    admission plus its demands since.
    """

    def __init__(self) -> None:
        self.now = 0
        self._residents: dict[ExpertKey, tuple[int, int]] = {}
        # An entry counts only while it is what `entries` says of a resident.
        self._heap: list[Entry] | None = None

    @abstractmethod
    def entries(self, residents: Iterable[Resident]) -> list[Entry]:
        """Rank, tie and key of these residents, as things are now."""
        ...

    def begin(self, keys: Sequence[ExpertKey], facts: Facts) -> None:
        """Time moves on, and all ranks with it."""
        self.now += 1
        self._heap = None

    def admit(self, key: ExpertKey) -> None:
        """An admission counts as a demand."""
        self.touch(key)

    def touch(self, key: ExpertKey) -> None:
        """Rank a resident anew."""
        _, count = self._residents.get(key, (0, 0))
        uses = self._residents[key] = self.now, count + 1
        if self._heap is not None:
            heapq.heappush(self._heap, self.entries(((key, uses),))[0])

    def remove(self, key: ExpertKey) -> None:
        """Forget a resident."""
        del self._residents[key]

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        """The key of the lowest entry outside `protected`, or None."""
        if self._heap is None:
            self._heap = self.entries(self._residents.items())
            heapq.heapify(self._heap)
        heap, passed = self._heap, []
        found: ExpertKey | None = None
        while heap:
            key = heap[0][2]
            if key in protected:
                passed.append(heapq.heappop(heap))
                continue
            uses = self._residents.get(key)
            if uses is not None and self.entries(((key, uses),))[0] == heap[0]:
                found = key
                break
            heapq.heappop(heap)
        for entry in passed:
            heapq.heappush(heap, entry)
        return found

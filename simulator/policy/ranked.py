"""Residents ordered by a rank that changes: the lowest goes first. O(log n) per change.

LFU, static popularity and Belady differ in the rank alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Container

from ...tracer.types import ExpertKey

Rank = tuple[float, float]


class Ranked:
    """A heap with lazy deletion: an entry counts only while it is its key's latest rank."""

    def __init__(self) -> None:
        self._ranks: dict[ExpertKey, Rank] = {}
        self._heap: list[tuple[Rank, ExpertKey]] = []

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._ranks

    def __len__(self) -> int:
        return len(self._ranks)

    def put(self, key: ExpertKey, rank: Rank) -> None:
        """Add a key or change its rank."""
        self._ranks[key] = rank
        heapq.heappush(self._heap, (rank, key))
        if len(self._heap) > 64 + 4 * len(self._ranks):
            self._heap = [(rank, key) for key, rank in self._ranks.items()]
            heapq.heapify(self._heap)

    def drop(self, key: ExpertKey) -> None:
        """Forget a key."""
        del self._ranks[key]

    def lowest(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        """The key of lowest rank outside `protected`, or None."""
        passed: list[tuple[Rank, ExpertKey]] = []
        found: ExpertKey | None = None
        while self._heap:
            rank, key = self._heap[0]
            if self._ranks.get(key) != rank:
                heapq.heappop(self._heap)
                continue
            if key not in protected:
                found = key
                break
            passed.append(heapq.heappop(self._heap))
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

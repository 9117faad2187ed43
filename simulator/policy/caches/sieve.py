"""A queue, one bit each, and a hand that spares who was demanded since it last came by."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import BaseCache


class Sieve(BaseCache):
    """SIEVE (Zhang et al., NSDI 2024): experts enter at the newest end, unvisited; a demand sets the bit.

    The hand starts at the oldest and moves towards newer ones, round and round. The victim is the first
    unvisited and unprotected expert it meets; if all unprotected ones are visited, the first unprotected.
    On eviction the hand walks there, clears the bits it passes (all of them, if it had to come round for
    a visited one), and rests on the next newer expert. Demands move nothing, so the order within an event
    does not matter. Amortized O(1), O(n) at worst, passing over protected experts.
    """

    name: ClassVar[str] = "sieve"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def __init__(self) -> None:
        # A ring in order of admission: the newest is followed by the oldest.
        self._newer: dict[ExpertKey, ExpertKey] = {}
        self._older: dict[ExpertKey, ExpertKey] = {}
        self._oldest: ExpertKey | None = None
        self._hand: ExpertKey | None = None
        self._visited: set[ExpertKey] = set()

    def admit(self, key: ExpertKey) -> None:
        oldest = self._oldest
        if oldest is None:
            self._newer[key] = self._older[key] = key
            self._oldest = self._hand = key
            return
        newest = self._older[oldest]
        self._newer[newest], self._older[key] = key, newest
        self._newer[key], self._older[oldest] = oldest, key

    def touch(self, key: ExpertKey) -> None:
        self._visited.add(key)

    def remove(self, key: ExpertKey) -> None:
        if key in self._visited:
            self._visited.clear()
        else:
            for passed in self._from_hand():
                if passed == key:
                    break
                self._visited.discard(passed)
        newer, older = self._newer.pop(key), self._older.pop(key)
        if newer == key:
            self._oldest = self._hand = None
            return
        self._newer[older], self._older[newer] = newer, older
        self._hand = newer
        if key == self._oldest:
            self._oldest = newer

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        second: ExpertKey | None = None
        for key in self._from_hand():
            if key in protected:
                continue
            if key not in self._visited:
                return key
            second = second or key
        return second

    def _from_hand(self) -> Iterator[ExpertKey]:
        """Once round the ring."""
        key = self._hand
        if key is None:
            return
        while True:
            yield key
            key = self._newer[key]
            if key == self._hand:
                return


MEMBER = Sieve

"""Evict what has the lowest product of frequency and recency."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from ..ranks import lfru_rank
from ..rescored import Entry, Rescored, Resident


class LFRU(Rescored):
    """Least frequently and recently used: rank = count / (1 + now − last); the lowest goes first.

    `count` is 1 at admission and grows by each demand of a resident; `last` is the event of its last
    demand or admission and `now` the running event, both counted in events of this pool. Ties: older
    `last`, then key. The best causal cache of arXiv 2608.07911, which prints no formula; this is the
    plain reading of the name. Ranks age, so an event with an eviction costs O(n) of the pool
    (rescored.py).
    """

    name: ClassVar[str] = "lfru"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def entries(self, residents: Iterable[Resident]) -> list[Entry]:
        now = self.now
        return [(lfru_rank(count, now - last), last, key) for key, (last, count) in residents]


MEMBER = LFRU

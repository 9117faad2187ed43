"""Balance recency and frequency by watching who is missed after eviction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from itertools import chain
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import BaseCache, Facts
from ..ranks import arc_target_lowered, arc_target_raised

Keys = OrderedDict[ExpertKey, None]


class ARC(BaseCache):
    """Adaptive replacement cache (Megiddo & Modha, FAST 2003), event-atomic. O(1) per call and expert.

    T1 holds residents demanded once, T2 those demanded again, B1 and B2 the ghosts of what left them; all
    are LRU lists, and p is the size T1 should have. When an event begins, each of its experts found in a
    ghost list moves p, by ascending number: p = min(c, p + max(1, |B2|/|B1|)) for B1, p = max(0, p −
    max(1, |B1|/|B2|)) for B2; the lists stand still meanwhile. Admission is to T2 for who was a ghost
    when the event began or is one now, else to T1, and drops the oldest ghosts so that |T1| + |B1| ≤ c
    and all four ≤ 2c. The victim is the oldest of T1 if |T1| > p, else of T2; the other list where all of
    one are protected. When the event is over, its hits move, by ascending number, to the most recent
    place of T2.
    """

    name: ClassVar[str] = "arc"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def __init__(self) -> None:
        self._target = 0.0  # p
        self._once: Keys = OrderedDict()  # T1
        self._again: Keys = OrderedDict()  # T2
        self._once_ghosts: Keys = OrderedDict()  # B1
        self._again_ghosts: Keys = OrderedDict()  # B2
        self._returning: set[ExpertKey] = set()
        self._hits: set[ExpertKey] = set()

    def begin(self, keys: Sequence[ExpertKey], facts: Facts) -> None:
        self._returning.clear()
        recent, frequent = len(self._once_ghosts), len(self._again_ghosts)
        for key in keys:
            if key in self._once_ghosts:
                self._target = arc_target_raised(self._target, self.slots, recent, frequent)
            elif key in self._again_ghosts:
                self._target = arc_target_lowered(self._target, recent, frequent)
            else:
                continue
            # Evictions of this event may push the ghost out before its turn to be admitted.
            self._returning.add(key)

    def admit(self, key: ExpertKey) -> None:
        was_ghost = key in self._once_ghosts or key in self._again_ghosts
        self._once_ghosts.pop(key, None)
        self._again_ghosts.pop(key, None)
        target = self._again if was_ghost or key in self._returning else self._once
        target[key] = None
        self._trim()

    def touch(self, key: ExpertKey) -> None:
        self._hits.add(key)

    def remove(self, key: ExpertKey) -> None:
        self._hits.discard(key)
        if key in self._once:
            del self._once[key]
            self._once_ghosts[key] = None
        else:
            del self._again[key]
            self._again_ghosts[key] = None

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        lists = (self._once, self._again)
        if len(self._once) <= self._target:
            lists = (self._again, self._once)
        return next((key for key in chain(*lists) if key not in protected), None)

    def released(self, keys: Sequence[ExpertKey]) -> Iterable[ExpertKey]:
        for key in keys:
            if key in self._hits:
                self._once.pop(key, None)
                self._again[key] = None
                self._again.move_to_end(key)
        self._hits.clear()
        return ()

    def _trim(self) -> None:
        once, ghosts = self._once, self._once_ghosts
        while ghosts and len(once) + len(ghosts) > self.slots:
            ghosts.popitem(last=False)
        residents = len(once) + len(self._again)
        while residents + len(ghosts) + len(self._again_ghosts) > 2 * self.slots:
            (self._again_ghosts or ghosts).popitem(last=False)


MEMBER = ARC

"""Evict what was demanded least often since it was loaded."""

from __future__ import annotations

from collections.abc import Container
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import BaseCache
from ..ranked import Ranked


class LFU(BaseCache):
    """Least frequently used: counts start at admission; ties evict the least recently used."""

    name: ClassVar[str] = "lfu"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def __init__(self) -> None:
        self._counts: dict[ExpertKey, int] = {}
        self._ranked = Ranked()
        self._ticks = 0

    def admit(self, key: ExpertKey) -> None:
        self._counts[key] = 0
        self.touch(key)

    def touch(self, key: ExpertKey) -> None:
        self._ticks += 1
        self._counts[key] += 1
        self._ranked.put(key, (self._counts[key], self._ticks))

    def remove(self, key: ExpertKey) -> None:
        del self._counts[key]
        self._ranked.drop(key)

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        return self._ranked.lowest(protected)


MEMBER = LFU

"""Evict what was demanded longest ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey


class LRU:
    """Least recently used, event-atomic: the experts of one event are touched together."""

    name: ClassVar[str] = "lru"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def admit(self, key: ExpertKey) -> None:
        self._order[key] = None

    def touch(self, key: ExpertKey) -> None:
        self._order.move_to_end(key)

    def remove(self, key: ExpertKey) -> None:
        del self._order[key]

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        return next((key for key in self._order if key not in protected), None)

    def released(self, keys: Sequence[ExpertKey]) -> Iterable[ExpertKey]:
        return ()

    def warm(self, keys: Iterable[ExpertKey], slots: int) -> Sequence[ExpertKey]:
        return ()


MEMBER = LRU

"""Evict what was demanded longest ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import BaseCache


class LRU(BaseCache):
    """Least recently used, event-atomic: the experts of one event are equally recent, ties go by number.

    The order therefore does not depend on which of them hit, so a larger cache always holds what a smaller one
    holds (the stack property; curves.py measures all sizes in one pass).
    """

    name: ClassVar[str] = "lru"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def admit(self, key: ExpertKey) -> None:
        self._order[key] = None

    def remove(self, key: ExpertKey) -> None:
        del self._order[key]

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        return next((key for key in self._order if key not in protected), None)

    def released(self, keys: Sequence[ExpertKey]) -> Iterable[ExpertKey]:
        # Until now the event's experts were pinned, so only the order they are left in matters.
        for key in keys:
            if key in self._order:
                self._order.move_to_end(key)
        return ()


MEMBER = LRU

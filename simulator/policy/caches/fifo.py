"""Evict what was admitted first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import BaseCache


class FIFO(BaseCache):
    """First in, first out: the order of admission, which demands do not change. The simplest baseline.

    The experts of one event come in as the core loads them: late prefetches, then misses, each by number.
    O(1) per call, passing over protected experts.
    """

    name: ClassVar[str] = "fifo"
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


MEMBER = FIFO

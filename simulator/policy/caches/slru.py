"""Two LRU segments: only what was demanded again while resident is protected from newcomers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from itertools import chain
from typing import ClassVar

from ....tracer.errors import UsageError
from ....tracer.types import ExpertKey
from ..base import BaseCache
from ..ranks import protected_slots


class SLRU(BaseCache):
    """Segmented LRU (Karedla et al., 1994), event-atomic. O(1) per call, passing over protected experts.

    Admission is to the most recent place of probation. When an event is over, those of its experts that
    were hits move, by ascending number, to the most recent place of the protected segment; what overflows
    it goes, least recent first, to the most recent place of probation. That segment has int(protected ×
    slots) places. The victim is the least recent of probation, then of the protected segment.
    """

    name: ClassVar[str] = "slru"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def __init__(self, protected: float = 0.8) -> None:
        if not 0 <= protected <= 1:
            raise UsageError(f"cache 'slru' takes 0 <= protected <= 1, got {protected}.")
        self._share = protected
        self._places = 0
        self._probation: OrderedDict[ExpertKey, None] = OrderedDict()
        self._protected: OrderedDict[ExpertKey, None] = OrderedDict()
        self._hits: set[ExpertKey] = set()

    def size(self, slots: int) -> None:
        super().size(slots)
        self._places = protected_slots(self._share, slots)

    def admit(self, key: ExpertKey) -> None:
        self._probation[key] = None

    def touch(self, key: ExpertKey) -> None:
        self._hits.add(key)

    def remove(self, key: ExpertKey) -> None:
        self._hits.discard(key)
        segment = self._probation if key in self._probation else self._protected
        del segment[key]

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        order = chain(self._probation, self._protected)
        return next((key for key in order if key not in protected), None)

    def released(self, keys: Sequence[ExpertKey]) -> Iterable[ExpertKey]:
        for key in keys:
            if key not in self._hits:
                continue
            self._probation.pop(key, None)
            self._protected[key] = None
            self._protected.move_to_end(key)
            while len(self._protected) > self._places:
                demoted, _ = self._protected.popitem(last=False)
                self._probation[demoted] = None
        self._hits.clear()
        return ()


MEMBER = SLRU

"""Evict what will be demanded last, but admit every miss: what clairvoyant eviction alone can save."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import BaseCache, FutureView
from ..future import NEVER
from ..ranked import Ranked


class BeladyForcedAdmit(BaseCache):
    """Knows the future, but every miss takes a slot, as in the runtime (arXiv 2608.07911, section 7)."""

    name: ClassVar[str] = "belady_forced"
    needs: ClassVar[frozenset[str]] = frozenset({"future"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, future: FutureView) -> None:
        self._future = future
        self.ranked = Ranked()

    def admit(self, key: ExpertKey) -> None:
        self.touch(key)

    def touch(self, key: ExpertKey) -> None:
        # The next use changes only when the key is used, so the rank is good until then.
        self.ranked.put(key, (-float(self._future.next_use(key)), 0.0))

    def remove(self, key: ExpertKey) -> None:
        self.ranked.drop(key)

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        return self.ranked.lowest(protected)

    def warm(self, keys: Iterable[ExpertKey], slots: int) -> Sequence[ExpertKey]:
        # Placements start filled, so the bound does too: with what is needed first.
        used = [key for key in keys if self._future.next_use(key) < NEVER]
        return sorted(used, key=self._future.next_use)[:slots]


MEMBER = BeladyForcedAdmit

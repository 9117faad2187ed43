"""Evict what will be demanded last: the bound no cache without prefetch can beat (Belady, 1966)."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import FutureView
from ..future import NEVER
from ..ranked import Ranked


class Belady:
    """The clairvoyant cache. Every miss is admitted, as the runtime must."""

    name: ClassVar[str] = "belady"
    needs: ClassVar[frozenset[str]] = frozenset({"future"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, future: FutureView) -> None:
        self._future = future
        self._ranked = Ranked()

    def admit(self, key: ExpertKey) -> None:
        self.touch(key)

    def touch(self, key: ExpertKey) -> None:
        # The next use changes only when the key is used, so the rank is good until then.
        self._ranked.put(key, (-float(self._future.next_use(key)), 0.0))

    def remove(self, key: ExpertKey) -> None:
        self._ranked.drop(key)

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        return self._ranked.lowest(protected)

    def released(self, keys: Sequence[ExpertKey]) -> Iterable[ExpertKey]:
        return ()

    def warm(self, keys: Iterable[ExpertKey], slots: int) -> Sequence[ExpertKey]:
        # Placements start filled, so the bound does too: with what is needed first.
        used = [key for key in keys if self._future.next_use(key) < NEVER]
        return sorted(used, key=self._future.next_use)[:slots]


MEMBER = Belady

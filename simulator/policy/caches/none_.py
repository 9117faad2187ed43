"""Keep nothing between events: every expert is loaded when demanded."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import BaseCache


class NoCache(BaseCache):
    """On-demand loading, the baseline every cache is compared with."""

    name: ClassVar[str] = "none"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def __init__(self) -> None:
        self._resident: dict[ExpertKey, None] = {}

    def admit(self, key: ExpertKey) -> None:
        self._resident[key] = None

    def remove(self, key: ExpertKey) -> None:
        del self._resident[key]

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        return next((key for key in self._resident if key not in protected), None)

    def released(self, keys: Sequence[ExpertKey]) -> Iterable[ExpertKey]:
        return keys


MEMBER = NoCache

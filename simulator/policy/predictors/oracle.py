"""Prefetch exactly what comes next: what a perfect predictor could save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import FutureView, Signals


class Oracle:
    """Knows the next `horizon` layer events. A bound: the link's speed still counts."""

    name: ClassVar[str] = "oracle"
    needs: ClassVar[frozenset[str]] = frozenset({"future"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, future: FutureView, horizon: int = 1) -> None:
        self._future = future
        self._horizon = horizon

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        return [key for event in self._future.upcoming(self._horizon) for key in event]


MEMBER = Oracle

"""Predict nothing: demand loads only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import Signals


class NoPredictor:
    """No prefetch."""

    name: ClassVar[str] = "none"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        return ()


MEMBER = NoPredictor

"""Prefetch what is always popular."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..ahead import Walk, ranked, require_reach
from ..base import Signals


class Popular:
    """The `width` most popular experts of the next `horizon` layers, whatever was routed; counted in a trace. O(1).

    What a predictor has to beat that looks at its input: the others are right by popularity too.
    """

    name: ClassVar[str] = "popular"
    needs: ClassVar[frozenset[str]] = frozenset({"popularity"})
    is_lossless: ClassVar[bool] = True

    def __init__(
        self, popularity: Sequence[Sequence[int]], horizon: int = 1, width: int = 4
    ) -> None:
        require_reach(self.name, horizon, width)
        self.horizon = horizon
        self._walk = Walk(len(popularity))
        self._best = [
            ranked(layer, {e: count for e, count in enumerate(counts) if count}, width)
            for layer, counts in enumerate(popularity)
        ]

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        self._walk.enter(layer)
        return [key for target in self._walk.ahead(self.horizon) for key in self._best[target]]


MEMBER = Popular

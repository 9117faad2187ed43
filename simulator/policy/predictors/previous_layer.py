"""The next layer uses the numbers this one used (the baseline SLP of He et al., arXiv 2410.17954)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..ahead import Walk, ranked, require_reach
from ..base import Signals


class PreviousLayer:
    """Experts with the same numbers as this layer's, in the next `horizon` layers, by tokens; `width` limits them.

    A floor for other predictors: numbers mean nothing across layers. `width` 0 names all of them. Nothing past the last
    layer, and nothing in the first pass, which tells how many layers there are. O(tokens × top-k).
    """

    name: ClassVar[str] = "previous_layer"
    needs: ClassVar[frozenset[str]] = frozenset({"routing"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, horizon: int = 1, width: int = 0) -> None:
        require_reach(self.name, horizon, width)
        self.horizon = horizon
        self.width = width
        self._walk = Walk()

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        self._walk.enter(layer)
        votes = Counter(chain.from_iterable(signals.routed))
        return [
            key
            for target in self._walk.ahead(self.horizon, wraps=False)
            for key in ranked(target, votes, self.width)
        ]


MEMBER = PreviousLayer

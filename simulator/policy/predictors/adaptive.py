"""Look-ahead by gates, as many layers as the link needs (after ExpertFlow by Shen et al., arXiv 2510.26730)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import ClassVar

from ....tracer.errors import UsageError
from ....tracer.types import ExpertKey
from ..base import Outcome, Signals
from ..stride import Stride, enough


class Adaptive:
    """Gate look-ahead over S layers; S follows from copy and layer times, and from stalls and fetches in vain.

    Per layer it names the experts with the most votes until they hold the share `covered` of all votes; how many those
    are in the next layer is the N of S (policy.stride). The paper accumulates gate probabilities; here are votes, which
    is what a trace and the runtime both know. It was read from secondary accounts (docs/adr/0011), and `covered`,
    `raise_at` and `lower_at` are our own. `layer_times` is measured or declared, never a constant.
    """

    name: ClassVar[str] = "adaptive"
    needs: ClassVar[frozenset[str]] = frozenset({"lookahead", "layer_times"})
    is_lossless: ClassVar[bool] = True
    depth_param: ClassVar[str] = "most"

    def __init__(
        self,
        layer_times: Mapping[str, float],
        most: int = 3,
        covered: float = 0.9,
        raise_at: int = 32,
        lower_at: int = 32,
    ) -> None:
        if not 0.0 < covered <= 1.0:
            raise UsageError(f"{self.name} takes 0 < covered <= 1, got {covered}.")
        self.covered = covered
        self.stride = Stride(layer_times, most, raise_at, lower_at)

    def hear(self, layer: int, outcome: Outcome) -> None:
        self.stride.hear(layer, outcome)

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        nearest = self._named(layer, 1, signals)
        tokens = len(signals.lookahead.get(1, ()))
        if not tokens:
            return ()
        keys = nearest
        for ahead in range(2, self.stride.layers(layer, len(nearest), tokens) + 1):
            keys += self._named(layer, ahead, signals)
        return keys

    def _named(self, layer: int, ahead: int, signals: Signals) -> list[ExpertKey]:
        scores = self._scores(layer, ahead, signals)
        return [ExpertKey(layer + ahead, expert) for expert in enough(scores, self.covered)]

    def _scores(self, layer: int, ahead: int, signals: Signals) -> Mapping[int, float]:
        return Counter(chain.from_iterable(signals.lookahead.get(ahead, ())))


MEMBER = Adaptive

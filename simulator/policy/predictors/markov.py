"""Which experts follow which from layer to layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..ahead import Walk, ranked, require_reach
from ..base import Signals
from ..tables import unpacked_pairs


class Markov:
    """Experts of the next layer that most often follow the experts chosen in this one, up to `width` of them.

    A chain of first order between layers, counted in a trace; after the last layer comes the first one of the next
    token. Each chosen expert gives its followers their share of its tokens, tokens add up, and a `horizon` above 1
    follows the followers. `width` 0 names as many experts as this layer asked for. O(tokens × top-k + experts ×
    followers).

    `transitions[layer]` (simulator.lessons) holds by expert its followers in the next layer, each with its share in
    thousandths.
    """

    name: ClassVar[str] = "markov"
    needs: ClassVar[frozenset[str]] = frozenset({"routing", "transitions"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, transitions: Sequence[str], horizon: int = 1, width: int = 0) -> None:
        require_reach(self.name, horizon, width)
        self.horizon = horizon
        self.width = width
        self._followers = [unpacked_pairs(text) for text in transitions]
        self._walk = Walk(len(transitions))

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        self._walk.enter(layer)
        expected: dict[int, int] = Counter(chain.from_iterable(signals.routed))
        width = self.width or len(expected)
        keys: list[ExpertKey] = []
        for target in self._walk.ahead(self.horizon) if expected else ():
            followers = self._followers[target - 1]  # layer 0 follows the last one
            scores: dict[int, int] = {}
            for expert, tokens in expected.items():
                for follower, share in followers[expert]:
                    scores[follower] = scores.get(follower, 0) + tokens * share
            keys += ranked(target, scores, width)
            expected = scores
        return keys


MEMBER = Markov

"""Evict the expert whose gate weights have been lowest of late."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from ....tracer.errors import UsageError
from ....tracer.types import ExpertKey
from ..base import Facts
from ..rescored import Entry, Rescored, Resident


class Score(Rescored):
    """A moving average of gate weights, as in HybriMoE (arXiv 2504.05897): the lowest goes first.

    At each event of a layer, every expert of that layer, resident or not, gets score = (1 − alpha) ×
    score + alpha × weight; `weight` is the sum of its gate weights in the event, 0 for those not chosen,
    1 each if the weights are not known. Scores start at 0 and outlive eviction. Ties: older last demand
    or admission, then key. HybriMoE averages the router's top 2k probabilities; a trace records the
    weights of the routed experts alone, so this sees the top k. O(experts of the layer) per event, and
    O(n) of the pool for one with an eviction (rescored.py).
    """

    name: ClassVar[str] = "score"
    needs: ClassVar[frozenset[str]] = frozenset({"gate_weights"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, alpha: float = 0.3) -> None:
        if not 0 < alpha <= 1:
            raise UsageError(f"cache 'score' takes 0 < alpha <= 1, got {alpha}.")
        super().__init__()
        self._alpha = alpha
        self._scores: dict[int, list[float]] = {}  # by layer and expert

    def begin(self, keys: Sequence[ExpertKey], facts: Facts) -> None:
        super().begin(keys, facts)
        self._make_room(keys[-1])
        kept = 1.0 - self._alpha
        scores = [kept * score for score in self._scores[keys[0].layer]]
        for key, weight in zip(keys, facts.weights or [1.0] * len(keys), strict=True):
            scores[key.expert] += self._alpha * weight
        self._scores[keys[0].layer] = scores

    def admit(self, key: ExpertKey) -> None:
        self._make_room(key)
        super().admit(key)

    def entries(self, residents: Iterable[Resident]) -> list[Entry]:
        scores = self._scores
        return [(scores[key[0]][key[1]], last, key) for key, (last, _) in residents]

    def _make_room(self, key: ExpertKey) -> None:
        scores = self._scores.setdefault(key.layer, [])
        scores += [0.0] * (key.expert + 1 - len(scores))


MEMBER = Score

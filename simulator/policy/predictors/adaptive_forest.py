"""The adaptive look-ahead with a cross-layer correction (after ExpertFlow by Shen et al., arXiv 2510.26730)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ....tracer.types import ExpertKey
from ..base import Signals
from ..clues import FEATURES, MOST_TOKENS, Clues
from ..forest import Forest
from .adaptive import Adaptive


class AdaptiveForest(Adaptive):
    """`adaptive`, with what early gates say corrected by a regression forest learned from a trace.

    Score = share of the tokens whose look-ahead names the expert + what the forest expects it to be off by, at most 1;
    experts that no gate named can be scored too (policy.clues). Scores stand in for votes: those that hold the share
    `covered` are named. Events of many tokens, such as prompts, follow the votes alone. The features and the forest's
    size are our own; no source gives them (docs/adr/0011).

    `forest`, `transitions` and `popularity` are learned from a trace (simulator.lessons); training needs scikit-learn,
    running does not.
    """

    name: ClassVar[str] = "adaptive_forest"
    needs: ClassVar[frozenset[str]] = frozenset(
        {"lookahead", "layer_times", "routing", "popularity", "transitions", "forest"}
    )

    def __init__(
        self,
        layer_times: Mapping[str, float],
        forest: Mapping[str, Any],
        transitions: Sequence[str],
        popularity: Sequence[Sequence[int]],
        most: int = 3,
        covered: float = 0.7,
        raise_at: int = 32,
        lower_at: int = 32,
    ) -> None:
        super().__init__(layer_times, most, covered, raise_at, lower_at)
        self._forest = Forest(forest, FEATURES)
        self._clues = Clues(popularity, transitions)

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        self._clues.enter(layer, signals)
        return super().predict(layer, signals)

    def _scores(self, layer: int, ahead: int, signals: Signals) -> Mapping[int, float]:
        if len(signals.lookahead.get(ahead, ())) > MOST_TOKENS:
            return super()._scores(layer, ahead, signals)
        return {
            expert: min(score, 1.0)
            for expert, clues in self._clues.of(ahead).items()
            if (score := clues[0] / 1000 + self._forest(clues)) > 0.0
        }


MEMBER = AdaptiveForest

"""A word has its experts: what a token's id alone says about its way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..ahead import Walk, distinct, ranked, require_reach
from ..base import Signals
from ..tables import unpacked

_ANY = -1
"""The row of tokens that were never seen."""


class TokenTable:
    """Experts most often used by these token ids in the next `horizon` layers, up to `width` of them.

    The table of a trace, as many works before a predictor is trained (SiDA, arXiv 2310.18859, hashes embeddings to
    experts). Ids that the table lacks count as the average token. Of several tokens each gives its experts points by
    place. `width` 0 names as many experts as this layer asked for. Nothing past the last layer: the next token is not
    known. O(tokens + distinct ids × experts by row).

    `token_table` (simulator.lessons) maps ids to experts by layer, most used first.
    """

    name: ClassVar[str] = "token_table"
    needs: ClassVar[frozenset[str]] = frozenset({"routing", "token_table"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, token_table: Mapping[str, str], horizon: int = 1, width: int = 0) -> None:
        require_reach(self.name, horizon, width)
        self.horizon = horizon
        self.width = width
        self._rows = {int(token): unpacked(text) for token, text in token_table.items()}
        self._any = self._rows[_ANY]
        self._walk = Walk(len(self._any))

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        self._walk.enter(layer)
        tokens = Counter(signals.tokens)
        width = self.width or distinct(signals.routed)
        keys: list[ExpertKey] = []
        for target in self._walk.ahead(self.horizon, wraps=False):
            points: dict[int, int] = {}
            for token, count in tokens.items():
                experts = self._rows.get(token, self._any)[target]
                for place, expert in enumerate(experts):
                    points[expert] = points.get(expert, 0) + count * (len(experts) - place)
            keys += ranked(target, points, width)
        return keys


MEMBER = TokenTable

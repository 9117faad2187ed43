"""The tokens that went like this one so far (after FineMoE, arXiv 2502.05370)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import ClassVar

from ....tracer.errors import UsageError
from ....tracer.types import ExpertKey
from ..ahead import BySequence, Walk, require_reach
from ..base import Signals
from ..tables import unpacked


@dataclass(slots=True)
class _Path:
    """How much of the way of a sequence's last token each known map shares, and in which pass that was."""

    begun: int
    shared: list[int]


class MapSearch:
    """Experts of the learned token paths nearest to each running token's, until `delta` of their votes is covered.

    A map is the way of one token of a trace through all layers. The `nearest` maps by cosine over the layers routed so
    far in this pass vote for the experts of the next `horizon` layers with that cosine; each token fetches the best
    until their share reaches `delta`, at most `width` per layer (0: no such limit). Of a prompt the last token is
    searched, so prompts are hardly helped; nothing past the last layer.

    The paper's maps are full gate probabilities, and a prompt's embedding finds the maps for its first layers; here are
    the chosen experts alone, which is less. O(top-k × maps with that expert + maps) by sequence.

    `maps` (simulator.lessons) are token paths: experts by layer.
    """

    name: ClassVar[str] = "map_search"
    needs: ClassVar[frozenset[str]] = frozenset({"routing", "maps"})
    is_lossless: ClassVar[bool] = True

    def __init__(
        self,
        maps: Sequence[str],
        horizon: int = 1,
        width: int = 0,
        delta: float = 0.7,
        nearest: int = 16,
    ) -> None:
        require_reach(self.name, horizon, width)
        if not 0.0 < delta <= 1.0 or nearest < 1:
            raise UsageError(
                f"map_search takes 0 < delta <= 1 and nearest >= 1, got {delta}, {nearest}."
            )
        self.horizon = horizon
        self.width = width
        self.delta = delta
        self.nearest = nearest
        self._maps = [unpacked(text) for text in maps]
        self._holders: dict[ExpertKey, list[int]] = {}
        for number, path in enumerate(self._maps):
            for layer, experts in enumerate(path):
                for expert in experts:
                    self._holders.setdefault(ExpertKey(layer, expert), []).append(number)
        self._walk = Walk(len(self._maps[0]))
        self._paths: BySequence[_Path] = BySequence(lambda: _Path(0, []))

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        if self._walk.enter(layer):
            self._paths.next_pass()
        # The last row of a sequence is its last token.
        last = dict(zip(signals.sequences, signals.routed, strict=False))
        targets = self._walk.ahead(self.horizon, wraps=False)
        found: list[dict[int, int]] = [{} for _ in targets]
        for sequence, experts in last.items():
            shared = self._follow(self._paths.of(sequence), layer, experts)
            best = nlargest(self.nearest, range(len(shared)), key=shared.__getitem__)
            for target, votes in zip(targets, found, strict=True):
                self._vote(target, best, shared, votes)
        return [
            ExpertKey(target, expert)
            for target, votes in zip(targets, found, strict=True)
            for expert in sorted(votes, key=lambda e, votes=votes: (-votes[e], e))[
                : self.width or None
            ]
        ]

    def _follow(self, path: _Path, layer: int, experts: Sequence[int]) -> list[int]:
        """One layer more of the token's way. All maps are as long, so shared experts rank as their cosine does."""
        if path.begun != self._walk.passes:
            path.begun, path.shared = self._walk.passes, [0] * len(self._maps)
        shared = path.shared
        for expert in experts:
            for number in self._holders.get(ExpertKey(layer, expert), ()):
                shared[number] += 1
        return shared

    def _vote(
        self, target: int, best: Sequence[int], shared: Sequence[int], votes: dict[int, int]
    ) -> None:
        """Add one token's experts of a layer to those of the others: the best until delta is covered."""
        own: dict[int, int] = {}
        for number in best:
            for expert in self._maps[number][target]:
                own[expert] = own.get(expert, 0) + shared[number]
        wanted = self.delta * sum(own.values())
        covered = 0
        for expert in sorted(own, key=lambda e: (-own[e], e)):
            if covered >= wanted:
                break
            covered += own[expert]
            votes[expert] = votes.get(expert, 0) + own[expert]


MEMBER = MapSearch

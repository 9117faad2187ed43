"""What is known of an expert of a later layer when a layer is routed: whole numbers, the features of a forest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain

from .ahead import BySequence, Walk
from .base import Signals
from .tables import unpacked_pairs

FEATURES = (
    "votes", "rank", "said_before", "previous", "follows", "popularity", "ahead", "layer", "tokens",
)  # fmt: skip
MOST_TOKENS = 16
"""Larger events are told apart by their votes; nothing more is worked out for them."""
_COARSE = 64
"""Shares that vary finely are kept in so many thousandths, so that the same features come again and again."""
_FOLLOWERS = 8
"""Likeliest followers that are looked at, of those a table holds."""


class Clues:
    """Features by expert, in the order of FEATURES; shares in thousandths.

    votes: tokens whose look-ahead names it; rank: the same, by place among a token's k (first 1, last 1/k), where gates
    list their choice best first; said_before: votes it had for this layer one layer ago; previous: sequences whose
    last token used it; follows: by the transitions of a trace from what was routed just now; popularity in a trace, of
    the layer's most popular; ahead: layers from here; layer: its own; tokens: how many vote. O(tokens × k × followers)
    by layer ahead, for at most MOST_TOKENS tokens.
    """

    def __init__(self, popularity: Sequence[Sequence[int]], transitions: Sequence[str]) -> None:
        self._popularity = [_of_most(row) for row in popularity]
        self._followers = [
            [pairs[:_FOLLOWERS] for pairs in unpacked_pairs(text)] for text in transitions
        ]
        self._walk = Walk(len(transitions))
        self._used: BySequence[dict[int, Sequence[int]]] = BySequence(dict)
        self._states: list[dict[int, Sequence[int]]] = []
        self._signals = Signals({})
        self._layer = 0
        self._reached: list[Mapping[int, int]] = []
        self._votes: dict[int, Counter[int]] = {}
        self._votes_before: dict[int, Counter[int]] = {}

    def enter(self, layer: int, signals: Signals) -> None:
        """A layer has been routed."""
        if self._walk.enter(layer):
            self._used.next_pass()
            self._votes = {}
        # The last row of a sequence is its last token.
        last = dict(zip(signals.sequences, signals.routed, strict=False))
        self._states = [self._used.of(sequence) for sequence in last]
        for state, chosen in zip(self._states, last.values(), strict=True):
            state[layer] = chosen
        self._layer, self._signals = layer, signals
        self._reached = [Counter(chain.from_iterable(signals.routed))]
        self._votes_before = self._votes
        self._votes = {
            layer + ahead: Counter(chain.from_iterable(groups))
            for ahead, groups in signals.lookahead.items()
        }

    def of(self, ahead: int) -> dict[int, tuple[int, ...]]:
        """Features of the experts of the layer so far ahead that anything speaks for; none of large events."""
        groups = self._signals.lookahead.get(ahead, ())
        target, tokens = self._layer + ahead, len(groups)
        if not 0 < tokens <= MOST_TOKENS or target >= self._walk.num_layers:
            return {}
        votes, before = self._votes[target], self._votes_before.get(target, {})
        ranks: Counter[int] = Counter()
        for group in groups:
            for place, expert in enumerate(group):
                ranks[expert] += 1000 * (len(group) - place) // len(group)
        previous = Counter(chain.from_iterable(state.get(target, ()) for state in self._states))
        follows = self._follows(target)
        sequences, popularity = max(1, len(self._states)), self._popularity[target]
        share = max(1, sum(follows.values()) // max(1, len(groups[0])))
        return {
            expert: (
                1000 * votes[expert] // tokens,
                ranks[expert] // tokens,
                1000 * before.get(expert, 0) // tokens,
                1000 * previous[expert] // sequences,
                _coarse(1000 * follows.get(expert, 0) // share),
                popularity[expert],
                ahead,
                target,
                tokens,
            )
            for expert in sorted({*votes, *previous, *follows})
        }

    def _follows(self, target: int) -> Mapping[int, int]:
        """Experts that most often follow, from layer to layer; as many as were asked for."""
        while len(self._reached) <= target - self._layer:
            rows = self._followers[self._layer + len(self._reached) - 1]
            scores: dict[int, int] = {}
            for expert, weight in self._reached[-1].items():
                for follower, share in rows[expert]:
                    scores[follower] = scores.get(follower, 0) + weight * share
            best = sorted(scores, key=lambda e, scores=scores: (-scores[e], e))
            kept = best[: max(1, len(self._reached[0]))]
            self._reached.append({expert: scores[expert] for expert in kept})
        return self._reached[target - self._layer]


def _of_most(counts: Sequence[int]) -> list[int]:
    most = max(1, max(counts))
    return [_coarse(1000 * count // most) for count in counts]


def _coarse(share: int) -> int:
    return min(share, 1000) // _COARSE * _COARSE

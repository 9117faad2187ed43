"""The sequence that went like this one so far (MoE-Infinity, arXiv 2401.14361)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import sqrt
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..ahead import BySequence, Walk, require_reach
from ..base import Signals
from ..tables import unpacked_pairs


@dataclass(slots=True)
class _Running:
    """A sequence's activation matrix so far: its counts, its squared length, its product with each known matrix."""

    counts: dict[ExpertKey, int]
    square: int
    products: list[int]


class ActivationMatch:
    """Experts of the learned sequence that is most like each running one: share × (1 − layers ahead / layers).

    A sequence's activation matrix counts its tokens by layer and expert, prompt included; the nearest by cosine of a
    collection learned from a trace (at most 64 matrices here, thousands in the paper) says what comes in the next
    `horizon` layers, into the next pass. Several sequences add up. `width` limits the experts per layer; 0 names as
    many as this layer asked for. The paper ranks all later layers and evicts by the same priority; here the cache
    decides who goes. Products are kept up to date: O(matrices) by token and expert, and by sequence.

    `activations` (simulator.lessons) holds matrices: by layer the experts, each with its share of the tokens in
    thousandths.
    """

    name: ClassVar[str] = "activation_match"
    needs: ClassVar[frozenset[str]] = frozenset({"routing", "activations"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, activations: Sequence[str], horizon: int = 2, width: int = 0) -> None:
        require_reach(self.name, horizon, width)
        self.horizon = horizon
        self.width = width
        self._known = [unpacked_pairs(text) for text in activations]
        self._lengths = [
            sqrt(sum(share * share for row in matrix for _, share in row)) or 1.0
            for matrix in self._known
        ]
        self._columns: dict[ExpertKey, list[tuple[int, int]]] = {}
        for number, matrix in enumerate(self._known):
            for layer, row in enumerate(matrix):
                for expert, share in row:
                    self._columns.setdefault(ExpertKey(layer, expert), []).append((number, share))
        self._walk = Walk(len(self._known[0]))
        self._running: BySequence[_Running] = BySequence(
            lambda: _Running({}, 0, [0] * len(self._known))
        )

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        if self._walk.enter(layer):
            self._running.next_pass()
        chosen: dict[int, list[Sequence[int]]] = {}
        for sequence, experts in zip(signals.sequences, signals.routed, strict=False):
            chosen.setdefault(sequence, []).append(experts)
        matches: Counter[int] = Counter()
        asked: set[int] = set()
        for sequence, rows in chosen.items():
            running = self._running.of(sequence)
            counts = Counter(chain.from_iterable(rows))
            self._add(running, layer, counts)
            matches[self._nearest(running)] += 1
            asked |= counts.keys()
        return self._named(matches, self.width or len(asked))

    def _add(self, running: _Running, layer: int, counts: Counter[int]) -> None:
        products = running.products
        for expert, count in counts.items():
            key = ExpertKey(layer, expert)
            before = running.counts.get(key, 0)
            running.counts[key] = before + count
            running.square += count * (2 * before + count)
            for number, share in self._columns.get(key, ()):
                products[number] += count * share

    def _nearest(self, running: _Running) -> int:
        # Its own length is the same for all.
        likeness = [p / n for p, n in zip(running.products, self._lengths, strict=True)]
        return likeness.index(max(likeness))

    def _named(self, matches: Counter[int], width: int) -> list[ExpertKey]:
        found: list[tuple[float, int, ExpertKey]] = []
        for ahead, target in enumerate(self._walk.ahead(self.horizon) if matches else (), 1):
            shares: dict[int, int] = {}
            for number, sequences in matches.items():
                for expert, share in self._known[number][target]:
                    shares[expert] = shares.get(expert, 0) + sequences * share
            nearness = 1.0 - ahead / self._walk.num_layers
            best = sorted(shares, key=lambda expert, shares=shares: (-shares[expert], expert))
            found += [(-shares[e] * nearness, ahead, ExpertKey(target, e)) for e in best[:width]]
        return [key for _, _, key in sorted(found)]


MEMBER = ActivationMatch

"""Evict by a weighted sum of recency, frequency and distance to the layer's next turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import Facts
from ..ranks import multi_factor_rank, nearness
from ..rescored import Entry, Rescored, Resident


class MultiFactor(Rescored):
    """HOBBIT's cache (arXiv 2411.01433) without its low-precision part; the lowest rank goes first.

    rank = (w_recency × last + w_frequency × count) / now + w_distance × (1 − d/L), ties by key. `now`
    numbers the running event, `last` is the number of the event that demanded the expert last (0: none)
    and `count` how many did, whether it was resident or not. All three start again when a pass over
    prompts starts, as HOBBIT's do per sequence: at a prefill event of a layer not beyond the last
    event's. L counts the distinct layers seen so far in this pool, d = (layer − current layer) mod L how
    many layers ahead the expert is, with L for 0. HOBBIT's weights are not in our sources: 1/3 each by
    default. LHU, its fourth factor, ranks uses in high precision, and there is no other precision here.
    O(n) of the pool for an event with an eviction (rescored.py).
    """

    name: ClassVar[str] = "multi_factor"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def __init__(
        self, w_recency: float = 1 / 3, w_frequency: float = 1 / 3, w_distance: float = 1 / 3
    ) -> None:
        super().__init__()
        self._weights = (w_recency, w_frequency, w_distance)
        self._layer = -1
        self._layers: set[int] = set()
        # The number of the event that demanded an expert last, and of events that did.
        self._uses: dict[ExpertKey, tuple[int, int]] = {}

    def begin(self, keys: Sequence[ExpertKey], facts: Facts) -> None:
        layer = keys[0].layer
        if facts.is_prefill and layer <= self._layer:
            self.now = 0
            self._uses.clear()
        super().begin(keys, facts)
        self._layer = layer
        self._layers.add(layer)
        for key in keys:
            self._uses[key] = self.now, self._uses.get(key, _NEVER)[1] + 1

    def entries(self, residents: Iterable[Resident]) -> list[Entry]:
        now, uses = max(self.now, 1), self._uses
        w_recency, w_frequency, w_distance = self._weights
        current, layers = self._layer, max(len(self._layers), 1)
        near: dict[int, float] = {}
        found: list[Entry] = []
        for key, _ in residents:
            layer = key[0]
            if layer not in near:
                near[layer] = w_distance * nearness(layer, current, layers)
            last, count = uses.get(key, _NEVER)
            rank = multi_factor_rank(last, count, now, w_recency, w_frequency, near[layer])
            found.append((rank, 0.0, key))
        return found


_NEVER = (0, 0)

MEMBER = MultiFactor

"""Each slot goes to the layer where it saves most misses."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import ClassVar

from ..base import Share


class MarginalGain:
    """Greedy: 1 slot each, every further one where the curve rises most; ties to the lowest layer.

    `curves[layer][slots]` are the hits on a trace of an LRU of so many slots; what a curve does not cover
    gains nothing. Optimal if every curve is concave (Fox, 1966); else it may stop short of a rise behind
    a plain, which adapmoe sees. One pool for all if slots are too few. O(slots × log layers).
    """

    name: ClassVar[str] = "marginal_gain"
    needs: ClassVar[frozenset[str]] = frozenset({"curves"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, curves: Sequence[Sequence[int]]) -> None:
        self._curves = curves

    def divide(self, num_layers: int, num_experts: int, slots: int) -> list[Share]:
        if slots < num_layers:
            return [Share(tuple(range(num_layers)), slots)]
        held = [1] * num_layers
        offers = [(-self._gain(layer, 1), layer) for layer in range(num_layers) if num_experts > 1]
        heapq.heapify(offers)
        for _ in range(min(slots, num_layers * num_experts) - num_layers):
            _, layer = heapq.heappop(offers)
            held[layer] += 1
            if held[layer] < num_experts:
                heapq.heappush(offers, (-self._gain(layer, held[layer]), layer))
        return [Share((layer,), count) for layer, count in enumerate(held)]

    def _gain(self, layer: int, held: int) -> int:
        """Hits that one more slot adds."""
        curve = self._curves[layer] if layer < len(self._curves) else ()
        return curve[held + 1] - curve[held] if held + 1 < len(curve) else 0


MEMBER = MarginalGain

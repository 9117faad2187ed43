"""Slots go where each saves most misses, looking over the edge of a plain."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import ClassVar

from ..base import Share

Offer = tuple[float, int, int]
"""Hits lost per slot if refused (negative, so that the best comes first), slots asked for, layer."""


class MarginalGain:
    """Greedy: 1 slot each, then as many as rise the curve most per slot, again and again.

    `curves[layer][slots]` are the hits on a trace of an LRU of so many slots; what a curve does not cover
    gains nothing. A layer asks for the number of slots with the steepest rise, not for the next one alone
    (lookahead of Qureshi & Patt, MICRO 2006): an LRU hits nothing until an event fits. Optimal if every curve is
    concave (Fox, 1966). Ties: fewer slots, then the lowest layer. One pool for all if slots are too few.
    O(slots × experts) at worst.
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
        left = min(slots, num_layers * num_experts) - num_layers
        offers: list[Offer] = []
        for layer in range(num_layers):
            self._push(offers, layer, 1, min(left, num_experts - 1))
        while left:
            _, asked, layer = heapq.heappop(offers)
            if asked <= left:
                held[layer] += asked
                left -= asked
            self._push(offers, layer, held[layer], min(left, num_experts - held[layer]))
        return [Share((layer,), count) for layer, count in enumerate(held)]

    def _push(self, offers: list[Offer], layer: int, held: int, most: int) -> None:
        """Offer the steepest rise of a layer within `most` more slots."""
        if most > 0:
            rises = [(-self._rise(layer, held, more) / more, more) for more in range(1, most + 1)]
            heapq.heappush(offers, (*min(rises), layer))

    def _rise(self, layer: int, held: int, more: int) -> int:
        """Hits that so many more slots add."""
        curve = (self._curves[layer] if layer < len(self._curves) else ()) or (0,)
        top = len(curve) - 1
        return curve[min(held + more, top)] - curve[min(held, top)]


MEMBER = MarginalGain

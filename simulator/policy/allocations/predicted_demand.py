"""A layer gets as many slots as it has experts among the most demanded of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ..base import Share


class PredictedDemand:
    """PLEC's division of the pool by predicted demand (He et al., arXiv 2410.17954), read statically.

    The prediction is a trace's `popularity[layer][expert]`, not the paper's per step. The most demanded
    expert of each layer gives that layer 1 slot; the rest goes to the layers of the most demanded
    remaining experts of the whole model; ties to the lowest (layer, expert). What popularity does not
    cover counts 0. One pool for all if slots are too few. O(n log n) of all experts.
    """

    name: ClassVar[str] = "predicted_demand"
    needs: ClassVar[frozenset[str]] = frozenset({"popularity"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, popularity: Sequence[Sequence[int]]) -> None:
        self._popularity = popularity

    def divide(self, num_layers: int, num_experts: int, slots: int) -> list[Share]:
        if slots < num_layers:
            return [Share(tuple(range(num_layers)), slots)]
        held = [1] * num_layers
        offers: list[tuple[int, int]] = []
        for layer in range(num_layers):
            counts = list(self._popularity[layer]) if layer < len(self._popularity) else []
            counts += [0] * (num_experts - len(counts))
            offers += [(-count, layer) for count in sorted(counts[:num_experts], reverse=True)[1:]]
        for _, layer in sorted(offers)[: slots - num_layers]:
            held[layer] += 1
        return [Share((layer,), count) for layer, count in enumerate(held)]


MEMBER = PredictedDemand

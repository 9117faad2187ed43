"""The division of slots over layers that saves most misses, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import ClassVar

from ..base import Share


class AdapMoE:
    """AdapMoE's cross-layer allocation (arXiv 2408.10284): exact for any curves, concave or not.

    F[i][j] = max over k of F[i − 1][j − k] + hits_i(k), 1 ≤ k ≤ experts, where `curves[i][k]` are the
    hits on a trace of layer i's LRU with k slots; the paper minimises the expected cost of misses, which
    is the same. Its discount for misses that a prefetch hides is left out: nothing measures it yet. Of
    equal totals the more even division wins, then the one with more slots in lower layers. What a curve
    does not cover gains nothing. One pool for all if slots are too few. O(layers × slots × experts):
    about a second for 48 × 128 experts.
    """

    name: ClassVar[str] = "adapmoe"
    needs: ClassVar[frozenset[str]] = frozenset({"curves"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, curves: Sequence[Sequence[int]]) -> None:
        self._curves = curves

    def divide(self, num_layers: int, num_experts: int, slots: int) -> list[Share]:
        if slots < num_layers:
            return [Share(tuple(range(num_layers)), slots)]
        total = min(slots, num_layers * num_experts)
        # best[j] is the worth of j slots, beyond one each, in the layers so far. A hit is worth more than
        # all that unevenness, the sum of squares, can cost.
        hit = num_layers * num_experts * num_experts + 1
        best, choices = [0], []
        for layer in range(num_layers):
            values = self._values(layer, num_experts, hit)
            width = min((layer + 1) * (num_experts - 1), total - num_layers) + 1
            best, chosen = _stack(best, values, width)
            choices.append(chosen)
        held, left = [0] * num_layers, total - num_layers
        for layer in reversed(range(num_layers)):
            extra = choices[layer][left]
            held[layer], left = 1 + extra, left - extra
        return [Share((layer,), count) for layer, count in enumerate(held)]

    def _values(self, layer: int, num_experts: int, hit: int) -> list[int]:
        """What 1, 2, …, all experts resident are worth in a layer."""
        curve = list(self._curves[layer] if layer < len(self._curves) else ()) or [0]
        curve += curve[-1:] * (num_experts + 1 - len(curve))
        return [curve[count] * hit - count * count for count in range(1, num_experts + 1)]


def _stack(best: list[int], values: list[int], width: int) -> tuple[list[int], list[int]]:
    """Add a layer: the best worth of 0 … width − 1 slots, and how many of them the layer takes.

    The fewest, of equals.
    """
    turned = best[::-1]
    worth: list[int] = []
    chosen: list[int] = []
    for slots in range(width):
        fewest = max(0, slots - len(best) + 1)
        most = min(slots, len(values) - 1)
        # turned[start + i] is best[slots - fewest - i].
        start = len(best) - 1 - (slots - fewest)
        sums = list(map(add, values[fewest : most + 1], turned[start:]))
        top = max(sums)
        worth.append(top)
        chosen.append(fewest + sums.index(top))
    return worth, chosen


MEMBER = AdapMoE

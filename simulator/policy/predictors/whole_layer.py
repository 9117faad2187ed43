"""Prefetch whole layers: what is done where nobody asks which experts are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..ahead import Walk, require_reach
from ..base import Signals


class WholeLayer:
    """All experts of the next `horizon` layers, the most popular first, into the next pass.

    A layer waits until all of them are there.

    Layer streaming as in SE-MoE (arXiv 2205.10034), whose ring buffer holds two layers: with that many slots in one
    pool, and cache `fifo`, every layer crosses the link once in each pass. A baseline.
    """

    name: ClassVar[str] = "whole_layer"
    needs: ClassVar[frozenset[str]] = frozenset({"popularity"})
    is_lossless: ClassVar[bool] = True
    is_baseline: ClassVar[bool] = True
    loads_whole_layers: ClassVar[bool] = True

    def __init__(self, popularity: Sequence[Sequence[int]], horizon: int = 1) -> None:
        require_reach(self.name, horizon, 0)
        self.horizon = horizon
        self._walk = Walk(len(popularity))
        self._layers = [
            [
                ExpertKey(layer, expert)
                for expert in sorted(range(len(counts)), key=lambda e, c=counts: (-c[e], e))
            ]
            for layer, counts in enumerate(popularity)
        ]

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        self._walk.enter(layer)
        return [key for target in self._walk.ahead(self.horizon) for key in self._layers[target]]


MEMBER = WholeLayer

"""Evict experts of layers this pass has left behind before those of layers still to come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import Facts
from ..rescored import Entry, Rescored, Resident


class LeastStale(Rescored):
    """A pass sweeps the layers in order, so an expert of a layer already passed is stale.

    rank = (0 if layer ≤ current layer else 1, last event, key), lowest first; the current layer is that
    of the running event, the last event that of the last demand or admission (SpecMD, arXiv 2602.03921;
    no formula is published for the order within a class, so it is LRU here). In a pool of one layer
    everything is stale and this is LRU. An event with an eviction costs O(n) of the pool (rescored.py).
    """

    name: ClassVar[str] = "least_stale"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._layer = -1

    def begin(self, keys: Sequence[ExpertKey], facts: Facts) -> None:
        super().begin(keys, facts)
        self._layer = keys[0].layer

    def entries(self, residents: Iterable[Resident]) -> list[Entry]:
        current = self._layer
        return [(0.0 if key[0] <= current else 1.0, last, key) for key, (last, _) in residents]


MEMBER = LeastStale

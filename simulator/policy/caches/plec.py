"""Predictive locality-aware expert caching: what the predictor expects stays, nearest layer longest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import Facts
from ..ranks import plan_rank
from ..rescored import Entry, Rescored, Resident

UNNEEDED, UNKNOWN, PLANNED = 0.0, 1.0, 2.0


class PLEC(Rescored):
    """The expert cache of He et al. (ExpertFlow, arXiv 2410.17954), wherever the paper is explicit.

    The plan is what the predictor said last of each layer. First to go are residents of a layer that has been spoken of
    and that are not in its plan, and those that were planned for a layer that has run without them (the paper's
    run-time correction); then what nothing was said of, layers that have run in this pass before those to come; last
    what is planned, the farthest layer and the least likely expert first. Ties go to the least recently used.

    With allocation `global` slots go to the layers that the plan needs them for, from pass to pass, as the paper says;
    with `equal` every layer keeps its own slots, as in the code released with it. The paper gives no order among
    equals: recency is ours. An event with an eviction costs O(n) of the pool (rescored.py).
    """

    name: ClassVar[str] = "plec"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._layer = -1
        self._plan: dict[int, dict[ExpertKey, int]] = {}
        self._unneeded: dict[int, frozenset[ExpertKey]] = {}

    def begin(self, keys: Sequence[ExpertKey], facts: Facts) -> None:
        super().begin(keys, facts)
        self._layer = keys[0].layer
        self._unneeded[self._layer] = frozenset(self._plan.pop(self._layer, ())) - frozenset(keys)

    def expect(self, keys: Sequence[ExpertKey]) -> None:
        self._heap = None
        said: dict[int, dict[ExpertKey, int]] = {}
        for key in keys:
            places = said.setdefault(key.layer, {})
            places.setdefault(key, len(places))
        self._plan |= said

    def entries(self, residents: Iterable[Resident]) -> list[Entry]:
        return [self._entry(key, last) for key, (last, _) in residents]

    def _entry(self, key: ExpertKey, last: int) -> Entry:
        places = self._plan.get(key.layer)
        if places is not None and key in places:
            return PLANNED + plan_rank(key.layer, self._layer), -1.0 - places[key], key
        if places is not None or key in self._unneeded.get(key.layer, ()):
            return UNNEEDED, last, key
        return UNKNOWN + plan_rank(key.layer, self._layer), last, key


MEMBER = PLEC

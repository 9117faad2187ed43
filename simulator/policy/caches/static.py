"""Keep the most popular experts of a trace; the least popular resident makes room for a miss."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..base import BaseCache
from ..ranked import Ranked


class StaticPopularity(BaseCache):
    """A placement that does not learn: loaded before the first step, ranked by counts of a trace.

    `popularity[layer][expert]` counts demands. A miss has to go somewhere, so it takes the slot of the
    least popular resident; the popular ones stay.
    """

    name: ClassVar[str] = "static"
    needs: ClassVar[frozenset[str]] = frozenset({"popularity"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, popularity: Sequence[Sequence[int]]) -> None:
        self._popularity = popularity
        self._ranked = Ranked()

    def _rank(self, key: ExpertKey) -> tuple[float, float]:
        # The expert number breaks ties, so that the placement does not depend on order of arrival.
        return float(self._popularity[key.layer][key.expert]), -float(key.expert)

    def admit(self, key: ExpertKey) -> None:
        self._ranked.put(key, self._rank(key))

    def remove(self, key: ExpertKey) -> None:
        self._ranked.drop(key)

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        return self._ranked.lowest(protected)

    def warm(self, keys: Iterable[ExpertKey], slots: int) -> Sequence[ExpertKey]:
        return sorted(keys, key=self._rank, reverse=True)[:slots]


MEMBER = StaticPopularity

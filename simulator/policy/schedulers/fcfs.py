"""First come, first served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ..base import Route, Waiting
from ..units import require_unit


class FCFS:
    """Batches in order of arrival; with `batches` above 1, so many are decoded in turns, none is regrouped."""

    name: ClassVar[str] = "fcfs"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def __init__(self, batches: int = 1) -> None:
        require_unit(batches=batches)
        self.batches, self.every = batches, 0

    def pick(self, waiting: Sequence[Waiting], limit: int) -> Sequence[int]:
        return range(min(limit, len(waiting)))

    def regroup(
        self, routes: Sequence[Route], groups: Sequence[Sequence[int]], limit: int
    ) -> Sequence[Sequence[int]]:
        return groups


MEMBER = FCFS

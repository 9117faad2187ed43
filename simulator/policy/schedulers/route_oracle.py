"""The bound of token scheduling: grouping by routes that nobody can know yet."""

from __future__ import annotations

from typing import ClassVar

from ..base import FutureView
from ..similar import BySimilarity


class RouteOracle(BySimilarity):
    """Batches of sequences whose next tokens do take similar routes: what a perfect prediction would give.

    A bound of the prediction, not of the grouping, which is no better than that of the others.
    """

    name: ClassVar[str] = "route_oracle"
    needs: ClassVar[frozenset[str]] = frozenset({"future"})
    is_hypothetical: ClassVar[bool] = True  # it bounds other schedulers, not what runs without one

    def __init__(
        self,
        batches: int = 2,
        every: int = 1,
        iterations: int = 30,
        min_gain: float = 0.05,
        future: FutureView | None = None,
    ) -> None:
        super().__init__(batches, every, iterations, min_gain)


MEMBER = RouteOracle

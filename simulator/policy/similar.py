"""What schedulers that group by similar routes have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...tracer.errors import UsageError
from .base import Route, Waiting
from .medoids import cluster
from .units import distinct, even_sizes, require_unit


class BySimilarity:
    """Regroups `batches` adjacent batches around medoids (He et al., arXiv 2410.17954, §token scheduler).

    As the routes are guesses and moving keys and values costs time, batches stay as they are unless the distinct
    experts that are to be expected, summed over batches and layers, fall by more than the share `min_gain`. Where
    sequences have ended and fewer batches do, there are fewer. Subclasses say by `needs` whose routes it is told.
    """

    is_lossless: ClassVar[bool] = True

    def __init__(
        self, batches: int = 2, every: int = 1, iterations: int = 30, min_gain: float = 0.05
    ) -> None:
        require_unit(batches=batches, every=every, iterations=iterations)
        if isinstance(min_gain, bool) or not 0 <= min_gain <= 1:
            raise UsageError(f"min_gain is a share from 0 to 1, got {min_gain!r}.")
        self.batches, self.every = batches, every
        self._iterations, self._min_gain = iterations, min_gain

    def pick(self, waiting: Sequence[Waiting], limit: int) -> Sequence[int]:
        """In order of arrival."""
        return range(min(limit, len(waiting)))

    def regroup(
        self, routes: Sequence[Route], groups: Sequence[Sequence[int]], limit: int
    ) -> Sequence[Sequence[int]]:
        """See policy.base.Regrouping."""
        sizes = even_sizes(len(routes), limit)
        found = cluster(routes, sizes, self._iterations)
        if len(sizes) == len(groups):
            before = distinct(routes, groups)
            if before - distinct(routes, found) <= self._min_gain * before:
                return groups
        return found

"""A core whose slots hold every expert for good: there is nothing left to decide, so it is told of its events later.

Between a model's kernels every line of Python meets cold caches: asking the core took a tenth of a pass, and all it
could answer was that everything is there.
"""

from __future__ import annotations

import numpy as np

from ..simulator.policy.base import Facts
from ..simulator.policy.residency import Residency
from .driver import Driver


class Settled:
    """Says whether all is settled, and keeps the events that have been computed since without asking the core.

    `total` are the experts of a model whose policy may settle (PolicySpec.may_settle); None: it never does. `tell`
    brings the core's log and the driver's counters up to what they would be had it been asked each time; without a log
    only hits are counted.
    """

    def __init__(self, core: Residency, driver: Driver, total: int | None) -> None:
        self._core, self._driver, self._total = core, driver, total
        self._is_settled = False
        self._events: list[tuple[int, bool, int, np.ndarray]] = []

    def __bool__(self) -> bool:
        if not self._is_settled and self._total is not None:
            self._is_settled = self._core.num_resident == self._total
        return self._is_settled

    def note(self, layer: int, chosen: np.ndarray) -> int:
        """An event has been computed: `chosen` [tokens, k] are its experts. Returns how many distinct ones."""
        distinct = len(set(chosen.ravel().tolist()))
        if self._core.log is None:
            self._driver.outcomes["hits"] += distinct
        else:
            self._events.append((self._driver.step, self._driver.is_prefill, layer, chosen))
        return distinct

    def tell(self) -> None:
        """Let the core answer what was put off, in order."""
        events, self._events = self._events, []
        for step, is_prefill, layer, chosen in events:
            experts, counts = np.unique(chosen, return_counts=True)
            facts = Facts(is_prefill, tuple(counts.tolist()), ())
            answer = self._core.demand(step, layer, experts.tolist(), facts)
            assert answer.hits == len(experts), "every expert was resident"
            self._core.release(step, layer)
            self._driver.outcomes["hits"] += answer.hits

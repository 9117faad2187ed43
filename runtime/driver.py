"""The runtime's driver of the decision core: one event after another, on real memory.

It keeps the order of the simulator's driver (simulator/engine.py): finished prefetches are reported before
an event is asked for, prefetches go out behind the event's last demand loads, and an event is released when
it has been computed. There is no branch on the policy here, and no model: what an event computes it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..simulator.policy.base import Demand, Facts, Load, Signals, Wave
from ..simulator.policy.residency import Residency
from ..tracer.copies import Copy
from .store import ExpertStore


class EventWork(Protocol):
    """What one event computes. Called in this order; `hand_over` and `take_back` only if the CPU has a part in it."""

    def hand_over(self, experts: Sequence[int]) -> None:
        """Let these experts be computed where they are; returns at once."""
        ...

    def signals(self) -> Signals:
        """What is known for predictions; asked once per event."""
        ...

    def wave(self, wave: Wave, *, is_all: bool) -> None:
        """The experts of this wave are in their slots: compute them. `is_all`: the event has no others."""
        ...

    def take_back(self) -> None:
        """Wait for what was handed over."""
        ...


class Driver:
    """Carries out a core's answers. If an event fails it is taken back, and the next one finds a whole core.

    `lap` is called with the name of what has just ended, as in tracer.timing.
    """

    def __init__(self, core: Residency, store: ExpertStore, lap: Callable[[str], None]) -> None:
        self._core = core
        self._store = store
        self._lap = lap
        self.step = -1
        self.is_prefill = True
        self.outcomes = {"hits": 0, "lates": 0, "misses": 0}

    def warm(self) -> None:
        """Load what the cache starts with."""
        self._store.wait(self._store.submit(-1, self._core.warm()))

    def event(
        self,
        layer: int,
        experts: Sequence[int],
        tokens: Sequence[int],
        weights: Sequence[float],
        work: EventWork,
    ) -> Demand:
        """Answer and compute one event; `tokens` and `weights` are by expert, as in policy.base.Facts.

        Raises ResourceError if a copy fails, and whatever `work` raises.
        """
        answer = self._demand(layer, experts, Facts(self.is_prefill, tuple(tokens), tuple(weights)))
        asked: list[Copy] = []
        try:
            self._carry_out(layer, answer, work, asked)
        except BaseException:
            self._take_back(layer, answer, asked)
            raise
        self._core.release(self.step, layer)
        return answer

    def _demand(self, layer: int, experts: Sequence[int], facts: Facts) -> Demand:
        for key in self._store.failed():
            self._core.lost(self.step, key)
        for key in self._store.arrived():
            self._core.loaded(self.step, key)
        answer = self._core.demand(self.step, layer, experts, facts)
        for key in answer.cancels:
            self._store.cancel(key)
        self.outcomes["hits"] += answer.hits
        self.outcomes["lates"] += answer.lates
        self.outcomes["misses"] += answer.misses
        return answer

    def _carry_out(self, layer: int, answer: Demand, work: EventWork, asked: list[Copy]) -> None:
        lap, store = self._lap, self._store
        is_all = len(answer.waves) == 1 and not answer.on_cpu
        needed: list[Copy] = []
        for wave in answer.waves:
            copies = store.submit(self.step, wave.loads)
            asked += copies
            lap("decision_s")
            if answer.on_cpu and wave is answer.waves[0]:
                work.hand_over(answer.on_cpu)
                lap("cpu_s")
            if wave is answer.waves[-1]:
                self._prefetch(layer, work.signals())
                lap("lookahead_s")
            late = store.hurry(wave.late)
            asked += late
            needed += [*late, *copies]
            if wave.waits:
                store.wait(needed)
                needed = []
            lap("stall_s")
            work.wave(wave, is_all=is_all)
            lap("experts_s")
        if answer.on_cpu:
            work.take_back()
            lap("cpu_s")

    def _prefetch(self, layer: int, signals: Signals) -> None:
        loads = self._core.predict(self.step, layer, signals)
        try:
            self._store.submit(self.step, loads)
        except BaseException:
            self._lose(loads)
            raise

    def _take_back(self, layer: int, answer: Demand, asked: Sequence[Copy]) -> None:
        """Forget an event that failed: what it was to load and is not there has no slot."""
        late = [key for wave in answer.waves for key in wave.late]
        there = self._store.abandon(asked, late)
        for key in late:
            if key not in there:
                self._core.lost(self.step, key)
        self._lose([load for wave in answer.waves for load in wave.loads if load.key not in there])
        self._core.release(self.step, layer)

    def _lose(self, loads: Sequence[Load]) -> None:
        for load in loads:
            self._core.lost(self.step, load.key)

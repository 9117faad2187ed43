"""The compiled engine pass by pass, for passes that are decided while the clock runs (simulator.serving)."""

from __future__ import annotations

import numpy as np

from ...tracer.types import ModelShape
from ..account import RunTotals
from ..costs import CostModel
from ..policy.registry import predictors
from ..policy.spec import PolicySpec
from ..source import Source
from ..workload import Workload
from . import link
from .kernel import run_steps
from .replay import Walked, add_up, asked_room, make_run, steps_of, work_of
from .state import OUT, STEP, Work
from .tapes import ask

_ROOM = 1024
"""Passes there is room for at first."""


def serve(source: Source, spec: PolicySpec, shape: ModelShape, costs: CostModel) -> RunTotals:
    """Run what a source hands out: at every end of a pass it says what runs next, or how long to wait."""
    return _Server(source, spec, shape, costs).run()


class _Server:
    """One run. The workload of each pass replaces that of the one before; slots, link and totals stay."""

    def __init__(
        self, source: Source, spec: PolicySpec, shape: ModelShape, costs: CostModel
    ) -> None:
        if "future" in spec.needs():
            source.events()  # raises UsageError where nobody can know them
        self._source, self._spec, self._shape, self._costs = source, spec, shape, costs
        self._predictor = predictors.build(spec.predictor.name, dict(spec.predictor.params))
        # No workload yet: the arrays of the first pass come with it.
        nothing = np.zeros(0, np.int64)
        work = Work(np.zeros(_ROOM, STEP), *([nothing] * 8))
        self._run = make_run(work, spec, shape, costs)
        self._make_room(_ROOM)
        self._sizes: list[tuple[int, int]] = []

    def run(self) -> RunTotals:
        """Ask for passes and run them until there are no more."""
        now_s = 0.0
        while (found := self._source.next(now_s)) is not None:
            if isinstance(found, tuple):
                now_s = self._walk(*found)
                self._source.ended(now_s)
            else:
                link.spend(self._run.wire, float(found), False)
                now_s = self._now_s()
        return self._totals()

    def _walk(self, workload: Workload, place: int) -> float:
        """One pass, at the next place of the totals; returns when it ended."""
        number = len(self._sizes)
        if number == len(self._run.wire.out):
            self._make_room(2 * number)
        tape = ask(self._predictor, workload, self._spec)
        steps = self._run.work.steps
        steps[number] = steps_of(workload)[place]
        work = work_of(workload, tape, steps)
        self._run = self._run._replace(work=work, asked=asked_room(tape))
        run_steps(self._run, number, number + 1)
        events = workload.events_of(place)
        distinct = int(workload.ptr[events.stop] - workload.ptr[events.start])
        self._sizes.append((len(events), distinct))
        return self._now_s()

    def _now_s(self) -> float:
        return float(self._run.wire.clock["now_s"][0])

    def _make_room(self, passes: int) -> None:
        """Room for the totals of so many passes; what is there stays."""
        old, steps = self._run.wire.out, self._run.work.steps
        out, more = np.zeros(passes, OUT), np.zeros(passes, STEP)
        out[: len(old)], more[: len(steps)] = old, steps
        self._run = self._run._replace(
            wire=self._run.wire._replace(out=out), work=self._run.work._replace(steps=more)
        )

    def _totals(self) -> RunTotals:
        count = len(self._sizes)
        run = self._run._replace(wire=self._run.wire._replace(out=self._run.wire.out[:count]))
        steps = run.work.steps[:count]
        sizes = np.asarray(self._sizes, dtype=np.int64).reshape(-1, 2)
        walked = Walked(
            steps["is_decode"].astype(bool),
            steps["batch"],
            steps["tokens"],
            steps["context"],
            sizes[:, 0],
            sizes[:, 1],
            steps["kv_beside"],
            steps["overhead_s"],
        )
        sequences = self._source.sequences()
        return add_up(run, walked, sequences, self._spec, self._shape, self._costs)

"""Replayed routing for runs without a policy: the same choices in a stock model, for baselines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...tracer.generate import StepTokens
from ...tracer.timing import StepInfo
from ..stock import PlainRuns, Stopwatch
from .live import LiveReplay


class ReplayedWatch(Stopwatch):
    """Times passes as the watch it stands for, and says which tokens each of them feeds."""

    def __init__(self, watch: Stopwatch, live: LiveReplay) -> None:
        self.timer, self.step = watch.timer, watch.step
        self._live = live

    def begin_step(self, info: StepInfo, tokens: StepTokens) -> None:
        """See generate.StepObserver."""
        self._live.begin(tokens)
        super().begin_step(info, tokens)

    def end_step(self) -> float:
        """See generate.StepObserver."""
        self._live.end()
        return super().end_step()


@contextmanager
def replayed(runs: PlainRuns, live: LiveReplay) -> Iterator[PlainRuns]:
    """Timed runs that follow the replay. Warm-ups and memory passes before it kept the router's own choice."""
    before, runs.watch = runs.watch, ReplayedWatch(runs.watch, live)
    live.is_strict = True
    try:
        yield runs
    finally:
        runs.watch, live.is_strict = before, False

"""The reference engine: one run on a virtual clock, as SimPy processes.

Two processes share the decision core's commands: compute (walks the workload layer by layer) and the link
(demand before prefetch, chunk by chunk). The order of calls into the core is that of the runtime's driver
(runtime/experts.py and runtime/session.py). All it asks of a policy is whether it predicts at all, to charge
the time that takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from ..tracer.schema import WHOLE_STEP
from ..tracer.types import ExpertKey, ModelShape, Why
from .account import CopyRow, RunRecord, SequenceTimes, largest_waves
from .costs import NO_TRAFFIC, CostModel, Traffic
from .policy.base import Load, Signals
from .policy.future import Future
from .policy.log import Entry
from .policy.residency import Residency
from .policy.spec import PolicySpec
from .result import MemoryResult
from .workload import EventDemand, StepDemand, Workload

_LAPS: tuple[str, ...] = (
    "mixer_s",
    "readback_s",
    "decision_s",
    "lookahead_s",
    "stall_s",
    "experts_s",
)


@dataclass(slots=True, eq=False)
class _Copy:
    """A copy on the virtual link."""

    key: ExpertKey
    why: Why
    step: int
    queued_s: float
    done: simpy.Event
    left_s: float
    is_urgent: bool
    is_cancelled: bool = False
    start_s: float = -1.0
    end_s: float = -1.0
    needed_s: float | None = None


class Link:
    """The serial way to the device. One chunk at a time; demand goes first at every chunk."""

    def __init__(self, env: simpy.Environment, costs: CostModel) -> None:
        self._env = env
        self._costs = costs
        self._demand: deque[_Copy] = deque()
        self._prefetch: deque[_Copy] = deque()
        self._asked = env.event()
        self._arrived: list[_Copy] = []
        self.ended: list[_Copy] = []
        chunks = max(1, -(-costs.expert_bytes // costs.chunk_bytes))
        self._chunk_s = costs.copy_s / chunks
        self._busy_ratio = costs.busy_copy_s / costs.copy_s if costs.copy_s else 1.0
        self.is_computing = False
        env.process(self._run())

    def submit(self, step: int, loads: Sequence[Load]) -> list[_Copy]:
        """Ask for copies."""
        copies = [
            _Copy(
                load.key,
                load.why,
                step,
                self._env.now,
                self._env.event(),
                self._costs.copy_s,
                load.why == "demand",
            )
            for load in loads
        ]
        for copy in copies:
            (self._demand if copy.is_urgent else self._prefetch).append(copy)
        if copies and not self._asked.triggered:
            self._asked.succeed()
        return copies

    def promote(self, copy: _Copy) -> None:
        """A late prefetch goes first."""
        copy.is_urgent = True
        if copy in self._prefetch:
            self._prefetch.remove(copy)
            self._demand.append(copy)

    def cancel(self, copy: _Copy) -> None:
        """Give up a prefetch at its next chunk."""
        copy.is_cancelled = True
        if copy in self._prefetch:
            self._prefetch.remove(copy)
            if copy.start_s >= 0:  # interrupted: what it moved was moved
                copy.end_s = self._env.now
                self.ended.append(copy)

    def arrived(self) -> list[_Copy]:
        """Prefetches that ended since the last call."""
        taken, self._arrived = self._arrived, []
        return taken

    def _run(self) -> Generator[simpy.Event, Any, None]:
        while True:
            if not (self._demand or self._prefetch):
                self._asked = self._env.event()
                yield self._asked
            copy = self._demand.popleft() if self._demand else self._prefetch.popleft()
            yield from self._carry(copy)

    def _carry(self, copy: _Copy) -> Generator[simpy.Event, Any, None]:
        if copy.start_s < 0:
            copy.start_s = self._env.now
        while copy.left_s > 1e-12 and not copy.is_cancelled:
            chunk_s = min(self._chunk_s, copy.left_s)
            # Under compute the same bytes take longer; the profile says by how much.
            yield self._env.timeout(chunk_s * (self._busy_ratio if self.is_computing else 1.0))
            copy.left_s -= chunk_s
            must_yield = bool(self._demand) and not (copy.is_urgent or copy.is_cancelled)
            if copy.left_s > 1e-12 and must_yield:
                self._prefetch.appendleft(copy)
                return
        copy.end_s = self._env.now
        self.ended.append(copy)
        if not copy.is_cancelled and copy.why == "prefetch":
            self._arrived.append(copy)
        copy.done.succeed()


@dataclass(slots=True)
class _Times:
    """Rows of the steps table, column by column."""

    columns: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, **row: Any) -> None:
        for name, value in row.items():
            self.columns.setdefault(name, []).append(value)


class Simulation:
    """One workload under one policy on one machine. Use `simulate`."""

    def __init__(
        self, workload: Workload, spec: PolicySpec, shape: ModelShape, costs: CostModel
    ) -> None:
        self._workload = workload
        self._shape = shape
        self._costs = costs
        self._spec = spec
        self.log: list[Entry] = []
        future = Future(workload.events()) if "future" in spec.needs() else None
        self._core: Residency = spec.build(shape, future=future, log=self.log)
        self._depth = spec.lookahead_depth
        self._charges_lookahead = spec.predicts
        self._env = simpy.Environment()
        self._link = Link(self._env, costs)
        self._flying: dict[ExpertKey, _Copy] = {}
        self._times = _Times()
        self._recent = NO_TRAFFIC
        self._token_s: dict[int, list[float]] = {}
        self._batch_start_s = 0.0

    def run(self) -> RunRecord:
        """Walk the workload; returns what a real run would have recorded."""
        self._core.warm()  # before the clock starts, as in the runtime
        self._env.run(until=self._env.process(self._walk()))
        return RunRecord(
            steps=self._times.columns,
            copies=[self._copy_row(copy) for copy in self._link.ended],
            log=self.log,
            sequences=[
                SequenceTimes(number, self._workload.prompt_tokens.get(number, 0), tuple(times))
                for number, times in self._token_s.items()
            ],
            memory=self._memory(),
        )

    def _walk(self) -> Generator[simpy.Event, Any, None]:
        for step in self._workload.steps:
            if step.phase == "prefill":
                self._batch_start_s = self._env.now
            start = self._env.now
            for event in step.events:
                yield from self._event(step, event)
            yield self._env.timeout(self._costs.head_s(step.phase, step.batch, step.tokens))
            self._write(step, WHOLE_STEP, start, dict.fromkeys(_LAPS, 0.0), 0, 0)
            for sequence in step.sequences:
                times = self._token_s.setdefault(sequence, [])
                times.append(self._env.now - self._batch_start_s)

    def _event(self, step: StepDemand, event: EventDemand) -> Generator[simpy.Event, Any, None]:
        costs, phase, start = self._costs, step.phase, self._env.now
        laps = dict.fromkeys(_LAPS, 0.0)
        yield from self._compute(
            laps,
            "mixer_s",
            costs.mixer_s(phase, step.tokens, step.context, self._recent),
        )
        yield from self._compute(laps, "readback_s", costs.phase(phase).readback_s)
        for copy in self._link.arrived():
            if self._flying.get(copy.key) is copy:
                del self._flying[copy.key]
                self._core.loaded(step.step, copy.key)
        answer = self._core.demand(step.step, event.layer, event.experts)
        for key in answer.cancels:
            self._link.cancel(self._flying.pop(key))
        decision_s = costs.decision_s(phase, len(event.experts), answer.misses)
        yield from self._compute(laps, "decision_s", decision_s)
        traffic = Traffic(answer.misses, 0)
        for wave in answer.waves:
            copies = self._link.submit(step.step, wave.loads)
            if wave is answer.waves[-1]:
                loads = self._predicted(step, event)
                traffic = Traffic(answer.misses, len(loads))
                if self._charges_lookahead:
                    lookahead_s = costs.lookahead_s(phase, step.tokens, len(loads))
                    yield from self._compute(laps, "lookahead_s", lookahead_s)
                for copy in self._link.submit(step.step, loads):
                    self._flying[copy.key] = copy
            yield from self._wait(laps, copies, wave.late)
            total_s = costs.experts_s(
                phase,
                step.tokens,
                len(event.experts),
                traffic,
                len(answer.waves),
                self._core.pool_slots(event.layer),
            )
            share = len(wave.experts) / max(1, len(event.experts))
            yield from self._compute(laps, "experts_s", total_s * share)
        self._core.release(step.step, event.layer)
        self._recent = traffic
        self._write(step, event.layer, start, laps, len(event.experts), len(answer.waves))

    def _predicted(self, step: StepDemand, event: EventDemand) -> list[Load]:
        groups = {d: event.lookahead[d] for d in event.lookahead if d <= self._depth}
        return self._core.predict(step.step, event.layer, Signals(groups))

    def _compute(
        self, laps: dict[str, float], name: str, seconds: float
    ) -> Generator[simpy.Event, Any, None]:
        self._link.is_computing = seconds > 0
        yield self._env.timeout(seconds)
        self._link.is_computing = False
        laps[name] += seconds

    def _wait(
        self, laps: dict[str, float], copies: Sequence[_Copy], late: Sequence[ExpertKey]
    ) -> Generator[simpy.Event, Any, None]:
        flying = [self._flying.pop(key) for key in late]
        for copy in flying:
            self._link.promote(copy)
        needed = [*flying, *copies]
        began = self._env.now
        for copy in needed:
            copy.needed_s = began
        pending = [copy.done for copy in needed if not copy.done.processed]
        if pending:
            yield self._env.all_of(pending)
            yield self._env.timeout(self._costs.wake_s)
        laps["stall_s"] += self._env.now - began

    def _write(
        self,
        step: StepDemand,
        layer: int,
        start: float,
        laps: dict[str, float],
        distinct: int,
        waves: int,
    ) -> None:
        self._times.add(
            step=step.step,
            layer=layer,
            phase=step.phase,
            batch=step.batch,
            tokens=step.tokens,
            context=step.context,
            distinct=distinct,
            waves=waves,
            start_s=start,
            **laps,
            total_s=self._env.now - start,
        )

    def _copy_row(self, copy: _Copy) -> CopyRow:
        num_bytes = self._shape.expert_bytes
        if copy.is_cancelled and self._costs.copy_s:
            num_bytes = round(num_bytes * (1.0 - copy.left_s / self._costs.copy_s))
        return CopyRow(
            copy.key,
            copy.why,
            copy.step,
            num_bytes,
            copy.queued_s,
            copy.start_s,
            copy.end_s,
            copy.needed_s,
        )

    def _memory(self) -> MemoryResult:
        return predicted_memory(
            self._workload, self._spec.slots, self._shape, self._costs, largest_waves(self.log)
        )


def simulate(
    workload: Workload, spec: PolicySpec, shape: ModelShape, costs: CostModel
) -> RunRecord:
    """Run a workload under a policy on the virtual machine `costs`."""
    return Simulation(workload, spec, shape, costs).run()


def predicted_memory(
    workload: Workload,
    slots: int,
    shape: ModelShape,
    costs: CostModel,
    waves: Mapping[int, float],
) -> MemoryResult:
    """Peak device bytes by class: the step where KV cache and working tensors together are largest.

    `waves` are the largest wave shares by step; steps not in it ran in one wave.
    """
    needs = [
        (
            float(shape.kv_bytes_per_token * step.batch * step.context),
            costs.activation_bytes(
                step.phase, step.batch, step.tokens, step.context, waves.get(step.step, 1.0)
            ),
        )
        for step in workload.steps
    ]
    kv, activations = max(needs, key=sum, default=(0.0, 0.0))
    return MemoryResult(
        non_expert_weights=shape.non_expert_bytes,
        slots=slots * shape.expert_bytes,
        kv_cache=round(kv),
        activations=round(activations),
    )

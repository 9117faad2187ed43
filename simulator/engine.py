"""The reference engine: one run on a virtual clock, as SimPy processes.

Two processes share the decision core's commands: compute (walks the workload layer by layer) and the link
(demand before prefetch, chunk by chunk). The order of calls into the core is that of the runtime's driver
(runtime/experts.py and runtime/session.py). All it asks of a policy is whether it predicts at all, to charge
the time that takes.

Where two things happen at the same instant the link goes first: a chunk that ends just then has ended, and the
link has chosen the next one, before compute goes on. The compiled engine (compiled/) computes the same floats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy
from simpy.events import URGENT

from ..tracer.schema import WHOLE_STEP
from ..tracer.types import ExpertKey, ModelShape, Why
from .account import LAPS, CopyRow, RunRecord
from .activations import wave_rows
from .costs import NO_TRAFFIC, CostModel, Traffic
from .memory import PassSizes, predicted_memory
from .policy.base import Demand, Load
from .policy.future import Future
from .policy.log import Entry
from .policy.residency import Residency
from .policy.spec import PolicySpec
from .source import Source, source_of
from .whole_layers import as_demanded
from .workload import EventDemand, StepDemand, Workload


@dataclass(slots=True, eq=False)
class _Copy:
    """A copy on the virtual link."""

    key: ExpertKey
    why: Why
    step: int
    queued_s: float
    done: simpy.Event
    chunks: int
    chunks_left: int
    is_urgent: bool
    is_cancelled: bool = False
    is_done: bool = False
    start_s: float = -1.0
    end_s: float = -1.0
    needed_s: float | None = None


class _ChunkEnd(simpy.Event):
    """A timeout that comes before everything else of its instant."""

    def __init__(self, env: simpy.Environment, delay_s: float) -> None:
        super().__init__(env)
        self._ok, self._value = True, None
        env.schedule(self, URGENT, delay_s)


class Link:
    """The serial way to the device. One chunk at a time; demand goes first at every chunk."""

    def __init__(
        self, env: simpy.Environment, costs: CostModel, *, writes_back: bool = False
    ) -> None:
        self._env = env
        self._writes_back = writes_back
        self._demand: deque[_Copy] = deque()
        self._prefetch: deque[_Copy] = deque()
        self._asked = env.event()
        self._arrived: list[_Copy] = []
        self.ended: list[_Copy] = []
        self.busy_s = 0.0
        self.chunks = costs.chunks
        self._idle_chunk_s = costs.copy_s / costs.chunks
        # Under compute the same bytes take longer; the profile says by how much.
        self._busy_chunk_s = costs.busy_copy_s / costs.chunks
        self.is_computing = False
        env.process(self._run())

    def submit(self, step: int, loads: Sequence[Load]) -> list[_Copy]:
        """Ask for copies."""
        copies = [self._copy(step, load) for load in loads]
        for copy in copies:
            self._queue(copy).append(copy)
        if copies and not self._asked.triggered:
            self._asked.succeed()
        return copies

    def _copy(self, step: int, load: Load) -> _Copy:
        ways = 2 if self._writes_back and load.evicts is not None else 1
        return _Copy(
            load.key,
            load.why,
            step,
            self._env.now,
            self._env.event(),
            ways * self.chunks,
            ways * self.chunks,
            load.why == "demand",
        )

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

    def _queue(self, copy: _Copy) -> deque[_Copy]:
        return self._demand if copy.is_urgent else self._prefetch

    def _run(self) -> Generator[simpy.Event, Any, None]:
        while True:
            while not (self._demand or self._prefetch):  # asked for and cancelled at one instant
                self._asked = self._env.event()
                yield self._asked
            copy = self._demand.popleft() if self._demand else self._prefetch.popleft()
            began = self._env.now
            if copy.start_s < 0:
                copy.start_s = began
            yield _ChunkEnd(
                self._env, self._busy_chunk_s if self.is_computing else self._idle_chunk_s
            )
            self.busy_s += self._env.now - began
            copy.chunks_left -= 1
            if copy.chunks_left and not copy.is_cancelled:
                self._queue(copy).appendleft(copy)
            else:
                self._end(copy)

    def _end(self, copy: _Copy) -> None:
        copy.end_s = self._env.now
        self.ended.append(copy)
        if copy.is_cancelled:
            return
        copy.is_done = True
        if copy.why == "prefetch":
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
        self, source: Source, spec: PolicySpec, shape: ModelShape, costs: CostModel
    ) -> None:
        self._source = source
        self._shape = shape
        self._costs = costs
        self._spec = spec
        self.log: list[Entry] = []
        future = Future(source.events()) if "future" in spec.needs() else None
        self._core: Residency = spec.build(shape, future=future, log=self.log)
        self._depth = spec.lookahead_depth
        self._env = simpy.Environment()
        self._link = Link(self._env, costs, writes_back=spec.writes_back)
        self._flying: dict[ExpertKey, _Copy] = {}
        self._times = _Times()
        self._recent = NO_TRAFFIC
        self._walked: list[StepDemand] = []

    def run(self) -> RunRecord:
        """Walk the workload; returns what a real run would have recorded."""
        self._core.warm()  # before the clock starts, as in the runtime
        self._env.run(until=self._env.process(self._walk()))
        return RunRecord(
            steps=self._times.columns,
            copies=[self._copy_row(copy) for copy in self._link.ended],
            log=self.log,
            sequences=self._source.sequences(),
            memory=predicted_memory(
                PassSizes.of(self._walked, self._expert_bytes()),
                self._spec.slots,
                self._shape,
                self._costs,
            ),
            link_busy_s=self._link.busy_s,
        )

    def _expert_bytes(self) -> list[float]:
        """What the worst of each pass's events held."""
        layers = self._shape.num_moe_layers
        waves = wave_rows(self.log, layers)
        return [
            self._costs.activations(step.phase).experts.of_pass(
                step.tokens, waves.get(step.step, ()), layers
            )
            for step in self._walked
        ]

    def _walk(self) -> Generator[simpy.Event, Any, None]:
        while (found := self._source.next(self._env.now)) is not None:
            if isinstance(found, (int, float)):
                yield self._env.timeout(found)
                continue
            workload, place = found
            yield from self._step(workload, workload.step(place), place)
            self._source.ended(self._env.now)

    def _step(
        self, workload: Workload, step: StepDemand, place: int
    ) -> Generator[simpy.Event, Any, None]:
        start = self._env.now
        self._walked.append(step)
        before = {"schedule_s": 0.0}
        yield from self._compute(before, "schedule_s", step.overhead_s)
        events = workload.events_of(place)
        for number in events:
            event = workload.event(number, is_prefill=step.phase == "prefill")
            yield from self._event(workload, number, step, event, number == events.start)
        head_s = self._costs.head_s(step.phase, step.batch, step.tokens)
        yield from self._compute(dict.fromkeys(LAPS, 0.0), "experts_s", head_s)
        self._write(step, WHOLE_STEP, start, dict.fromkeys(LAPS, 0.0) | before, 0, 0)

    def _event(
        self,
        workload: Workload,
        number: int,
        step: StepDemand,
        event: EventDemand,
        is_first: bool,
    ) -> Generator[simpy.Event, Any, None]:
        costs, phase, start = self._costs, step.phase, self._env.now
        laps = dict.fromkeys((*LAPS, "schedule_s"), 0.0)
        mixer_s = costs.mixer_s(phase, step.tokens, step.context, self._recent)
        yield from self._compute(laps, "mixer_s", mixer_s)
        yield from self._compute(laps, "readback_s", costs.phase(phase).readback_s)
        answer = self._demand(step, event)
        loads = answer.misses - len(answer.on_cpu)
        decision_s = costs.decision_s(phase, len(event.experts), loads)
        yield from self._compute(laps, "decision_s", decision_s)
        cpu_end_s = self._env.now + self._cpu_s(answer, event)
        traffic = Traffic(loads, 0)
        on_device = len(event.experts) - len(answer.on_cpu)
        needed: list[_Copy] = []
        for wave in answer.waves:
            copies = self._link.submit(step.step, wave.loads)
            if wave is answer.waves[-1]:
                signals = workload.signals(number, self._depth, routed=self._spec.reads_routing)
                asked = self._core.predict(step.step, event.layer, signals)
                traffic = Traffic(loads, len(asked))
                if self._spec.predicts:
                    lookahead_s = costs.lookahead_s(
                        phase, step.tokens, len(asked), is_first=is_first
                    )
                    yield from self._compute(laps, "lookahead_s", lookahead_s)
                for copy in self._link.submit(step.step, asked):
                    self._flying[copy.key] = copy
            needed += [*self._hurry(wave.late), *copies]
            if wave.waits:
                yield from self._wait(laps, needed)
                needed = []
            if wave.experts:
                total_s = costs.experts_s(
                    phase,
                    step.tokens,
                    on_device,
                    traffic,
                    len(answer.waves),
                    self._core.pool_slots(event.layer),
                )
                share = len(wave.experts) / on_device
                yield from self._compute(laps, "experts_s", total_s * share)
        yield from self._wait_for_cpu(laps, cpu_end_s)
        self._core.release(step.step, event.layer)
        self._recent = traffic
        self._write(step, event.layer, start, laps, len(event.experts), len(answer.waves))

    def _demand(self, step: StepDemand, event: EventDemand) -> Demand:
        for copy in self._link.arrived():
            if self._flying.get(copy.key) is copy:
                del self._flying[copy.key]
                self._core.loaded(step.step, copy.key)
        answer = self._core.demand(step.step, event.layer, event.experts, event.facts)
        for key in answer.cancels:
            self._link.cancel(self._flying.pop(key))
        return answer

    def _cpu_s(self, answer: Demand, event: EventDemand) -> float:
        """Experts computed on the CPU, one after another."""
        tokens = dict(zip(event.experts, event.facts.tokens, strict=True))
        seconds = 0.0
        for expert in answer.on_cpu:
            seconds += self._costs.cpu_expert(1, tokens[expert])
        return seconds

    def _compute(
        self, laps: dict[str, float], name: str, seconds: float
    ) -> Generator[simpy.Event, Any, None]:
        if seconds > 0:
            self._link.is_computing = True
            yield self._env.timeout(seconds)
            self._link.is_computing = False
            laps[name] += seconds

    def _hurry(self, late: Sequence[ExpertKey]) -> list[_Copy]:
        flying = [self._flying.pop(key) for key in late]
        for copy in flying:
            self._link.promote(copy)
        return flying

    def _wait(
        self, laps: dict[str, float], needed: Sequence[_Copy]
    ) -> Generator[simpy.Event, Any, None]:
        began = self._env.now
        for copy in needed:
            copy.needed_s = began
        pending = [copy.done for copy in needed if not copy.is_done]
        if pending:
            yield self._env.all_of(pending)
            if self._costs.wake_s > 0:
                yield self._env.timeout(self._costs.wake_s)
        laps["stall_s"] += self._env.now - began

    def _wait_for_cpu(
        self, laps: dict[str, float], cpu_end_s: float
    ) -> Generator[simpy.Event, Any, None]:
        began = self._env.now
        if cpu_end_s > began:
            yield self._env.timeout(cpu_end_s - began)
            laps["cpu_s"] += self._env.now - began

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
        moved = copy.chunks - copy.chunks_left
        return CopyRow(
            copy.key,
            copy.why,
            copy.step,
            self._shape.expert_bytes * moved // self._link.chunks,
            copy.queued_s,
            copy.start_s,
            copy.end_s,
            copy.needed_s,
        )


def simulate(
    source: Workload | Source, spec: PolicySpec, shape: ModelShape, costs: CostModel
) -> RunRecord:
    """Run a workload (or what arrives) under a policy on the virtual machine `costs`."""
    return Simulation(source_of(as_demanded(source, spec)), spec, shape, costs).run()

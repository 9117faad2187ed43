"""Requests served as they arrive, in continuous batches, on a real model under a policy.

Who is fed what in which pass is decided by the very object that the simulator asks (simulator/serving.py), told the
time by the clock on the wall: sequences join and leave at every pass, and a pass holds a token of every sequence that
generates and chunks of prompts, without padding (serving_passes.py). While nobody is there the loop sleeps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..simulator.account import RunRecord
from ..simulator.arrivals import Arrival, Arrivals
from ..simulator.policy.spec import PolicySpec
from ..simulator.regroup import require_arrivals
from ..simulator.result import MemoryResult, Result
from ..simulator.serving import Serving, ServingSettings
from ..simulator.token_table import Pass, TokenTable
from ..tracer.errors import UsageError
from ..tracer.generate import Generated, Prompt, StepObserver
from ..tracer.load import LoadedModel
from ..tracer.memory import METERED_PASSES, peaks_of
from .machine import Machine, no_collector, parameter_bytes
from .serving_passes import PassRunner
from .session import Session

NO_MEMORY = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)
"""For runs whose memory is not asked for."""
_WARM_UP_TOKENS = 3


class Watch(Protocol):
    """Sees a run go on. Called after every pass: it must be quick."""

    def __call__(self, finished: int, in_progress: int, waiting: int) -> None:
        """So many requests have been served, are at work and have not begun."""
        ...


def nobody(finished: int, in_progress: int, waiting: int) -> None:
    """Watches nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests to be: prompts numbered from 0 in order of arrival, the tokens each is to get, and when they come.

    A request ends before that at a token of `eos_ids`. Raises UsageError for prompts with images.
    """

    requests: Sequence[Prompt]
    new_tokens: Sequence[int]
    arrivals: Arrivals
    settings: ServingSettings
    eos_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if any(prompt.inputs for prompt in self.requests):
            raise UsageError("Requests with images cannot share passes. Leave --arrivals out.")

    def serving(self, spec: PolicySpec) -> Serving:
        """What decides of the passes, to be run once."""
        require_arrivals(spec)
        table = TokenTable.of_lengths(
            [len(prompt.token_ids) for prompt in self.requests],
            [count - 1 for count in self.new_tokens],
        )
        settings = replace(self.settings, lengths="trace")  # they are in the table already
        return Serving(table, self.arrivals, spec.build_scheduler(), settings)


@dataclass(frozen=True, slots=True)
class Served:
    """A run that is over: its raw rows, its text by request, who was served when, and in which passes."""

    record: RunRecord
    outputs: list[Generated]
    serving: Serving
    passes: Sequence[tuple[Pass, tuple[int, ...]]]

    def with_memory(self, memory: MemoryResult) -> Served:
        """The same run with what was measured apart; its KV cache is its own."""
        found = replace(memory, kv_cache=self.record.memory.kv_cache)
        return replace(self, record=replace(self.record, memory=found))


class ServingLoop:
    """Serves the requests of a load under a session. Good for one run.

    `observer` sees the passes, if it is not the session itself. `kv_positions` are those of the KV cache by step, and
    `passes` all that was run, each with the requests that were in progress.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        session: Session,
        serving: Serving,
        load: Load,
        *,
        observer: StepObserver | None = None,
    ) -> None:
        self._session, self._serving = session, serving
        self._runner = PassRunner(loaded, load.requests, observer or session)
        self._eos_ids = load.eos_ids
        self._finished = 0
        self.kv_positions = self._runner.kv_positions
        self.passes: list[tuple[Pass, tuple[int, ...]]] = []

    @torch.inference_mode()
    def run(self, watch: Watch = nobody) -> list[Generated]:
        """Serve until all are finished; outputs in order of arrival."""
        serving, timer = self._serving, self._session.timer
        began = timer.now()
        while True:
            self._session.prepare()
            found = serving.plan(timer.now() - began)
            self._runner.keep(serving.in_progress)
            if found is None:
                break
            if not isinstance(found, Pass):
                time.sleep(found)
                continue
            self.passes.append((found, serving.in_progress))
            for number, token in self._runner.run(found):
                if token in self._eos_ids:
                    self._runner.outputs[number].finish = "eos"
                    serving.finish(number)
            serving.ended(timer.now() - began)
            in_progress = len(serving.in_progress)
            self._finished += len(self.passes[-1][1]) - in_progress
            watch(self._finished, in_progress, serving.waiting)
        for times in serving.sequences():
            self._runner.outputs[times.sequence].token_s = list(times.token_s)
        return self._runner.outputs


def serve(
    machine: Machine,
    spec: PolicySpec,
    load: Load,
    *,
    memory: MemoryResult | None = None,
    watch: Watch = nobody,
) -> Served:
    """Serve a load under a policy and keep the raw rows. A short warm-up comes before and is dropped.

    Raises UsageError for a policy that cannot serve arrivals, and a model whose sequences cannot share passes.
    """
    serving = load.serving(spec)
    _run_some(machine, spec, load, 1, _WARM_UP_TOKENS)
    measured = memory or peak_memory(machine, spec, load)
    with machine.session(spec) as session, no_collector():
        loop = ServingLoop(machine.loaded, session, serving, load)
        outputs = loop.run(watch)
        positions = max(loop.kv_positions.values(), default=0)
        kv_bytes = positions * machine.loaded.shape.kv_bytes_per_token
        record = RunRecord(
            steps=session.take_steps(),
            copies=session.copies(),
            log=session.log,
            sequences=serving.sequences(),
            memory=replace(measured, kv_cache=kv_bytes),
            routing=session.routing.result() if session.routing is not None else None,
        )
    return Served(record, outputs, serving, loop.passes)


def result_of(
    machine: Machine, spec: PolicySpec, served: Served, *, same_tokens: bool | None = None
) -> Result:
    """Add a run up, how its requests were served included, and check that its log replays."""
    return machine.result(
        served.record,
        spec,
        batch_size=served.serving.settings.max_batch,
        same_tokens=same_tokens,
        arrivals=served.serving.result(),
    )


def peak_memory(machine: Machine, spec: PolicySpec, load: Load) -> MemoryResult:
    """Measure working tensors in passes apart from the timed ones: the longest requests, as many as run at once.

    The KV cache is left out: a run counts its own, position by position.
    """
    longest = sorted(load.requests, key=lambda prompt: -len(prompt.token_ids))
    some = _together(load, longest[: load.settings.max_batch], METERED_PASSES)
    per_token = machine.loaded.shape.kv_bytes_per_token
    with machine.session(spec) as session:
        loops: list[ServingLoop] = []

        def generate(watch: StepObserver) -> None:
            loop = ServingLoop(machine.loaded, session, some.serving(spec), some, observer=watch)
            loops.append(loop)
            loop.run()

        found = peaks_of(generate, machine.device, session)
        slots = session.store.arena.num_bytes
    positions = loops[0].kv_positions
    working = [peak - positions[info.step] * per_token for info, peak in found]
    return MemoryResult(
        non_expert_weights=parameter_bytes(machine.loaded),
        slots=slots,
        kv_cache=0,
        activations=max([0, *working]),
    )


def peak_in_passes(
    machine: Machine,
    spec: PolicySpec,
    load: Load,
    passes: Sequence[tuple[Pass, tuple[int, ...]]],
) -> MemoryResult:
    """Measure working tensors in the very passes of a run, run again apart from the timed ones.

    They come on top of the most positions that the KV cache held, which is left out: a run counts its own.
    """
    per_token = machine.loaded.shape.kv_bytes_per_token
    with machine.session(spec) as session:
        runners: list[PassRunner] = []

        def run(watch: StepObserver) -> None:
            runner = PassRunner(machine.loaded, load.requests, watch)
            runners.append(runner)
            with torch.inference_mode():
                for found, in_progress in passes:
                    runner.keep(in_progress)
                    runner.run(found)

        peak = max((peak for _, peak in peaks_of(run, machine.device, session)), default=0)
        slots = session.store.arena.num_bytes
    kv_bytes = max(runners[0].kv_positions.values(), default=0) * per_token
    return MemoryResult(
        non_expert_weights=parameter_bytes(machine.loaded),
        slots=slots,
        kv_cache=0,
        activations=max(0, peak - kv_bytes),
    )


def _run_some(machine: Machine, spec: PolicySpec, load: Load, count: int, tokens: int) -> None:
    some = _together(load, load.requests[:count], tokens)
    with machine.session(spec) as session:
        ServingLoop(machine.loaded, session, some.serving(spec), some).run()


def _together(load: Load, prompts: Sequence[Prompt], tokens: int) -> Load:
    """Some requests that all come at once and get so many tokens each."""
    return Load(
        requests=[replace(prompt, sequence=number) for number, prompt in enumerate(prompts)],
        new_tokens=[tokens] * len(prompts),
        arrivals=Arrivals(requests=(Arrival(0.0),) * len(prompts), description="all at once"),
        settings=load.settings,
    )

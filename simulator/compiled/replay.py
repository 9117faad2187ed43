"""Runs a workload under a policy on the compiled engine: what engine.simulate does, summed up by pass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from ...tracer.types import ExpertKey, ModelShape, Phase
from ..account import LAPS, RunTotals, SequenceTimes, StepTotals
from ..costs import CostModel
from ..memory import PassSizes, predicted_memory
from ..policy.future import NEVER, Future
from ..policy.registry import Registry, caches, misses, predictors
from ..policy.residency import Residency
from ..policy.spec import PolicySpec
from ..result import PrefetchResult
from ..source import recorded_times
from ..whole_layers import whole_layers
from ..workload import Workload
from . import core
from .jit import array_maker, compiled
from .kernel import run_steps
from .lists import make_lists
from .state import (
    ASKED,
    CLOCK,
    COPY,
    COSTS,
    EXPERT,
    KINDS,
    MACHINE,
    MEMORY,
    MISSES,
    MULTI_FACTOR,
    OUT,
    POOL,
    ROW,
    RULES,
    SCRATCH,
    STEP,
    Records,
    Run,
    Slots,
    Wire,
    Work,
)
from .tapes import Tape, tape_of

_PARAMS = {
    "slru": ("protected",),
    "two_level_lru": ("window",),
    "score": ("alpha",),
    "multi_factor": ("w_recency", "w_frequency", "w_distance"),
}


def has_twin(spec: PolicySpec) -> bool:
    """Whether every member that touches slots has a compiled twin, and what the predictor says can be taped."""
    if hasattr(predictors.get(spec.predictor.name), "hear"):
        return False
    return _is_ours(caches, spec.cache.name, KINDS) and _is_ours(misses, spec.misses.name, MISSES)


def _is_ours(registry: Registry, name: str, twins: tuple[str, ...]) -> bool:
    return name in twins and registry.get(name).__module__.startswith(registry.package)


def replay(
    workload: Workload,
    spec: PolicySpec,
    shape: ModelShape,
    costs: CostModel,
    *,
    tape: Tape | None = None,
) -> RunTotals:
    """Replay a recorded workload. `tape` are the predictor's answers, if somebody has them already."""
    workload = whole_layers(workload) if spec.loads_whole_layers else workload
    run = _recorded_run(workload, spec, shape, costs, tape or tape_of(workload, spec), rows=0)
    run_steps(run, 0, len(workload.steps))
    return _totals(run, workload, spec, shape, costs)


def replay_copies(
    workload: Workload, spec: PolicySpec, shape: ModelShape, costs: CostModel
) -> tuple[RunTotals, Records]:
    """Replay and keep every copy, in order of asking (state.ROW). It runs twice: first to count them."""
    workload = whole_layers(workload) if spec.loads_whole_layers else workload
    tape = tape_of(workload, spec)
    counted = _recorded_run(workload, spec, shape, costs, tape, rows=0)
    run_steps(counted, 0, len(workload.steps))
    rows = int(counted.wire.clock["rows"][0])
    run = _recorded_run(workload, spec, shape, costs, tape, rows=rows)
    run_steps(run, 0, len(workload.steps))
    return _totals(run, workload, spec, shape, costs), run.wire.rows


def _recorded_run(
    workload: Workload,
    spec: PolicySpec,
    shape: ModelShape,
    costs: CostModel,
    tape: Tape,
    *,
    rows: int,
) -> Run:
    """A run before its first step."""
    work, first_use = work_of(workload, tape, steps_of(workload)), None
    if "future" in caches.get(spec.cache.name).needs:
        next_use, first_use = _next_use(work.ptr, work.keys, shape.total_experts, NEVER)
        work = work._replace(next_use=next_use)
    run = make_run(work, spec, shape, costs, first_use)
    return run._replace(
        wire=run.wire._replace(out=np.zeros(len(workload.steps), OUT), rows=np.zeros(rows, ROW)),
        asked=asked_room(tape),
    )


def _totals(
    run: Run, workload: Workload, spec: PolicySpec, shape: ModelShape, costs: CostModel
) -> RunTotals:
    out, steps = run.wire.out, workload.steps
    sizes = np.diff(workload.ptr)
    per_step = np.repeat(np.arange(len(steps)), np.diff(workload.event_ptr))
    walked = Walked(
        steps.is_decode,
        steps.batch,
        steps.tokens,
        steps.context,
        np.diff(workload.event_ptr),
        np.bincount(per_step, sizes, len(steps)).astype(np.int64),
        run.work.steps["kv_beside"],
        run.work.steps["overhead_s"],
    )
    sequences = recorded_times(workload, out["start_s"], out["end_s"])
    return add_up(run, walked, sequences, spec, shape, costs)


class Walked(NamedTuple):
    """Sizes of the passes of a finished run: [passes] each; `distinct` is summed over a pass's `events`."""

    is_decode: np.ndarray
    batch: np.ndarray
    tokens: np.ndarray
    context: np.ndarray
    events: np.ndarray
    distinct: np.ndarray
    kv_beside: np.ndarray
    overhead_s: np.ndarray


def add_up(
    run: Run,
    walked: Walked,
    sequences: Sequence[SequenceTimes],
    spec: PolicySpec,
    shape: ModelShape,
    costs: CostModel,
) -> RunTotals:
    """Add a finished run up."""
    out, clock = run.wire.out, run.wire.clock[0]
    known = clock["useful"] + clock["late"] + clock["cancelled"]
    passes = PassSizes(
        walked.is_decode,
        walked.batch,
        walked.tokens,
        walked.context,
        out["expert_bytes"],
        walked.kv_beside,
    )
    return RunTotals(
        steps=StepTotals(
            is_decode=walked.is_decode,
            total_s=out["end_s"] - out["start_s"],
            laps_s={name: out["laps"][:, lap] for lap, name in enumerate(LAPS)},
            schedule_s=walked.overhead_s,
            events=walked.events,
            distinct=walked.distinct,
            hits=out["hits"],
            lates=out["lates"],
            misses=out["misses"],
            bytes_moved=out["bytes_moved"],
        ),
        prefetch=PrefetchResult(
            issued=int(clock["issued"]),
            useful=int(clock["useful"]),
            late=int(clock["late"]),
            wasted=int(clock["issued"] - known),
            harmful=int(clock["harmful"]),
            cancelled=int(clock["cancelled"]),
        ),
        sequences=sequences,
        link_busy_s=float(clock["busy_s"]),
        memory=predicted_memory(passes, spec.slots, shape, costs),
    )


def make_run(
    work: Work,
    spec: PolicySpec,
    shape: ModelShape,
    costs: CostModel,
    first_use: np.ndarray | None = None,
) -> Run:
    """Lay out the arrays of a run and put what the cache warms with into its slots.

    `first_use` is the number of the first event that demands each expert, for caches that know the future. Room for
    totals by step, single copies and predictions is the caller's to add.
    """
    memory = _memory(spec, shape)
    if first_use is not None:
        memory["next_use"] = first_use
    # Only its pools and what it warms with are asked for.
    live = spec.build(shape, future=_FirstUses(memory["next_use"], shape.num_experts))
    run = Run(
        work=work,
        costs=_costs(costs),
        slots=_slots(live, spec, shape, memory),
        wire=_wire(costs, shape, spec),
        scratch=np.zeros(2 * shape.num_experts + 2, SCRATCH),
        asked=np.zeros(1, ASKED),
    )
    warm = [load.key.layer * shape.num_experts + load.key.expert for load in live.warm()]
    _settle_all(run.slots, np.asarray(warm, dtype=np.int64))
    return run


def asked_room(tape: Tape) -> Records:
    """Room for the prefetches of the longest prediction."""
    return np.zeros(int(np.diff(tape.ptr).max(initial=0)) + 1, ASKED)


class _FirstUses(Future):
    """The future as seen before the first event, from an array by expert."""

    def __init__(self, first_use: np.ndarray, num_experts: int) -> None:
        super().__init__([])
        self._first_use, self._num_experts = first_use, num_experts

    def next_use(self, key: ExpertKey) -> int:
        return int(self._first_use[key.layer * self._num_experts + key.expert])


@compiled
def _settle_all(slots: Slots, keys: np.ndarray) -> None:
    for key in keys:
        core.settle(slots, core.pool_of(slots, key), key)


@array_maker
def _next_use(
    ptr: np.ndarray, keys: np.ndarray, total: int, never: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each demand the number of the next event that demands the same expert; and each one's first."""
    upcoming = np.full(total, never, np.int64)
    found = np.empty(len(keys), np.int64)
    for event in range(len(ptr) - 2, -1, -1):
        for place in range(ptr[event], ptr[event + 1]):
            found[place] = upcoming[keys[place]]
            upcoming[keys[place]] = event
    return found, upcoming


def steps_of(workload: Workload) -> Records:
    """Sizes of a workload's passes, and where their events are."""
    found = np.zeros(len(workload.steps), STEP)
    for name in ("is_decode", "batch", "tokens", "context"):
        found[name] = getattr(workload.steps, name)
    for name in ("overhead_s", "kv_beside"):
        values = getattr(workload.steps, name)
        found[name] = 0 if values is None else values
    found["first_event"], found["last_event"] = workload.event_ptr[:-1], workload.event_ptr[1:]
    return found


def work_of(workload: Workload, tape: Tape, steps: Records) -> Work:
    """A workload as the loops read it, without knowledge of the future."""
    return Work(
        steps=steps,
        layer=workload.layer,
        ptr=workload.ptr,
        keys=workload.keys(),
        counts=workload.counts,
        weights=np.empty(0) if workload.weights is None else workload.weights,
        next_use=np.empty(0, np.int64),
        guess_ptr=tape.ptr,
        guess_keys=tape.keys,
    )


def _costs(costs: CostModel) -> np.ndarray:
    """Rows: prefill, decode."""
    found = np.zeros(2, COSTS)
    phases: tuple[Phase, Phase] = ("prefill", "decode")
    for row, name_of_phase in enumerate(phases):
        phase, held = costs.phase(name_of_phase), costs.activations(name_of_phase).experts
        for field in fields(held):
            found[field.name][row] = getattr(held, field.name)
        for name in ("mixer", "experts", "head", "decision", "lookahead"):
            found[name][row] = getattr(phase, name).weights
        found["readback_s"][row] = phase.readback_s
        found["pass_lookahead_s"][row] = phase.pass_lookahead_s
    return found


def _slots(live: Residency, spec: PolicySpec, shape: ModelShape, memory: Records) -> Slots:
    pools = np.zeros(len(live.pools), POOL)
    pool_of = np.zeros(shape.num_moe_layers, np.int64)
    for number, pool in enumerate(live.pools):
        pool_of[list(pool.layers)] = number
        pools["size"][number], pools["staging"][number] = pool.size, pool.staging
    experts = np.zeros(shape.total_experts, EXPERT)
    for name in ("copy", "victim_of", "blamed"):
        experts[name] = -1
    room = pools["size"] + pools["staging"]
    pools["start"] = np.cumsum(room) - room
    for name in ("layer", "in_event", "hand"):
        pools[name] = -1
    return Slots(
        rules=_rules(spec, shape),
        pool_of=pool_of,
        pools=pools,
        members=np.zeros(int(room.sum()), np.int64),
        rank_a=np.zeros(int(room.sum())),
        rank_b=np.zeros(int(room.sum())),
        rank_layer=np.zeros(int(room.sum())),
        experts=experts,
        memory=memory,
        lists=make_lists(shape.total_experts, 4 * len(live.pools)),
        loading=make_lists(shape.total_experts, 1),
    )


def _memory(spec: PolicySpec, shape: ModelShape) -> np.ndarray:
    found = np.zeros(shape.total_experts, MEMORY)
    # Event numbers start at 1; caches that compare them must not find one before.
    found["event"] = 0 if spec.cache.name == KINDS[MULTI_FACTOR] else -5
    if "popularity" in spec.cache.params:
        found["popularity"] = np.ravel(spec.cache.params["popularity"])
    return found


def _rules(spec: PolicySpec, shape: ModelShape) -> np.ndarray:
    found = np.zeros(1, RULES)
    defaults = inspect.signature(caches.get(spec.cache.name)).parameters
    for place, name in enumerate(_PARAMS.get(spec.cache.name, ())):
        found["params"][0, place] = spec.cache.params.get(name, defaults[name].default)
    given: dict[str, Any] = {
        "kind": KINDS.index(spec.cache.name),
        "misses": MISSES.index(spec.misses.name),
        "predicts": spec.predicts,
        "num_experts": shape.num_experts,
        **spec.misses.params,
    }
    for name, value in given.items():
        found[name] = value
    return found


def _wire(costs: CostModel, shape: ModelShape, spec: PolicySpec) -> Wire:
    machine = np.zeros(1, MACHINE)
    cpu_expert_s, cpu_token_s = costs.cpu_expert.weights
    given = {
        "cpu_expert_s": cpu_expert_s,
        "cpu_token_s": cpu_token_s,
        "idle_chunk_s": costs.copy_s / costs.chunks,
        "busy_chunk_s": costs.busy_copy_s / costs.chunks,
        "wake_s": costs.wake_s,
        "group_s": costs.group_s,
        "chunks": costs.chunks,
        "writes_back": spec.writes_back,
        "expert_bytes": shape.expert_bytes,
        "num_experts": costs.num_experts,
        "num_layers": shape.num_moe_layers,
    }
    for name, value in given.items():
        machine[name] = value
    # Each expert can have one live copy and one that was given up but still runs; a few more do no harm.
    copies = np.zeros(2 * shape.total_experts + 8, COPY)
    copies["free"] = np.arange(len(copies))[::-1]
    clock = np.zeros(1, CLOCK)
    clock["current"], clock["free"] = -1, len(copies)
    return Wire(
        machine=machine,
        clock=clock,
        copies=copies,
        queues=make_lists(len(copies), 2),
        out=np.zeros(0, OUT),
        rows=np.zeros(0, ROW),
    )

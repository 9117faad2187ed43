"""Turns what a run recorded into a Result: the same arithmetic for simulated and real runs.

Both drivers hand over the same raw rows (steps, copies, the decision log, token times), so a difference
between predicted and measured can only come from the rows, never from how they were added up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..tracer.schema import WHOLE_STEP
from ..tracer.types import ExpertKey, ModelShape, Origin, Provenance, Why
from .accuracy import logged_accuracy
from .outcomes import prefetch_outcomes
from .policy.log import Entry
from .policy.spec import PolicySpec
from .result import (
    Accuracy,
    ArrivalResult,
    Bounds,
    MemoryResult,
    Percentiles,
    PhaseResult,
    PrefetchResult,
    RegroupingResult,
    Result,
    RoutingResult,
    Source,
    TimeSplit,
)

LAPS: tuple[str, ...] = (
    "mixer_s",
    "readback_s",
    "decision_s",
    "lookahead_s",
    "stall_s",
    "experts_s",
    "cpu_s",
)
"""Parts of a layer's time, in the order they are named in results."""


@dataclass(frozen=True, slots=True)
class CopyRow:
    """One copy that crossed the link; times in seconds on the run's clock."""

    key: ExpertKey
    why: Why
    step: int
    num_bytes: int
    queued_s: float
    start_s: float
    end_s: float
    needed_s: float | None


@dataclass(frozen=True, slots=True)
class SequenceTimes:
    """When one sequence's tokens appeared, in seconds from the start of its first pass or its arrival."""

    sequence: int
    prompt_tokens: int
    token_s: tuple[float, ...]
    is_request: bool = False
    """Times count from its arrival, so that its first token was waited for even without a prompt."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Raw rows of one run. `steps` are columns as in the trace's steps table.

    `link_busy_s` is the time the link spent on copies, if the run counted it; else it is worked out of them.
    `regrouping` is what became of batches that were regrouped, `routing` of the router's choices under a lossy one.
    """

    steps: Mapping[str, Sequence[Any]]
    copies: Sequence[CopyRow]
    log: Sequence[Entry]
    sequences: Sequence[SequenceTimes]
    memory: MemoryResult
    link_busy_s: float | None = None
    regrouping: RegroupingResult | None = None
    routing: RoutingResult | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTotals:
    """What each forward pass took, demanded and moved: one array entry per pass.

    `laps_s` are sums over the pass's layers by name (LAPS), `schedule_s` is spent before the pass on who runs in which
    batch and counts in `total_s`. `bytes_moved` counts copies by the pass that asked for
    them, those before the first pass left out.
    """

    is_decode: np.ndarray
    total_s: np.ndarray
    laps_s: Mapping[str, np.ndarray]
    schedule_s: np.ndarray
    events: np.ndarray
    distinct: np.ndarray
    hits: np.ndarray
    lates: np.ndarray
    misses: np.ndarray
    bytes_moved: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTotals:
    """A run added up by pass: all that a Result is made of, whichever engine or machine it ran on."""

    steps: StepTotals
    prefetch: PrefetchResult
    sequences: Sequence[SequenceTimes]
    link_busy_s: float
    memory: MemoryResult
    accuracy: Accuracy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What a result says about where it comes from."""

    source: Source
    spec: PolicySpec
    shape: ModelShape
    trace_id: str
    device: str
    link: str
    link_origin: Origin
    batch_size: int
    provenance: Provenance
    warnings: tuple[str, ...] = ()


def summarize(
    run: RunRecord | RunTotals,
    context: RunContext,
    bounds: Bounds | None = None,
    arrivals: ArrivalResult | None = None,
) -> Result:
    """Add a run up, idle time included where requests arrived. Raises nothing: empty runs give zeros."""
    totals = totals_of(run) if isinstance(run, RunRecord) else run
    steps = totals.steps
    prefill = _phase(totals, ~steps.is_decode, sum(s.prompt_tokens for s in totals.sequences))
    # The first token comes from the prompt's pass, if there was one.
    decoded = sum(len(s.token_s) - (s.prompt_tokens > 0) for s in totals.sequences if s.token_s)
    decoded -= arrivals.mixed_tokens if arrivals else 0
    decode = _phase(totals, steps.is_decode, decoded)
    generated = sum(len(sequence.token_s) for sequence in totals.sequences)
    total_s = arrivals.span_s if arrivals else float(steps.total_s.sum())
    demanded = max(1, prefill.demanded + decode.demanded)
    ttft = percentiles(
        [s.token_s[0] for s in totals.sequences if s.token_s and (s.prompt_tokens or s.is_request)]
    )
    tpot = percentiles(
        [
            (s.token_s[-1] - s.token_s[0]) / (len(s.token_s) - 1)
            for s in totals.sequences
            if len(s.token_s) > 1
        ]
    )
    return Result(
        source=context.source,
        label=context.spec.label,
        policy=context.spec.describe(),
        policy_hash=context.spec.behaviour_hash(),
        trace_id=context.trace_id,
        model_id=context.shape.model_id,
        device=context.device,
        link=context.link,
        link_origin=context.link_origin,
        slots=context.spec.slots,
        total_experts=context.shape.total_experts,
        batch_size=context.batch_size,
        tokens_per_s=_ratio(generated, total_s),
        ttft_s=ttft.mean,
        tpot_s=tpot.mean,
        ttft=ttft,
        tpot=tpot,
        hit_rate=(prefill.hits + decode.hits) / demanded,
        late_rate=(prefill.lates + decode.lates) / demanded,
        miss_rate=(prefill.misses + decode.misses) / demanded,
        bytes_per_token=_ratio(prefill.bytes_moved + decode.bytes_moved, generated),
        stall_s=prefill.stall_s + decode.stall_s,
        link_busy_share=_ratio(totals.link_busy_s, total_s),
        slots_ratio=decode.mean_distinct / (context.spec.slots / context.shape.num_moe_layers),
        peak_device_bytes=totals.memory.peak_device_bytes,
        memory=totals.memory,
        time=_split(steps),
        prefill=prefill,
        decode=decode,
        prefetch=totals.prefetch,
        bounds=bounds or Bounds(),
        accuracy=totals.accuracy,
        arrivals=arrivals,
        provenance=context.provenance,
        warnings=context.warnings,
    )


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """Mean and percentiles of a latency; zeros if there is nothing to measure."""
    if not seconds:
        return Percentiles(mean=0.0, p50=0.0, p95=0.0, p99=0.0)
    p50, p95, p99 = np.quantile(seconds, [0.5, 0.95, 0.99])
    return Percentiles(mean=float(np.mean(seconds)), p50=float(p50), p95=float(p95), p99=float(p99))


def totals_of(record: RunRecord) -> RunTotals:
    """Add the raw rows of a run up by pass."""
    columns = record.steps
    number = np.asarray(columns.get("step", ()), dtype=np.int64)
    is_whole = np.asarray(columns.get("layer", ()), dtype=np.int64) == WHOLE_STEP
    phases = np.asarray(columns.get("phase", ()), dtype=object)
    whole = number[is_whole]
    order = np.argsort(whole, kind="stable")
    place = order[np.searchsorted(whole[order], number[~is_whole])] if len(whole) else number[:0]

    def by_layer(name: str) -> np.ndarray:
        values = np.asarray(columns.get(name, np.zeros(len(number))), dtype=np.float64)
        return np.bincount(place, values[~is_whole], len(whole))

    where = {step: position for position, step in enumerate(whole.tolist())}
    outcomes = _outcomes(record.log, where)
    return RunTotals(
        steps=StepTotals(
            is_decode=phases[is_whole] == "decode",
            total_s=np.asarray(columns.get("total_s", ()), dtype=np.float64)[is_whole],
            laps_s={name: by_layer(name) for name in LAPS},
            schedule_s=np.asarray(columns.get("schedule_s", np.zeros(len(number))), np.float64)[
                is_whole
            ],
            events=np.bincount(place, minlength=len(whole)),
            distinct=by_layer("distinct").astype(np.int64),
            hits=outcomes["hit"],
            lates=outcomes["late"],
            misses=outcomes["miss"] + outcomes["cpu"],
            bytes_moved=_moved(record.copies, where),
        ),
        prefetch=prefetch_outcomes(record.log),
        sequences=record.sequences,
        link_busy_s=covered_s(record.copies) if record.link_busy_s is None else record.link_busy_s,
        memory=record.memory,
        accuracy=logged_accuracy(record.log),
    )


def _outcomes(log: Sequence[Entry], where: Mapping[int, int]) -> dict[str, np.ndarray]:
    found = {name: np.zeros(len(where), dtype=np.int64) for name in ("hit", "late", "miss", "cpu")}
    for entry in log:
        if entry.kind == "event" and entry.step in where:
            found[entry.detail][where[entry.step]] += 1
    return found


def _moved(copies: Sequence[CopyRow], where: Mapping[int, int]) -> np.ndarray:
    moved = np.zeros(len(where), dtype=np.int64)
    for copy in copies:
        if copy.why != "warm" and copy.step in where:
            moved[where[copy.step]] += copy.num_bytes
    return moved


def covered_s(copies: Sequence[CopyRow]) -> float:
    """Length of the union: an interrupted copy spans the one that went before it."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted((c.start_s, c.end_s) for c in copies if c.why != "warm"):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _split(steps: StepTotals) -> TimeSplit:
    parts = {name: float(seconds.sum()) for name, seconds in steps.laps_s.items()}
    parts["schedule_s"] = float(steps.schedule_s.sum())
    total = float(steps.total_s.sum())
    return TimeSplit(total_s=total, other_s=total - sum(parts.values()), **parts)


def _phase(totals: RunTotals, is_phase: np.ndarray, tokens: int) -> PhaseResult:
    steps = totals.steps

    def count(values: np.ndarray) -> int:
        return int(values[is_phase].sum())

    hits, lates, misses = count(steps.hits), count(steps.lates), count(steps.misses)
    demanded, moved = hits + lates + misses, count(steps.bytes_moved)
    seconds = float(steps.total_s[is_phase].sum())
    return PhaseResult(
        steps=int(is_phase.sum()),
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=_ratio(tokens, seconds),
        demanded=demanded,
        hits=hits,
        lates=lates,
        misses=misses,
        hit_rate=_ratio(hits, demanded),
        late_rate=_ratio(lates, demanded),
        miss_rate=_ratio(misses, demanded),
        bytes_moved=moved,
        bytes_per_token=_ratio(moved, tokens),
        stall_s=float(steps.laps_s["stall_s"][is_phase].sum()),
        mean_distinct=_ratio(count(steps.distinct), count(steps.events)),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0

"""Turns what a run recorded into a Result: the same arithmetic for simulated and real runs.

Both drivers hand over the same raw rows (steps, copies, the decision log, token times), so a difference
between predicted and measured can only come from the rows, never from how they were added up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..tracer.schema import WHOLE_STEP
from ..tracer.types import ExpertKey, ModelShape, Origin, Provenance, Why
from .policy.log import Entry
from .policy.spec import PolicySpec
from .result import (
    Bounds,
    MemoryResult,
    Percentiles,
    PhaseResult,
    PrefetchResult,
    Result,
    Source,
    TimeSplit,
)


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
    """When one sequence's tokens appeared, in seconds from the start of its batch."""

    sequence: int
    prompt_tokens: int
    token_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Raw rows of one run. `steps` are columns as in the trace's steps table."""

    steps: Mapping[str, Sequence[Any]]
    copies: Sequence[CopyRow]
    log: Sequence[Entry]
    sequences: Sequence[SequenceTimes]
    memory: MemoryResult


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


def summarize(record: RunRecord, context: RunContext, bounds: Bounds | None = None) -> Result:
    """Add a run up. Raises nothing: empty runs give zeros."""
    steps = _Steps(record.steps)
    prefill = _phase(record, steps, "prefill", context.shape)
    decode = _phase(record, steps, "decode", context.shape)
    generated = sum(len(sequence.token_s) for sequence in record.sequences)
    total_s = float(steps.whole_s.sum())
    demanded = max(1, prefill.demanded + decode.demanded)
    ttft = percentiles([s.token_s[0] for s in record.sequences if s.token_s])
    tpot = percentiles(
        [
            (s.token_s[-1] - s.token_s[0]) / (len(s.token_s) - 1)
            for s in record.sequences
            if len(s.token_s) > 1
        ]
    )
    bytes_moved = prefill.bytes_moved + decode.bytes_moved
    busy_s = _covered_s([(c.start_s, c.end_s) for c in record.copies if c.why != "warm"])
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
        bytes_per_token=_ratio(bytes_moved, generated),
        stall_s=prefill.stall_s + decode.stall_s,
        link_busy_share=_ratio(busy_s, total_s),
        slots_ratio=decode.mean_distinct / (context.spec.slots / context.shape.num_moe_layers),
        peak_device_bytes=record.memory.peak_device_bytes,
        memory=record.memory,
        time=steps.split(),
        prefill=prefill,
        decode=decode,
        prefetch=prefetch_outcomes(record.log),
        bounds=bounds or Bounds(),
        provenance=context.provenance,
        warnings=context.warnings,
    )


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """Mean and percentiles of a latency; zeros if there is nothing to measure."""
    if not seconds:
        return Percentiles(mean=0.0, p50=0.0, p95=0.0, p99=0.0)
    p50, p95, p99 = np.quantile(seconds, [0.5, 0.95, 0.99])
    return Percentiles(mean=float(np.mean(seconds)), p50=float(p50), p95=float(p95), p99=float(p99))


def prefetch_outcomes(log: Sequence[Entry]) -> PrefetchResult:
    """Judge every prefetch by what happened to its expert afterwards.

    useful: demanded after it had arrived; late: demanded while on its way; wasted: evicted or left over
    undemanded; harmful: the expert it evicted was demanded again before its own was.
    """
    issued = useful = late = harmful = cancelled = 0
    pending: dict[ExpertKey, ExpertKey | None] = {}
    for entry in log:
        key = ExpertKey(entry.layer, entry.expert)
        if entry.kind == "load" and entry.detail == "prefetch":
            issued += 1
            gone = ExpertKey(entry.evicted_layer, entry.evicted_expert)
            pending[key] = gone if gone.layer >= 0 else None
        elif entry.kind == "cancel":
            cancelled += 1
            pending.pop(key, None)
        elif entry.kind == "event":
            if key in pending and entry.detail != "miss":
                useful += entry.detail == "hit"
                late += entry.detail == "late"
            pending.pop(key, None)
            if entry.detail == "miss":
                hurt = [by for by, gone in pending.items() if gone == key]
                harmful += len(hurt)
                for by in hurt:
                    pending[by] = None
    wasted = issued - useful - late - cancelled
    return PrefetchResult(
        issued=issued,
        useful=useful,
        late=late,
        wasted=wasted,
        harmful=harmful,
        cancelled=cancelled,
    )


def largest_waves(log: Sequence[Entry]) -> dict[int, float]:
    """By step: the largest share of an event's experts that ran in one wave."""
    sizes: Counter[tuple[int, int, int]] = Counter()
    for entry in log:
        if entry.kind == "event":
            sizes[entry.step, entry.layer, entry.wave] += 1
    largest: dict[tuple[int, int], int] = {}
    total: Counter[tuple[int, int]] = Counter()
    for (step, layer, _), size in sizes.items():
        largest[step, layer] = max(size, largest.get((step, layer), 0))
        total[step, layer] += size
    shares: dict[int, float] = {}
    for (step, layer), size in largest.items():
        share = size / total[step, layer]
        # A pass is in waves if any of its layers is; the worst of those layers sets its peak.
        before = shares.get(step, 1.0)
        shares[step] = share if before == 1.0 else before if share == 1.0 else max(before, share)
    return shares


def _covered_s(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union: an interrupted copy spans the one that went before it."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


class _Steps:
    """The steps table as arrays."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        phases = columns.get("phase", ())
        self.step = np.asarray(columns.get("step", ()), dtype=np.int64)
        self.layer = np.asarray(columns.get("layer", ()), dtype=np.int64)
        self.is_decode = np.asarray([phase == "decode" for phase in phases], dtype=bool)
        self.distinct = np.asarray(columns.get("distinct", ()), dtype=np.int64)
        self._columns = columns
        self.is_whole = self.layer == WHOLE_STEP
        self.whole_s = self.seconds("total_s")[self.is_whole]

    def seconds(self, name: str) -> np.ndarray:
        return np.asarray(self._columns.get(name, ()), dtype=np.float64)

    def split(self) -> TimeSplit:
        parts = {
            name: float(self.seconds(name)[~self.is_whole].sum())
            for name in (
                "mixer_s",
                "experts_s",
                "stall_s",
                "decision_s",
                "readback_s",
                "lookahead_s",
            )
        }
        total = float(self.whole_s.sum())
        return TimeSplit(total_s=total, other_s=total - sum(parts.values()), **parts)


def _phase(record: RunRecord, steps: _Steps, phase: str, shape: ModelShape) -> PhaseResult:
    is_phase = steps.is_decode if phase == "decode" else ~steps.is_decode
    whole = is_phase & steps.is_whole
    layers = is_phase & ~steps.is_whole
    members = set(steps.step[whole].tolist())
    outcomes = {"hit": 0, "late": 0, "miss": 0}
    for entry in record.log:
        if entry.kind == "event" and entry.step in members:
            outcomes[entry.detail] += 1
    demanded = sum(outcomes.values())
    seconds = float(steps.seconds("total_s")[whole].sum())
    if phase == "decode":
        tokens = sum(max(0, len(s.token_s) - 1) for s in record.sequences)
    else:
        tokens = sum(s.prompt_tokens for s in record.sequences)
    moved = sum(c.num_bytes for c in record.copies if c.why != "warm" and c.step in members)
    distinct = steps.distinct[layers]
    return PhaseResult(
        steps=int(whole.sum()),
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=_ratio(tokens, seconds),
        demanded=demanded,
        hits=outcomes["hit"],
        lates=outcomes["late"],
        misses=outcomes["miss"],
        hit_rate=_ratio(outcomes["hit"], demanded),
        late_rate=_ratio(outcomes["late"], demanded),
        miss_rate=_ratio(outcomes["miss"], demanded),
        bytes_moved=moved,
        bytes_per_token=_ratio(moved, tokens),
        stall_s=float(steps.seconds("stall_s")[layers].sum()),
        mean_distinct=float(distinct.mean()) if distinct.size else 0.0,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0

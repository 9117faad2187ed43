"""One shape for what a run gave, whether it was simulated or real.

`source` says which; nothing else differs, so the dashboard, `tune` and `verify` compare like with
like. Written as JSON (`expertflow.result/1`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..tracer.types import Origin, Provenance

RESULT_FORMAT = "expertflow.result/1"
VERDICT_FORMAT = "expertflow.verdict/1"
TUNING_FORMAT = "expertflow.tuning/1"

Source = Literal["predicted", "measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """A latency distribution in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseResult:
    """Prefill or decode alone.

    `tokens` counts prompt tokens fed in (prefill) or tokens generated (decode). Rates are shares of
    the distinct experts demanded per layer event: hit = resident, late = on its way, miss = neither.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    demanded: int
    hits: int
    lates: int
    misses: int
    hit_rate: float
    late_rate: float
    miss_rate: float
    bytes_moved: int
    bytes_per_token: float
    stall_s: float
    mean_distinct: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchResult:
    """What became of the prefetches: in time, late, never used, or evicting something needed."""

    issued: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    harmful: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryResult:
    """Peak device bytes by class."""

    non_expert_weights: int
    slots: int
    kv_cache: int
    activations: int
    staging: int = 0

    @property
    def peak_device_bytes(self) -> int:
        """Sum over the classes: what the run needs at its worst moment."""
        return (
            self.non_expert_weights + self.slots + self.kv_cache + self.activations + self.staging
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What no policy can beat, under the same costs.

    `link_tokens_per_s` assumes perfect overlap: max(compute, bytes / bandwidth) with the bytes of
    Belady's choice. Zero means not computed.
    """

    all_resident_tokens_per_s: float = 0.0
    belady_tokens_per_s: float = 0.0
    link_tokens_per_s: float = 0.0
    belady_hit_rate: float = 0.0
    share_of_best: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSplit:
    """Where the wall time went, in seconds; the parts add up to `total_s`."""

    total_s: float
    mixer_s: float
    experts_s: float
    stall_s: float
    decision_s: float
    readback_s: float
    lookahead_s: float
    other_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run under one policy. See the module docstring.

    `tokens_per_s` counts generated tokens over the whole time, prefill included.
    `slots_ratio` is r: mean distinct experts per event over slots per layer, in decode; at 1 and
    above no cache policy can hit. `same_tokens` and `log_replays` are None where not checked.
    """

    source: Source
    label: str
    policy: Mapping[str, str]
    policy_hash: str
    trace_id: str
    model_id: str
    device: str
    link: str
    link_origin: Origin
    slots: int
    total_experts: int
    batch_size: int
    tokens_per_s: float
    ttft_s: float
    tpot_s: float
    ttft: Percentiles
    tpot: Percentiles
    hit_rate: float
    late_rate: float
    miss_rate: float
    bytes_per_token: float
    stall_s: float
    link_busy_share: float
    slots_ratio: float
    peak_device_bytes: int
    memory: MemoryResult
    time: TimeSplit
    prefill: PhaseResult
    decode: PhaseResult
    prefetch: PrefetchResult
    bounds: Bounds
    provenance: Provenance
    warnings: tuple[str, ...] = ()
    same_tokens: bool | None = None
    log_replays: bool | None = None
    format: str = RESULT_FORMAT


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One predicted quantity next to the measured one.

    `gap` is relative (or absolute, for rates: `unit` says) and signed: predicted − measured.
    `noise` is the spread of the base-vs-base control in the same unit.
    """

    quantity: str
    unit: str
    predicted: float
    measured: float
    gap: float
    tolerance: float
    noise: float
    passed: bool
    cause: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedRun:
    """One configuration, predicted and measured, with its checks."""

    label: str
    predicted: Result
    measured: tuple[Result, ...]
    checks: tuple[Check, ...]
    same_tokens: bool
    log_replays: bool
    causes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What `verify` found. `validated` is true only if every check of every run passed."""

    validated: bool
    summary: str
    runs: tuple[VerifiedRun, ...]
    noise: Mapping[str, float]
    order_preserved: bool
    provenance: Provenance
    warnings: tuple[str, ...] = ()
    format: str = VERDICT_FORMAT


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityPoint:
    """Event-atomic hit rate of one cache at one size, demand loads only, decode steps."""

    cache: str
    allocation: str
    slots: int
    share: float
    hit_rate: float
    is_bound: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What `tune` tried and why it chose what it chose.

    `candidates` are predicted results, best first; those whose policy needs the future are bounds and
    cannot be chosen.
    """

    trace_id: str
    budget: str
    chosen: str
    runner_up: str
    explanation: tuple[str, ...]
    candidates: tuple[Result, ...]
    bounds: tuple[Result, ...]
    curve: tuple[CapacityPoint, ...]
    provenance: Provenance
    format: str = TUNING_FORMAT

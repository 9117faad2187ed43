"""A demo folder made of synthetic records, and two that are not so well."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from expertflow.simulator.policy.spec import PolicyFile, make_spec, write_policy
from expertflow.simulator.result import (
    Bounds,
    CapacityPoint,
    Check,
    MemoryResult,
    Percentiles,
    PhaseResult,
    PrefetchResult,
    Result,
    TimeSplit,
    Tuning,
    Verdict,
    VerifiedRun,
)
from expertflow.simulator.sweep_folder import DOCUMENT, RESULTS, MachineNote, SweepFile
from expertflow.simulator.sweep_row import Row, table_of
from expertflow.tracer.live import LivePoint, LiveStatus, State, process_mark
from expertflow.tracer.records import write_json
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.types import Provenance

MADE = Provenance(
    command="expertflow-trace tune traces/demo --budget 0.5",
    created="2026-11-22T12:00:00Z",
    versions={"expertflow-trace": "0.1.0"},
    seed=0,
)
AHEAD = "lfu + gate-ahead"
TOTAL_EXPERTS = 64
MIB = 2**20


def make_result(
    label: str,
    *,
    trace_id: str = "t" * 16,
    tokens_per_s: float = 20.0,
    hit: float = 0.7,
    late: float = 0.05,
    slots: int = 32,
    source: str = "predicted",
    cache: str = "",
) -> Result:
    """One run with numbers that fit together."""
    miss = 1 - hit - late
    total_s = 256 / tokens_per_s
    stall_s = total_s * 0.5 * (miss + late)
    rates = {"hit_rate": hit, "late_rate": late, "miss_rate": miss}
    latency = Percentiles(
        mean=1 / tokens_per_s, p50=0.9 / tokens_per_s, p95=2 / tokens_per_s, p99=3 / tokens_per_s
    )
    phase = PhaseResult(
        steps=60,
        tokens=256,
        seconds=total_s * 0.9,
        tokens_per_s=tokens_per_s * 1.1,
        demanded=1000,
        hits=int(1000 * hit),
        lates=int(1000 * late),
        misses=int(1000 * miss),
        bytes_moved=int(1000 * miss) * 4 * MIB,
        bytes_per_token=1000 * miss * 4 * MIB / 256,
        stall_s=stall_s,
        mean_distinct=3.4,
        **rates,
    )
    memory = MemoryResult(
        non_expert_weights=40 * MIB,
        slots=slots * 4 * MIB,
        kv_cache=12 * MIB,
        activations=8 * MIB,
        staging=8 * MIB,
    )
    return Result(
        source=source,  # type: ignore[arg-type]
        label=label,
        policy={"cache": cache or label, "predictor": "none", "scheduler": "fifo"},
        policy_hash=f"hash-{label}",
        trace_id=trace_id,
        model_id="tiny_moe/demo-4x16",
        device="cpu",
        link="pcie3-x16",
        link_origin="emulated",
        slots=slots,
        total_experts=TOTAL_EXPERTS,
        batch_size=2,
        tokens_per_s=tokens_per_s,
        ttft_s=0.21,
        tpot_s=1 / tokens_per_s,
        ttft=latency,
        tpot=latency,
        bytes_per_token=phase.bytes_per_token,
        stall_s=stall_s,
        link_busy_share=0.4,
        slots_ratio=3.4 / (slots / 4),
        peak_device_bytes=memory.peak_device_bytes,
        memory=memory,
        time=TimeSplit(
            total_s=total_s,
            mixer_s=(total_s - stall_s) * 0.35,
            experts_s=(total_s - stall_s) * 0.5,
            stall_s=stall_s,
            decision_s=(total_s - stall_s) * 0.02,
            readback_s=(total_s - stall_s) * 0.05,
            lookahead_s=0.0,
            other_s=(total_s - stall_s) * 0.08,
        ),
        prefill=phase,
        decode=phase,
        prefetch=PrefetchResult(issued=100, useful=60, late=20, wasted=20),
        bounds=Bounds(
            all_resident_tokens_per_s=41.0,
            belady_tokens_per_s=29.0,
            link_tokens_per_s=33.0,
            belady_hit_rate=0.86,
            share_of_best=0.85,
        ),
        provenance=MADE,
        warnings=(),
        **rates,
    )


def make_curve() -> tuple[CapacityPoint, ...]:
    """Three caches and the bound over five sizes."""
    shares = (0.125, 0.25, 0.5, 0.75, 1.0)
    lines = {
        "lru": (0.0, 0.22, 0.55, 0.8, 1.0),
        "lfu": (0.12, 0.35, 0.66, 0.84, 1.0),
        "static": (0.2, 0.41, 0.64, 0.8, 1.0),
        "belady": (0.3, 0.55, 0.83, 0.95, 1.0),
    }
    return tuple(
        CapacityPoint(
            cache=cache,
            allocation="global",
            slots=int(share * TOTAL_EXPERTS),
            share=share,
            hit_rate=rate,
            is_bound=cache == "belady",
        )
        for cache, rates in lines.items()
        for share, rate in zip(shares, rates, strict=True)
    )


def make_tuning(trace_id: str) -> Tuning:
    """Four candidates of which `lfu + gate-ahead` was chosen, and one bound."""
    candidates = (
        make_result(AHEAD, trace_id=trace_id, tokens_per_s=27.9, hit=0.78, cache="lfu"),
        make_result("lfu", trace_id=trace_id, tokens_per_s=24.6, hit=0.66, late=0.0),
        make_result("static", trace_id=trace_id, tokens_per_s=23.1, hit=0.64, late=0.0),
        make_result("lru", trace_id=trace_id, tokens_per_s=19.7, hit=0.55, late=0.0),
        make_result("none", trace_id=trace_id, tokens_per_s=9.4, hit=0.0, late=0.0, slots=8),
    )
    return Tuning(
        trace_id=trace_id,
        budget="0.5",
        chosen=AHEAD,
        runner_up="lfu",
        explanation=(
            "lfu + gate-ahead is predicted to generate 27.9 tokens/s, 13 % more than lfu.",
            "Reading the next layer's gate early hides most copies: 5 % of demands are late.",
        ),
        candidates=candidates,
        bounds=(make_result("belady", trace_id=trace_id, tokens_per_s=29.0, hit=0.83, late=0.0),),
        curve=make_curve(),
        provenance=MADE,
    )


def make_checks(predicted: Result, measured: Result) -> tuple[Check, ...]:
    """The checks `verify` makes, with one out of tolerance where speeds differ by over 10 %."""

    def relative(name: str, unit: str, a: float, b: float, tolerance: float) -> Check:
        gap = (a - b) / b
        return Check(
            quantity=name,
            unit=unit,
            predicted=a,
            measured=b,
            gap=gap,
            tolerance=tolerance,
            noise=0.012,
            passed=abs(gap) <= tolerance,
            cause="" if abs(gap) <= tolerance else "copies slower than the traced link",
        )

    rate = predicted.hit_rate - measured.hit_rate
    return (
        Check(
            quantity="hit_rate",
            unit="share",
            predicted=predicted.hit_rate,
            measured=measured.hit_rate,
            gap=rate,
            tolerance=0.01,
            noise=0.001,
            passed=abs(rate) <= 0.01,
        ),
        relative("tokens_per_s", "tokens/s", predicted.tokens_per_s, measured.tokens_per_s, 0.1),
        relative(
            "bytes_per_token", "bytes", predicted.bytes_per_token, measured.bytes_per_token, 0.02
        ),
        relative("peak_device_bytes", "bytes", predicted.peak_device_bytes, 197 * MIB, 0.02),
        relative("ttft_s", "s", 0.21, 0.2, 0.1),
        relative("tpot_s", "s", predicted.tpot_s, measured.tpot_s, 0.1),
    )


def make_run(label: str, trace_id: str, predicted_s: float, measured_s: float) -> VerifiedRun:
    """One configuration, measured three times, with its speeds in tokens per second."""
    predicted = make_result(label, trace_id=trace_id, tokens_per_s=predicted_s)
    measured = make_result(
        label, trace_id=trace_id, tokens_per_s=measured_s, hit=0.697, source="measured"
    )
    measured = replace(measured, bytes_per_token=predicted.bytes_per_token * 1.004)
    return VerifiedRun(
        label=label,
        predicted=predicted,
        measured=(measured, measured, measured),
        checks=make_checks(predicted, measured),
        same_tokens=True,
        log_replays=True,
        causes={"copy time": 0.031, "read-back": -0.008, "unexplained": 0.004},
    )


def make_verdict(trace_id: str, *, validated: bool) -> Verdict:
    """Three configurations; a negative verdict has one speed out of tolerance."""
    runs = (
        make_run(AHEAD, trace_id, 27.9, 26.8),
        make_run("lfu", trace_id, 24.6, 24.1 if validated else 20.4),
        make_run("none", trace_id, 9.4, 9.2),
    )
    return Verdict(
        validated=validated,
        summary="Every check of three configurations is within tolerance."
        if validated
        else "One of three configurations ran slower than predicted.",
        runs=runs,
        noise={"tokens_per_s": 0.012, "hit_rate": 0.0},
        order_preserved=True,
        provenance=MADE,
    )


def make_live(state: State = "finished", **changes: Any) -> LiveStatus:
    """A deployment that ran for 60 s, with a point every second; its process is this one."""
    points = tuple(
        LivePoint(
            at_s=float(second),
            tokens_per_s=20.0 + second % 5,
            hit_rate=min(0.8, second / 50),
            link_Bps=2e9 - 1e7 * second,
            stall_share=0.5 - second / 200,
        )
        for second in range(1, 61)
    )
    now = time.time()
    status = LiveStatus(
        command="deploy",
        arguments="expertflow-trace deploy policy.json --out result.json",
        state=state,
        phase="running under the policy",
        host=socket.gethostname(),
        pid=os.getpid(),
        process=process_mark(os.getpid()),
        started=now - 60,
        heartbeat=now,
        tokens_done=1_200,
        tokens_total=2_000,
        passes=1_200,
        tokens_per_s=20.0,
        model_id="tiny_moe/demo-4x16",
        device="cpu",
        label="lru @ 32 slots",
        link="1GB/s+20us",
        link_origin="emulated",
        hit_rate=0.71,
        bytes_moved=10**10,
        link_Bps=1.7e9,
        stall_share=0.31,
        memory={"non_expert_weights": 40 * MIB, "slots": 128 * MIB, "kv_cache": 12 * MIB},
        points=points,
    )
    return replace(status, **changes)


def make_rows() -> list[Row]:
    """Three caches with and without prefetch at three sizes, one bound, and one point that failed."""
    rows = [
        make_row(cache, predictor, slots)
        for cache in ("lru", "lfu", "static")
        for predictor in ("none", "gate_lookahead")
        for slots in (16, 32, 48)
    ]
    failed = replace(rows[0], key="failed", tokens_per_s=None, error="score needs gate weights.")
    return [*rows, make_row("belady", "none", 32, is_bound=True), failed]


def make_row(cache: str, predictor: str, slots: int, *, is_bound: bool = False) -> Row:
    """One line of a sweep with numbers that grow with the slots."""
    bonus = {"lru": 0, "lfu": 1, "static": 2, "belady": 8}[cache] + 3 * (predictor != "none")
    label = f"{cache} + {predictor} @ {slots} slots"
    return Row(
        key=label,
        policy_hash=f"hash-{label}",
        label=label,
        cache=cache,
        allocation="equal",
        predictor=predictor,
        scheduler="fcfs",
        misses="load",
        params="{}",
        budget=f"{slots}slots",
        slots=slots,
        link="pcie3x16",
        link_origin="declared",
        declared_link="pcie3x16",
        is_bound=is_bound,
        is_lossless=True,
        tokens_per_s=10.0 + slots / 4 + bonus,
        ttft_mean_s=0.2,
        ttft_p95_s=0.3,
        tpot_mean_s=0.03,
        tpot_p95_s=0.05,
        decode_hit_rate=slots / 64,
        prefill_hit_rate=slots / 80,
        bytes_per_token=(64 - slots) * MIB / 8,
        stall_s=1.0,
        link_busy_share=0.4,
        peak_device_bytes=(60 + 4 * slots) * MIB,
        slots_ratio=3.4 / (slots / 4),
    )


def write_sweep(folder: Path, trace_id: str) -> Path:
    """A finished sweep."""
    folder.mkdir(parents=True)
    rows = make_rows()
    pq.write_table(table_of(rows), folder / RESULTS)
    document = SweepFile(
        trace_id=trace_id,
        model_id="tiny_moe/demo-4x16",
        machine=MachineNote(hash="m", device="cpu", links=("pcie3x16",), is_calibrated=False),
        space={},
        search={"method": "grid", "objectives": ["tokens_per_s", "peak_device_bytes"]},
        seed=0,
        status="finished",
        provenance=MADE,
        counts={"predicted": len(rows) - 1, "failed": 1, "bounds": 1},
    )
    write_json(folder / DOCUMENT, document)
    return folder


def write_demo(folder: Path) -> Path:
    """A folder with a trace, a tuning, a policy, a sweep, a single result and two verdicts."""
    trace = synthetic_trace(folder / "demo", sequences=8, prompt_tokens=24, new_tokens=24)
    trace_id = trace.manifest.trace_id
    write_json(folder / "demo-tuning.json", make_tuning(trace_id))
    write_json(folder / "demo-verdict.json", make_verdict(trace_id, validated=True))
    write_json(folder / "other-verdict.json", make_verdict(trace_id, validated=False))
    write_sweep(folder / "demo-sweep", trace_id)
    write_json(folder / "demo-run.json", make_result("lru", trace_id=trace_id, tokens_per_s=19.7))
    behaviour = make_spec(slots=32, cache="lfu")
    policy = PolicyFile(
        behaviour=behaviour,
        behaviour_hash=behaviour.behaviour_hash(),
        shape=trace.manifest.shape,
        budget="0.5",
        trace=trace_id,
        evidence={"tokens_per_s": 27.9},
    )
    write_policy(folder / "demo-policy.json", policy)
    write_json(folder / "demo.live.json", make_live())
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("data") / "traces")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A broken manifest, a truncated Parquet file and a broken verdict, beside one sound tuning."""
    cut = synthetic_trace(tmp_path / "cut")
    file = tmp_path / "cut" / cut.manifest.tables["routing"][0].path
    file.write_bytes(file.read_bytes()[:200])
    synthetic_trace(tmp_path / "torn")
    manifest = tmp_path / "torn" / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8")[:300], encoding="utf-8")
    (tmp_path / "verdict.json").write_text(
        json.dumps({"format": "expertflow.verdict/1", "validated": "maybe"}), encoding="utf-8"
    )
    write_json(tmp_path / "tuning.json", make_tuning(cut.manifest.trace_id))
    sweep = write_sweep(tmp_path / "swept", cut.manifest.trace_id)
    (sweep / RESULTS).write_bytes(b"PAR1")
    return tmp_path

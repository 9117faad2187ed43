"""A result as lines for people."""

from __future__ import annotations

from ..tracer.quantities import format_bytes, format_seconds
from .result import Percentiles, Result


def result_rows(result: Result) -> list[tuple[str, str]]:
    """Names and values of a result, units in the value."""
    bounds, prefetch = result.bounds, result.prefetch
    rows = [
        ("source", f"{result.source}, {result.engine} engine" if result.engine else result.source),
        ("throughput", f"{result.tokens_per_s:.1f} tokens/s (batch {result.batch_size})"),
        ("first token", _latency(result.ttft)),
        ("per token", _latency(result.tpot)),
    ]
    if (arrivals := result.arrivals) is not None:
        rows += [
            ("arrivals", f"{arrivals.description}: {arrivals.requests} requests"),
            ("queue", _latency(arrivals.queue)),
            (
                "load",
                f"passes run {arrivals.utilization:.0%} of {format_seconds(arrivals.span_s)}, "
                f"{arrivals.mean_batch:.1f} sequences each",
            ),
            ("finding", arrivals.finding),
        ]
    for name, phase in (("prefill", result.prefill), ("decode", result.decode)):
        rows.append(
            (
                name,
                f"hit {phase.hit_rate:.1%}, late {phase.late_rate:.1%}, miss {phase.miss_rate:.1%}; "
                f"{format_bytes(phase.bytes_per_token)} per token; stalled {format_seconds(phase.stall_s)} "
                f"of {format_seconds(phase.seconds)}",
            )
        )
    if prefetch.issued:
        rows.append(
            (
                "prefetch",
                f"{prefetch.issued} issued: {prefetch.useful} in time, {prefetch.late} late, "
                f"{prefetch.wasted} wasted, {prefetch.harmful} harmful, {prefetch.cancelled} cancelled",
            )
        )
    if worth := result.worth:
        rows.append(
            (
                "worth",
                f"{worth.finding} It spares {format_seconds(worth.stall_saved_s)} of waiting for "
                f"{format_seconds(worth.spent_s)} of its own, and moves "
                f"{format_bytes(worth.extra_bytes_per_token)} more per token",
            )
        )
    rows.append(
        (
            "memory",
            f"peak {format_bytes(result.peak_device_bytes)}: slots {format_bytes(result.memory.slots)}, "
            f"other weights {format_bytes(result.memory.non_expert_weights)}, KV cache "
            f"{format_bytes(result.memory.kv_cache)}, working tensors "
            f"{format_bytes(result.memory.activations)}",
        )
    )
    if bounds.all_resident_tokens_per_s:
        rows.append(
            (
                "bounds",
                f"all resident {bounds.all_resident_tokens_per_s:.1f} tokens/s; Belady "
                f"{bounds.belady_tokens_per_s:.1f} (hits {bounds.belady_hit_rate:.1%}); link "
                f"{bounds.link_tokens_per_s:.1f}, of which {bounds.share_of_best:.0%} reached",
            )
        )
    floor = " — at 1 and above no cache can hit by recency" if result.slots_ratio >= 1 else ""
    rows.append(("r", f"{result.slots_ratio:.2f} distinct experts per event and slot{floor}"))
    rows.append(("device", result.device))
    rows.append(("link", f"{result.link} ({result.link_origin})"))
    rows += [("warning", text) for text in result.warnings]
    return rows


def _latency(found: Percentiles) -> str:
    shares = ", ".join(
        f"{name} {format_seconds(seconds)}"
        for name, seconds in (("p50", found.p50), ("p95", found.p95), ("p99", found.p99))
    )
    return f"{format_seconds(found.mean)} mean, {shares}"

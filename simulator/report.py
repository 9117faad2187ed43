"""A result as lines for people."""

from __future__ import annotations

from ..tracer.quantities import format_bytes, format_seconds
from .result import Percentiles, RegroupingResult, Result


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
    if accuracy := result.accuracy:
        rows.append(
            (
                "predictor",
                f"named {accuracy.recall:.1%} of the experts that decode steps demanded; "
                f"{accuracy.precision:.1%} of what it named was demanded",
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
    rows += _regrouping_rows(result.regrouping)
    rows += _lossy_rows(result)
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


def _lossy_rows(result: Result) -> list[tuple[str, str]]:
    """What a lossy routing did, and to the text if that was looked at."""
    rows: list[tuple[str, str]] = []
    if found := result.routing:
        words = (
            f"{found.finding} Distinct experts per event: {found.distinct_before:.1f} before, "
            f"{found.distinct_after:.1f} after ({found.scores}); {found.short_share:.1%} of tokens are left with "
            "fewer experts"
        )
        rows.append(("routing", words))
    if text := result.text:
        words = (
            f"{text.sequences_changed} of {text.sequences} sequences and {text.tokens_changed} of {text.tokens} tokens "
            "differ from the resident model's (lossy: no promise is made)"
        )
        rows.append(("text", words))
    return rows


def _regrouping_rows(found: RegroupingResult | None) -> list[tuple[str, str]]:
    """What became of batches that were decoded in turns."""
    if found is None:
        return []
    mean = found.distinct / found.passes if found.passes else 0.0
    words = (
        f"units of {found.batches} batches, {mean:.1f} distinct experts per decode step; asked {found.asked} times, "
        f"changed {found.changed}, {found.moved} sequences moved; {format_bytes(found.kv_bytes)} of KV cache copied in "
        f"{format_seconds(found.move_s)}, chosen in {format_seconds(found.decision_s)}"
    )
    return [("regrouping", words)]


def _latency(found: Percentiles) -> str:
    shares = ", ".join(
        f"{name} {format_seconds(seconds)}"
        for name, seconds in (("p50", found.p50), ("p95", found.p95), ("p99", found.p99))
    )
    return f"{format_seconds(found.mean)} mean, {shares}"

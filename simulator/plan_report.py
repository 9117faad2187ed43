"""A plan as lines for people. Every number says how it is known."""

from __future__ import annotations

from ..tracer.quantities import format_bytes, format_seconds
from .memory_plan import MemoryPlan
from .plan import Plan
from .speed_plan import SpeedPlan

_CLASSES = {
    "slots": "expert slots",
    "non_expert_weights": "other weights",
    "kv_cache": "KV cache",
    "staging": "rows of events in waves",
    "activations": "working tensors",
    "predictor": "predictor",
    "reserve": "driver and allocator",
}


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Names and values of a plan."""
    shape = plan.model
    return [
        ("answer", plan.finding),
        (
            "model",
            f"{shape.architecture}, {shape.num_moe_layers} MoE layers of {shape.num_experts} experts, "
            f"top-{shape.top_k}, {format_bytes(shape.expert_bytes)} each in {shape.dtype} (computed from the config)",
        ),
        *memory_rows(plan.memory, plan.device_bytes, plan.host_bytes),
        *_speed_rows(plan),
        *_change_rows(plan),
        # With a GPU the notes name the sources.
        *(("source", words) for words in plan.sources if not plan.speed.notes),
        *(("note", words) for words in (*plan.notes, *plan.speed.notes)),
    ]


def memory_rows(
    memory: MemoryPlan, device_bytes: int | None, host_bytes: int | None
) -> list[tuple[str, str]]:
    """Names and values of a memory budget, beside what may be used (None: not told)."""
    rows = [
        (
            _CLASSES[name],
            f"{format_bytes(size)} ({_slots_text(memory) if name == 'slots' else ''}{memory.basis[name]})",
        )
        for name, size in memory.classes.items()
        if size or name == "slots"
    ]
    rows.append(("device in all", f"{format_bytes(memory.device_bytes)}{_of(device_bytes)}"))
    loading = f"{format_bytes(memory.host_loading)} while loading ({memory.basis['host_loading']})"
    running = f"{format_bytes(memory.host_experts)} of experts while running"
    rows.append(
        (
            "host in all",
            f"{format_bytes(memory.host_bytes)}{_of(host_bytes)}: {loading}, {running}"
            + (f", {format_bytes(memory.host_reserve)} declared" if memory.host_reserve else "")
            + (", and what is said of the device" if memory.is_host else ""),
        )
    )
    return rows


def way_out(plan: Plan) -> str:
    """What to change when a plan does not fit."""
    if plan.outcome == "does not fit":
        return (
            f"{format_bytes(plan.changes.least_bytes)} of device memory hold one slot, "
            f"{format_bytes(plan.changes.event_bytes)} one event per layer: use a smaller --context, --batch-size or "
            "--dtype, or a larger GPU."
        )
    return "Use --tier disk, a smaller --dtype, or a machine with more memory."


def _slots_text(memory: MemoryPlan) -> str:
    return f"{memory.slots} of {memory.total_experts} experts, {format_bytes(memory.expert_bytes)} each; "


def _of(allowed: int | None) -> str:
    return f" of {format_bytes(allowed)}" if allowed is not None else ""


def _speed_rows(plan: Plan) -> list[tuple[str, str]]:
    speed = plan.speed
    machine = f"declared {speed.gpu} and {speed.link}" if speed.gpu else f"link {speed.link} alone"
    slots = (
        f"r = {plan.slots_ratio:.2f}{'; at 1 and above no cache hits by recency' * (plan.slots_ratio >= 1)}; "
        if plan.slots_ratio
        else ""
    )
    rows = [
        ("decode at best", _best(speed)),
        (
            "decode at worst",
            f"{_rate(speed.worst_tokens_per_s)} tokens/s: every event misses everything, "
            f"{format_seconds(speed.copy_s)} per expert ({machine})",
        ),
        ("first token", _first_token(speed)),
        (
            "slots against events",
            f"{slots}even routing would hit {speed.even_hit_rate:.0%} (computed from the config)",
        ),
    ]
    for row in speed.rows:
        low, high = row.hidden_none_tokens_per_s, row.hidden_all_tokens_per_s
        if speed.gpu:
            rate = f"{_rate(low)} tokens/s with no copy hidden, {_rate(high)} with all hidden"
        else:
            rate = f"at most {_rate(high)} tokens/s"
        rows.append(
            (
                f"decode at {row.hit_rate:.0%} hits",
                f"{rate}; {format_bytes(row.bytes_per_token)} per token ({machine})",
            )
        )
    return rows


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _best(speed: SpeedPlan) -> str:
    if not speed.gpu:
        return "not known without --gpu: with every hit it is the GPU's own speed"
    return (
        f"{_rate(speed.best_tokens_per_s)} tokens/s: every demanded expert hits "
        f"(declared {speed.gpu}: memory bandwidth and arithmetic; an upper bound)"
    )


def _first_token(speed: SpeedPlan) -> str:
    worst = f"{format_seconds(speed.first_token_worst_s)} with every expert copied"
    if not speed.gpu:
        return f"{worst}, beside computing (link {speed.link} alone)"
    best = f"{format_seconds(speed.first_token_best_s)} without a copy"
    return f"{best}, {worst} (prompt as long as the context; declared {speed.gpu} and {speed.link})"


def _change_rows(plan: Plan) -> list[tuple[str, str]]:
    changes = plan.changes
    longest = (
        f"{changes.longest_context} positions"
        if changes.longest_context
        else "none: the device is too small at any length"
    )
    return [
        ("least device memory", f"{format_bytes(changes.least_bytes)}: one slot, all in waves"),
        ("one event per layer", f"{format_bytes(changes.event_bytes)} of device memory"),
        ("all resident", f"{format_bytes(changes.resident_bytes)} of device memory"),
        ("longest context", f"{longest}, with one event per layer (all computed from the config)"),
    ]

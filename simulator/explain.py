"""Says in sentences why a policy was chosen, the unwelcome ones included."""

from __future__ import annotations

from collections.abc import Sequence

from ..tracer.quantities import format_bytes
from .forecast import Forecaster
from .result import Result, Tuning

_NOT_WORTH_IT = 0.02
"""A gain below this share of tokens/s is said to be no gain."""


def explain(
    candidates: Sequence[Result], tuning: Tuning, forecaster: Forecaster, goals: str
) -> tuple[str, ...]:
    """The choice in sentences. `candidates` are all that were tried at the chosen budget, the chosen one first."""
    best, second = candidates[0], candidates[1]
    baseline = _of(candidates, cache="none", predictor="none")
    static = _of(candidates, cache="static", predictor="none")
    lines = [*_goal_lines(best, tuning, goals), _headline(best, baseline), _runner_up(best, second)]
    if best not in (static, baseline) and gain(best, static) < _NOT_WORTH_IT:
        lines.append(
            f"A static placement is as good ({static.tokens_per_s:.1f} tokens/s) and simpler."
        )
    limit = best.bounds.all_resident_tokens_per_s
    if limit and gain(best, baseline) < _NOT_WORTH_IT:
        lines.append("No policy helps here: " + _what_helps(baseline))
    lines.append(
        f"It hits {best.decode.hit_rate:.0%} of demanded experts in decode "
        f"(evictions that know the future, without prefetch: {tuning.bounds[0].decode.hit_rate:.0%}) and reaches "
        f"{best.bounds.share_of_best:.0%} of what the link allows; with everything resident it would be "
        f"{limit:.1f} tokens/s."
    )
    if best.routing is not None:
        lines.append(best.routing.finding)
    if best.worth is not None:
        lines.append(f"Prefetch: {best.worth.finding}")
    lines += [_ratio_line(best), *_sensitivity_lines(tuning)]
    lines.append(
        f"Peak device memory {format_bytes(best.peak_device_bytes)}, of which slots "
        f"{format_bytes(best.memory.slots)}."
    )
    return (*lines, *_origin_lines(forecaster))


def gain(one: Result, other: Result) -> float:
    """How much faster one is than the other: 0.1 for 10 %."""
    return one.tokens_per_s / other.tokens_per_s - 1.0 if other.tokens_per_s else 0.0


def _goal_lines(best: Result, tuning: Tuning, goals: str) -> list[str]:
    if not goals:
        return []
    if tuning.meets_goals:
        return [f"It meets what was asked for: {goals}; budget {tuning.budget}."]
    return [
        f"Nothing that was tried meets what was asked for: {goals}. The fastest at budget {tuning.budget} reaches "
        f"{best.tokens_per_s:.1f} tokens/s, first token {best.ttft.p95:.3g} s and further tokens "
        f"{best.tpot.p95:.3g} s (p95). Ask for less, or raise the budget or the link."
    ]


def _what_helps(baseline: Result) -> str:
    if baseline.stall_s < _NOT_WORTH_IT * baseline.time.total_s:
        return "computation, not loading, sets the pace."
    return "buy link or memory."


def _headline(best: Result, baseline: Result) -> str:
    if best is baseline:
        return f"No policy beats loading every expert on demand ({baseline.tokens_per_s:.1f} tokens/s)."
    return (
        f"{best.label} is predicted at {best.tokens_per_s:.1f} tokens/s, "
        f"{best.tokens_per_s / baseline.tokens_per_s:.2f}× loading every expert on demand "
        f"({baseline.tokens_per_s:.1f})."
    )


def _runner_up(best: Result, second: Result) -> str:
    margin = gain(best, second)
    words = f"Runner-up: {second.label} at {second.tokens_per_s:.1f} tokens/s, "
    if margin < 0:
        return words + (
            f"{-margin:.1%} ahead, which is less than such a prediction can tell: the plainer one was chosen."
        )
    return (
        words + f"{margin:.1%} behind" + (": too close to call." if margin < _NOT_WORTH_IT else ".")
    )


_PLAIN_CACHES = ("none", "static", "lru", "fifo", "lfu")
_PLAIN_ALLOCATIONS = ("equal", "global")


def plainness(result: Result) -> tuple[int, int, int]:
    """How much a policy asks of its reader: no prediction, a well-known cache and equal slots come first."""
    return (
        int(_name(result, "predictor") != "none"),
        _place(_PLAIN_CACHES, _name(result, "cache")),
        _place(_PLAIN_ALLOCATIONS, _name(result, "allocation")),
    )


def _name(result: Result, family: str) -> str:
    """A member's name without its parameters."""
    return result.policy[family].partition("(")[0]


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _ratio_line(best: Result) -> str:
    ratio = best.slots_ratio
    verdict = (
        "a cache can hit."
        if ratio < 1
        else "one event overflows the slots, so no cache can hit by recency: raise the budget."
    )
    return f"r = {ratio:.2f} (distinct experts per decode event over slots per layer): {verdict}"


def _sensitivity_lines(tuning: Tuning) -> list[str]:
    worst = max(tuning.sensitivity, key=lambda change: change.loss, default=None)
    if worst is None:
        return []
    if worst.loss < _NOT_WORTH_IT:
        return ["The choice holds if link or computation are 10 % slower or faster than assumed."]
    return [
        f"The choice hangs on the machine: with the {worst.change}, {worst.best} would be best and this one "
        f"{worst.loss:.1%} slower. Measure more closely, or take the other."
    ]


def _origin_lines(forecaster: Forecaster) -> list[str]:
    lines: list[str] = []
    if forecaster.is_declared:
        lines.append(
            f"This machine is not measured: {forecaster.device}; read the order, not the speed."
        )
    elif forecaster.decision_is_measured:
        lines.append("The machine's costs were calibrated with the runtime itself.")
    else:
        lines.append(
            "The costs come from the trace alone, without what the runtime adds: the order counts, the "
            "speed is optimistic. Calibrate with `expertflow-trace calibrate` and pass --machine."
        )
    if forecaster.link_origin != "measured":
        lines.append(
            f"The link is {forecaster.link_origin} ({forecaster.link}), not a measured bus."
        )
    return lines


def _of(results: Sequence[Result], *, cache: str, predictor: str) -> Result:
    return next(
        result
        for result in results
        if result.policy["cache"] == cache and result.policy["predictor"] == predictor
    )

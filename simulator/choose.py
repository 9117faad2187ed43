"""Picks a policy for a budget: a small sweep, judged on prompts it did not learn from, and explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..tracer.quantities import format_bytes
from .capacity import capacity_curve
from .forecast import Forecaster
from .policy.spec import PolicySpec, make_spec
from .result import Result, Tuning
from .split import split_by_batch

CACHES = ("none", "lru", "lfu", "static")
ALLOCATIONS = ("equal", "global")
_NOT_WORTH_IT = 0.02
"""A gain below this share of tokens/s is said to be no gain."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen policy and everything it was chosen on."""

    spec: PolicySpec
    predicted: Result
    tuning: Tuning


def tune(
    forecaster: Forecaster,
    *,
    budget: str,
    slots: int,
    advance: Callable[[int], None],
) -> Choice:
    """Predict every policy of the built-in space at one size and choose the fastest.

    What a policy learns (popularity) comes from half of the batches; all are judged on the other half. The
    chosen policy is then given what the whole trace teaches.
    """
    learn, judge = split_by_batch(forecaster.workload)
    judged = replace(forecaster, workload=judge)
    popularity = learn.popularity()
    specs = candidates(slots, popularity, lookahead=forecaster.workload.lookahead)
    results: list[tuple[PolicySpec, Result]] = []
    for spec in specs:
        results.append((spec, judged.predict(spec, with_bounds=False)))
        advance(1)
    # On a tie the simpler policy wins: candidates are listed from simple to elaborate.
    results.sort(key=lambda pair: -pair[1].tokens_per_s)
    (chosen, predicted), (_, second) = results[0], results[1]
    predicted = replace(predicted, bounds=judged.bounds(chosen, predicted))
    bounds = _bounds(judged, slots)
    final = make_spec(
        slots=slots,
        cache=chosen.cache.name,
        predictor=chosen.predictor.name,
        allocation=chosen.allocation.name,
        scheduler=chosen.scheduler.name,
        popularity=forecaster.workload.popularity(),
        predictor_params=chosen.predictor.params,
    )
    ordered = (predicted, *(result for _, result in results[1:]))
    tuning = Tuning(
        trace_id=forecaster.trace_id,
        budget=budget,
        chosen=predicted.label,
        runner_up=second.label,
        explanation=explain(ordered, bounds, forecaster),
        candidates=ordered,
        bounds=bounds,
        curve=tuple(capacity_curve(judge, forecaster.shape, popularity)),
        provenance=forecaster.provenance,
    )
    return Choice(final, predicted, tuning)


def candidates(
    slots: int, popularity: Sequence[Sequence[int]], *, lookahead: int
) -> list[PolicySpec]:
    """The built-in space: caches × allocations × predictors the trace can feed."""
    predictors = ["none"] + (["gate_lookahead"] if lookahead >= 1 else [])
    return [
        make_spec(
            slots=slots,
            cache=cache,
            allocation=allocation,
            predictor=predictor,
            popularity=popularity,
        )
        for predictor in predictors
        for cache in CACHES
        for allocation in ALLOCATIONS
    ]


def _bounds(forecaster: Forecaster, slots: int) -> tuple[Result, ...]:
    specs = [
        make_spec(slots=slots, cache="belady"),
        make_spec(slots=slots, cache="lru", predictor="oracle"),
    ]
    return tuple(forecaster.predict(spec, with_bounds=False) for spec in specs)


def explain(
    candidates: Sequence[Result], bounds: Sequence[Result], forecaster: Forecaster
) -> tuple[str, ...]:
    """The choice in sentences, the unwelcome ones included."""
    best, second = candidates[0], candidates[1]
    baseline = _of(candidates, cache="none", predictor="none")
    static = _of(candidates, cache="static", predictor="none")
    lines = [_headline(best, baseline), _runner_up(best, second)]
    if best not in (static, baseline) and _gain(best, static) < _NOT_WORTH_IT:
        lines.append(
            f"A static placement is as good ({static.tokens_per_s:.1f} tokens/s) and simpler."
        )
    limit = best.bounds.all_resident_tokens_per_s
    if limit and _gain(best, baseline) < _NOT_WORTH_IT:
        lines.append(
            "No policy helps here: "
            + (
                "computation, not loading, sets the pace."
                if baseline.stall_s < _NOT_WORTH_IT * baseline.time.total_s
                else "buy link or memory."
            )
        )
    lines.append(
        f"It hits {best.decode.hit_rate:.0%} of demanded experts in decode "
        f"(Belady, which knows the future: {bounds[0].decode.hit_rate:.0%}) and reaches "
        f"{best.bounds.share_of_best:.0%} of what the link allows; with everything resident it would be "
        f"{limit:.1f} tokens/s."
    )
    lines.append(_ratio_line(best))
    lines.append(
        f"Peak device memory {format_bytes(best.peak_device_bytes)}, of which slots "
        f"{format_bytes(best.memory.slots)}."
    )
    lines.append(
        "The machine's costs were calibrated with the runtime itself."
        if forecaster.decision_is_measured
        else "The costs come from the trace alone, without what the runtime adds: the order counts, the "
        "speed is optimistic. Calibrate with `expertflow-trace calibrate` and pass --machine."
    )
    if forecaster.link_origin != "measured":
        lines.append(
            f"The link is {forecaster.link_origin} ({forecaster.link}), not a measured bus."
        )
    return tuple(lines)


def _headline(best: Result, baseline: Result) -> str:
    if best is baseline:
        return f"No policy beats loading every expert on demand ({baseline.tokens_per_s:.1f} tokens/s)."
    return (
        f"{best.label} is predicted at {best.tokens_per_s:.1f} tokens/s, "
        f"{best.tokens_per_s / baseline.tokens_per_s:.2f}× loading every expert on demand "
        f"({baseline.tokens_per_s:.1f})."
    )


def _runner_up(best: Result, second: Result) -> str:
    margin = _gain(best, second)
    close = ": too close to call." if margin < _NOT_WORTH_IT else "."
    return f"Runner-up: {second.label} at {second.tokens_per_s:.1f} tokens/s, {margin:.1%} behind{close}"


def _ratio_line(best: Result) -> str:
    ratio = best.slots_ratio
    verdict = (
        "a cache can hit."
        if ratio < 1
        else "one event overflows the slots, so no cache can hit by recency: raise the budget."
    )
    return f"r = {ratio:.2f} (distinct experts per decode event over slots per layer): {verdict}"


def _of(results: Sequence[Result], *, cache: str, predictor: str) -> Result:
    return next(
        result
        for result in results
        if result.policy["cache"] == cache and result.policy["predictor"] == predictor
    )


def _gain(one: Result, other: Result) -> float:
    return one.tokens_per_s / other.tokens_per_s - 1.0 if other.tokens_per_s else 0.0

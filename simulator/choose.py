"""Picks a policy for a budget and the user's goals: judged on prompts it did not learn from, and explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..tracer.quantities import format_seconds
from .capacity import capacity_curve
from .explain import explain, gain, plainness
from .feasible import builtin_space
from .forecast import Forecaster
from .judge import Judge, judge_of
from .pareto import pareto
from .policy.spec import AS_ROUTED, IN_ORDER, Member, PolicySpec, make_spec
from .reroute import rerouted
from .result import Result, Sensitivity, Tuning
from .space import Budget, Point, grid, rival_points

_TIE = 0.01
"""Policies nearer than this share of tokens/s are as good as each other, and the plainest is chosen."""
_KEPT = 24
"""Candidates that are kept in the report; many of them differ by nothing."""
_FINALISTS = 3
LADDER = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Shares of all experts at which the finalists are compared, and which are tried where no budget is given."""
_CHANGES = (
    ("link 10 % slower", {"link": 1 / 0.9}),
    ("link 10 % faster", {"link": 1 / 1.1}),
    ("computation 10 % slower", {"compute": 1 / 0.9}),
    ("computation 10 % faster", {"compute": 1 / 1.1}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """What the user asks for beside a budget. None: no such wish."""

    min_tokens_per_s: float | None = None
    max_ttft_s: float | None = None
    max_tpot_s: float | None = None

    def are_met(self, result: Result) -> bool:
        """Whether a predicted run is good enough; latencies are judged by their 95th percentile."""
        return (
            (self.min_tokens_per_s is None or result.tokens_per_s >= self.min_tokens_per_s)
            and (self.max_ttft_s is None or result.ttft.p95 <= self.max_ttft_s)
            and (self.max_tpot_s is None or result.tpot.p95 <= self.max_tpot_s)
        )

    def as_mapping(self) -> dict[str, float]:
        """The wishes there are."""
        named = {
            "min_tokens_per_s": self.min_tokens_per_s,
            "max_ttft_s": self.max_ttft_s,
            "max_tpot_s": self.max_tpot_s,
        }
        return {name: value for name, value in named.items() if value is not None}

    def __str__(self) -> str:
        words = {
            "min_tokens_per_s": lambda value: f"at least {value:g} tokens/s",
            "max_ttft_s": lambda value: f"first token (p95) within {format_seconds(value)}",
            "max_tpot_s": lambda value: f"each further token (p95) within {format_seconds(value)}",
        }
        return ", ".join(words[name](value) for name, value in self.as_mapping().items())


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen policy and everything it was chosen on."""

    spec: PolicySpec
    predicted: Result
    tuning: Tuning


Tried = list[tuple[Point, Result]]


def budgets_of(shape_experts: int) -> list[Budget]:
    """The budgets to climb where the user named none: the smallest that meets the goals is chosen."""
    return [Budget(f"{share:g}", max(1, round(share * shape_experts))) for share in LADDER]


def tune(
    forecaster: Forecaster,
    *,
    budgets: Sequence[Budget],
    goals: Goals = Goals(),
    advance: Callable[[int], None] = lambda _: None,
    routing: Member = AS_ROUTED,
    scheduler: Member = IN_ORDER,
) -> Choice:
    """Predict every policy of the built-in space and choose the fastest at the first budget that meets the goals.

    Of policies that are equally fast within 1 % it is the plainest: small leads come and go with the minute. A lossy
    `routing` is never chosen by itself, as speed alone would always ask for more loss: name it, and all are
    tried with it; so with a `scheduler`, which makes other batches of the recorded ones.

    What a policy learns (popularity, hit curves) comes from half of the batches; all are judged on the other half. The
    chosen policy is then given what the whole trace teaches. Where no budget meets the goals the fastest of the
    last one is returned, and `tuning.meets_goals` is false.
    """
    points = _points(forecaster, budgets[0], routing, scheduler)
    lessons = {need for point in points for need in point.needs}
    judge = judge_of(forecaster, with_curves=True, lessons=lessons, routing=routing)
    tried: Tried = []
    count, budget = 0, budgets[0]
    for budget in budgets:
        tried = _predict_all(judge, budget, (routing, scheduler), advance)
        count += len(tried)
        if any(goals.are_met(result) for _, result in tried):
            break
    good = [pair for pair in tried if goals.are_met(pair[1])]
    ordered = _chosen_first(good or tried, tried)
    (point, predicted), (_, second) = ordered[0], ordered[1]
    spec = judge.spec(point)
    predicted = replace(
        predicted,
        bounds=judge.forecaster.bounds(spec, predicted),
        worth=judge.forecaster.worth(spec, predicted),
    )
    candidates = (predicted, *(result for _, result in ordered[1:]))
    finalists = _finalists(ordered)
    bounds = _bounds(judge.forecaster, budget.slots, routing, scheduler)
    judged = rerouted(judge.forecaster.workload, routing)
    tuning = Tuning(
        trace_id=forecaster.trace_id,
        budget=budget.text,
        chosen=predicted.label,
        runner_up=second.label,
        explanation=(),
        candidates=_kept(candidates),
        bounds=bounds,
        curve=tuple(capacity_curve(judged, forecaster.shape, judge.popularity)),
        provenance=forecaster.provenance,
        margin=gain(predicted, second),
        goals=goals.as_mapping(),
        meets_goals=bool(good),
        pareto=_front(judge, finalists, advance),
        sensitivity=_sensitivity(judge, finalists, advance),
        tried=count,
    )
    words = explain(candidates, tuning, forecaster, str(goals))
    final = judge_of(
        forecaster, with_curves=True, lessons=point.needs, learn_from_all=True, routing=routing
    ).spec(point)
    return Choice(final, predicted, replace(tuning, explanation=words))


def runs_of(forecaster: Forecaster, budgets: Sequence[Budget]) -> int:
    """Predictions that `tune` makes at most: for a progress bar."""
    points = len(_points(forecaster, budgets[0], AS_ROUTED))
    finalists = min(points, _FINALISTS + 2)
    return points * len(budgets) + finalists * (len(LADDER) + len(_CHANGES))


def _points(
    forecaster: Forecaster, budget: Budget, routing: Member, scheduler: Member = IN_ORDER
) -> list[Point]:
    space = builtin_space(forecaster.workload, forecaster.costs, [budget], routing=routing)
    found = [*grid(space), *rival_points(space)]
    return [replace(point, members={**point.members, "scheduler": scheduler}) for point in found]


def _predict_all(
    judge: Judge, budget: Budget, fixed: tuple[Member, Member], advance: Callable[[int], None]
) -> Tried:
    """Every policy at one budget, fastest first; on a tie the simpler one."""
    tried: Tried = []
    for point in _points(judge.forecaster, budget, *fixed):
        tried.append((point, judge.result(point)))
        advance(1)
    return sorted(tried, key=lambda pair: (-pair[1].tokens_per_s, plainness(pair[1])))


def _chosen_first(good: Tried, tried: Tried) -> Tried:
    """The plainest of those as fast as the fastest, then the others by speed, those that meet no goal last."""
    fastest = good[0][1]
    equals = [pair for pair in good if gain(fastest, pair[1]) < _TIE]
    chosen = min(equals, key=lambda pair: plainness(pair[1]))
    rest = [pair for pair in good if pair is not chosen]
    return [chosen, *rest, *(pair for pair in tried if pair not in good)]


def _kept(candidates: Sequence[Result]) -> tuple[Result, ...]:
    """The best, and the plain ones that everything is compared with."""
    plain = [
        result
        for result in candidates[_KEPT:]
        if result.policy["predictor"] == "none"
        and result.policy["cache"] in ("none", "lru", "static")
        and result.policy["allocation"] == "equal"
    ]
    return (*candidates[:_KEPT], *plain)


def _finalists(ordered: Tried) -> list[Point]:
    """The best few, and plain LRU and static, whose order others may want to know."""
    found = [point for point, _ in ordered[:_FINALISTS]]
    for cache in ("lru", "static"):
        plain = next(
            point
            for point, _ in ordered
            if point.members["cache"].name == cache
            and point.members["predictor"].name == "none"
            and point.members["allocation"].name == "equal"
        )
        if plain not in found:
            found.append(plain)
    return found


def _front(
    judge: Judge, finalists: Sequence[Point], advance: Callable[[int], None]
) -> tuple[Result, ...]:
    """What no other beats in both speed and memory, smallest first."""
    results: list[Result] = []
    for budget in budgets_of(judge.forecaster.shape.total_experts):
        for point in finalists:
            results.append(judge.result(replace(point, budget=budget.text, slots=budget.slots)))
            advance(1)
    front = pareto(results, maximise=("tokens_per_s",), minimise=("peak_device_bytes",))
    return tuple(sorted(front, key=lambda result: result.peak_device_bytes))


def _sensitivity(
    judge: Judge, finalists: Sequence[Point], advance: Callable[[int], None]
) -> tuple[Sensitivity, ...]:
    """The finalists on machines a little different from the one that was measured."""
    found: list[Sensitivity] = []
    for change, factors in _CHANGES:
        ready = judge.forecaster
        changed = replace(judge, forecaster=replace(ready, costs=ready.costs.scaled(**factors)))
        results = [changed.result(point) for point in finalists]
        advance(len(results))
        best = max(results, key=lambda result: result.tokens_per_s)
        found.append(
            Sensitivity(
                change=change,
                chosen_tokens_per_s=results[0].tokens_per_s,
                best=best.label,
                best_tokens_per_s=best.tokens_per_s,
                loss=1.0 - results[0].tokens_per_s / best.tokens_per_s
                if best.tokens_per_s
                else 0.0,
            )
        )
    return tuple(found)


def _bounds(
    forecaster: Forecaster, slots: int, routing: Member, scheduler: Member
) -> tuple[Result, ...]:
    specs = [
        replace(spec, routing=routing, scheduler=scheduler)
        for spec in (
            make_spec(slots=slots, cache="belady"),
            make_spec(slots=slots, cache="lru", predictor="oracle"),
        )
    ]
    return tuple(forecaster.predict(spec, with_bounds=False) for spec in specs)

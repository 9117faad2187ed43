"""How good a predictor would have to be: the recall from which prefetching pays, before anyone trains one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..tracer.quantities import format_seconds
from ..tracer.types import Origin
from .forecast import Forecaster
from .policy.spec import Member, PolicySpec
from .result import Result

BREAK_EVEN_FORMAT = "expertflow.break_even/1"
RECALLS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_HALVINGS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallPoint:
    """What a predictor of this recall gives. `gain` is over the same policy without prefetch."""

    recall: float
    tokens_per_s: float
    gain: float
    stall_s: float
    useful: int
    late: int
    wasted: int
    harmful: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """Between which recalls prefetching is faster than none, at one precision, latency and horizon.

    `recall` is the lowest that pays, None if none does; `until` is the highest, None if full recall pays: where copies
    are slow, more of them may block the link. `perfect_tokens_per_s` is the same policy with the events to come known,
    at no cost.
    """

    policy: str
    horizon: int
    precision: float
    latency_s: float
    recall: float | None
    until: float | None
    finding: str
    without_tokens_per_s: float
    perfect_tokens_per_s: float
    points: tuple[RecallPoint, ...]
    trace_id: str
    device: str
    link: str
    link_origin: Origin
    format: str = BREAK_EVEN_FORMAT


def runs_of(recalls: Sequence[float] = RECALLS) -> int:
    """Predictions that `break_even` makes at most: for a progress bar."""
    return 2 + len(recalls) + 2 * _HALVINGS


def break_even(
    forecaster: Forecaster,
    spec: PolicySpec,
    *,
    precision: float = 1.0,
    latency_s: float = 0.0,
    horizon: int = 1,
    recalls: Sequence[float] = RECALLS,
    advance: Callable[[int], None] = lambda _: None,
) -> BreakEven:
    """Try predictors of rising recall in place of `spec`'s own; halve the intervals where they begin and cease to pay.

    All are charged the decision time of the policy without prefetch, and `latency_s` for every event on top. Raises
    UsageError for what cannot be.
    """
    plain = replace(spec, predictor=Member(name="none"))
    ready = forecaster.charging(plain)

    def predicted(name: str, **params: float) -> Result:
        found = ready.predict(
            replace(spec, predictor=Member(name=name, params=params)), with_bounds=False
        )
        advance(1)
        return found

    def guessed(recall: float) -> Result:
        return predicted(
            "synthetic",
            recall=recall,
            precision=precision,
            latency_s=latency_s,
            horizon=horizon,
        )

    without = predicted("none")
    perfect = predicted("oracle", horizon=horizon)
    results = {recall: guessed(recall) for recall in sorted(recalls)}

    def pays(recall: float) -> bool:
        if recall not in results:
            results[recall] = guessed(recall)
        return results[recall].tokens_per_s > without.tokens_per_s

    tried = tuple(results)
    recall, until = _where(tried, pays)
    shown = [_point(recall, results[recall], without) for recall in tried]
    return BreakEven(
        policy=plain.label,
        horizon=horizon,
        precision=precision,
        latency_s=latency_s,
        recall=recall,
        until=until,
        finding=_finding(recall, until, precision, latency_s, shown),
        without_tokens_per_s=without.tokens_per_s,
        perfect_tokens_per_s=perfect.tokens_per_s,
        points=tuple(shown),
        trace_id=forecaster.trace_id,
        device=forecaster.device,
        link=forecaster.link,
        link_origin=forecaster.link_origin,
    )


def _where(
    recalls: Sequence[float], pays: Callable[[float], bool]
) -> tuple[float | None, float | None]:
    """The lowest recall that pays, and the highest before one that does not, if there are such."""
    first = next((place for place, recall in enumerate(recalls) if pays(recall)), None)
    if first is None:
        return None, None
    begins = recalls[first]
    if first:
        begins = _halved(recalls[first - 1], begins, pays)
    stop = next((n for n in range(first, len(recalls)) if not pays(recalls[n])), None)
    if stop is None:
        return begins, None
    return begins, _halved(recalls[stop], recalls[stop - 1], pays)


def _halved(without: float, paying: float, pays: Callable[[float], bool]) -> float:
    """A recall that pays, near one that does not."""
    for _ in range(_HALVINGS):
        middle = (without + paying) / 2
        if pays(middle):
            paying = middle
        else:
            without = middle
    return paying


def _point(recall: float, result: Result, without: Result) -> RecallPoint:
    found = result.prefetch
    return RecallPoint(
        recall=recall,
        tokens_per_s=result.tokens_per_s,
        gain=_gain(result, without),
        stall_s=result.prefill.stall_s + result.decode.stall_s,
        useful=found.useful,
        late=found.late,
        wasted=found.wasted,
        harmful=found.harmful,
    )


def _gain(result: Result, without: Result) -> float:
    return result.tokens_per_s / without.tokens_per_s - 1.0 if without.tokens_per_s else 0.0


def _finding(
    recall: float | None,
    until: float | None,
    precision: float,
    latency_s: float,
    points: Sequence[RecallPoint],
) -> str:
    given = f"at a precision of {precision:g} and {format_seconds(latency_s)} per event"
    best = max(points, key=lambda point: point.gain)
    if recall is None:
        return f"No predictor pays here {given}: with every expert foreseen {points[-1].gain:+.1%}."
    most = f"{best.gain:+.1%} at {best.recall:g}"
    if until is None:
        return f"A predictor pays here from a recall of {recall:.2f} on {given}; {most}."
    return (
        f"A predictor pays here between a recall of {recall:.2f} and {until:.2f} {given}, {most} at the best; with "
        f"more its copies cost more than they spare ({points[-1].gain:+.1%} with every expert foreseen)."
    )

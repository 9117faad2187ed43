"""Judges pairs of predicted and measured results: gaps, tolerances, causes (DESIGN §9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..simulator.result import Check, Result, Verdict, VerifiedRun
from ..tracer.probe import provenance

THROUGHPUT = 0.10
BYTES = 0.02
MEMORY = 0.02
HIT_RATE = 0.01


@dataclass(frozen=True, slots=True)
class Pair:
    """One prediction and the measurement made after it."""

    predicted: Result
    measured: Result


@dataclass(frozen=True, slots=True)
class _Quantity:
    """What is compared, how far it may be off, and whether the gap is relative."""

    name: str
    unit: str
    of: Callable[[Result], float]
    tolerance: float
    is_relative: bool = True


QUANTITIES = (
    _Quantity("tokens_per_s", "tokens/s", lambda r: r.tokens_per_s, THROUGHPUT),
    _Quantity("prefill_tokens_per_s", "tokens/s", lambda r: r.prefill.tokens_per_s, THROUGHPUT),
    _Quantity("decode_tokens_per_s", "tokens/s", lambda r: r.decode.tokens_per_s, THROUGHPUT),
    _Quantity("hit_rate", "share", lambda r: r.hit_rate, HIT_RATE, is_relative=False),
    _Quantity("bytes_per_token", "B", lambda r: r.bytes_per_token, BYTES),
    _Quantity("peak_device_bytes", "B", lambda r: float(r.peak_device_bytes), MEMORY),
)


def noise_of(controls: Sequence[tuple[Result, Result]]) -> dict[str, float]:
    """By quantity: how far two measurements of the same configuration differ (median, relative)."""
    return {
        quantity.name: float(
            np.median([_spread(quantity.of(one), quantity.of(two)) for one, two in controls])
        )
        for quantity in QUANTITIES
        if quantity.is_relative
    }


def _spread(one: float, two: float) -> float:
    return abs(one - two) / ((one + two) / 2) if one + two else 0.0


def judge(
    label: str,
    pairs: Sequence[Pair],
    same_tokens: bool,
    noise: Mapping[str, float],
    *,
    is_lossless: bool = True,
) -> VerifiedRun:
    """Compare one configuration's pairs; each gap is the median over the pairs."""
    causes = time_causes(pairs)
    checks = tuple(
        _check(quantity, pairs, causes, noise.get(quantity.name, 0.0)) for quantity in QUANTITIES
    )
    return VerifiedRun(
        label=label,
        predicted=pairs[-1].predicted,
        measured=tuple(pair.measured for pair in pairs),
        checks=checks,
        same_tokens=same_tokens,
        log_replays=all(pair.measured.log_replays for pair in pairs),
        causes=causes,
        is_lossless=is_lossless,
    )


def _check(
    quantity: _Quantity, pairs: Sequence[Pair], causes: dict[str, float], noise: float
) -> Check:
    predicted = [quantity.of(pair.predicted) for pair in pairs]
    measured = [quantity.of(pair.measured) for pair in pairs]
    gaps = [_gap(p, m, quantity.is_relative) for p, m in zip(predicted, measured, strict=True)]
    gap = float(np.median(gaps))
    is_timed = quantity.unit == "tokens/s"
    passed = abs(gap) <= quantity.tolerance
    return Check(
        quantity=quantity.name,
        unit=quantity.unit,
        predicted=float(np.median(predicted)),
        measured=float(np.median(measured)),
        gap=gap,
        tolerance=quantity.tolerance,
        noise=noise,
        passed=passed,
        cause="" if passed else _cause(is_timed, causes, noise),
    )


def _gap(predicted: float, measured: float, is_relative: bool) -> float:
    if not is_relative:
        return predicted - measured
    if measured == 0:
        return 0.0 if predicted == 0 else 1.0
    return predicted / measured - 1.0


def time_causes(pairs: Sequence[Pair]) -> dict[str, float]:
    """Where predicted and measured time differ: (predicted − measured) of each part over the total."""
    parts = (
        "mixer_s",
        "experts_s",
        "stall_s",
        "decision_s",
        "readback_s",
        "lookahead_s",
        "schedule_s",
        "other_s",
    )
    causes: dict[str, float] = {}
    for part in parts:
        shares = [
            (getattr(pair.predicted.time, part) - getattr(pair.measured.time, part))
            / pair.measured.time.total_s
            for pair in pairs
        ]
        causes[part] = float(np.median(shares))
    return causes


def _cause(is_timed: bool, causes: dict[str, float], noise: float) -> str:
    if not is_timed:
        return "see the configuration's decision log"
    part = max(causes, key=lambda name: abs(causes[name]))
    word = "over" if causes[part] > 0 else "under"
    found = f"{part.removesuffix('_s')} time {word}estimated by {abs(causes[part]):.1%} of the run"
    if noise > THROUGHPUT / 2:
        found += f"; the machine itself varies by {noise:.1%}: repeat on a quieter one"
    return found


def summarise(
    runs: Sequence[VerifiedRun], noise: Mapping[str, float], *, emulated_link: str
) -> Verdict:
    """The verdict over all configurations, in words."""
    checks = [check for run in runs for check in run.checks]
    failed = sum(not check.passed for check in checks)
    gaps = [abs(c.gap) for c in checks if c.quantity == "tokens_per_s"]
    variation = noise["tokens_per_s"]
    is_ordered = order_is_preserved(runs, variation)
    is_same = all(run.same_tokens for run in runs if run.is_lossless)
    replays = all(run.log_replays for run in runs)
    validated = not failed and is_ordered and is_same and replays
    facts = (
        f"{len(runs)} configurations: throughput off by {np.median(gaps):.1%} in the median and "
        f"{max(gaps):.1%} at worst; two runs of the same configuration differ by {variation:.1%}."
    )
    facts += "".join(f" {_loss(run)}" for run in runs if not run.is_lossless)
    problems = [
        *([] if is_same else ["the text differs from the resident model's"]),
        *([] if replays else ["a decision log does not replay"]),
        *([] if is_ordered else ["the order of the policies is not preserved"]),
        *([f"{failed} of {len(checks)} checks are out of tolerance"] if failed else []),
    ]
    words = "Validated. " if validated else f"NOT validated: {', and '.join(problems)}. "
    return Verdict(
        validated=validated,
        summary=words + facts,
        runs=tuple(runs),
        noise=dict(noise),
        order_preserved=is_ordered,
        provenance=provenance(0, "own-generation"),
        warnings=(
            (f"The link is emulated ({emulated_link}); these are not times of a real bus.",)
            if emulated_link
            else ()
        ),
    )


def _loss(run: VerifiedRun) -> str:
    """What a lossy configuration did to the text, as no promise is made of it."""
    texts = [measured.text for measured in run.measured if measured.text is not None]
    changed, tokens = sum(t.tokens_changed for t in texts), sum(t.tokens for t in texts)
    return f"{run.label} is LOSSY: {changed} of {tokens} generated tokens differ from the resident model's."


def order_is_preserved(runs: Sequence[VerifiedRun], noise: float) -> bool:
    """Whether every pair that measurement can tell apart is predicted in the same order.

    Pairs closer than twice the noise (at least 2 %) count as ties.
    """
    tie = max(0.02, 2 * noise)
    speeds = [
        (
            next(c.predicted for c in run.checks if c.quantity == "tokens_per_s"),
            next(c.measured for c in run.checks if c.quantity == "tokens_per_s"),
        )
        for run in runs
    ]
    for place, (predicted, measured) in enumerate(speeds):
        for other_predicted, other_measured in speeds[place + 1 :]:
            apart = max(measured, other_measured) / min(measured, other_measured) - 1
            is_swapped = (measured - other_measured) * (predicted - other_predicted) < 0
            if apart > tie and is_swapped:
                return False
    return True

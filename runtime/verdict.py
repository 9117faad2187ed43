"""Judges pairs of predicted and measured results: gaps, tolerances, causes (DESIGN §9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..simulator.result import Check, Result, Verdict, VerifiedRun
from ..tracer.probe import provenance

THROUGHPUT = 0.10
BYTES = 0.02
MEMORY = 0.02
HIT_RATE = 0.01
SPEED_STEP = 0.10
"""What a forecast of latencies may be wrong about: the speed of the machine, as much as in THROUGHPUT."""
LATENCY = 0.10
LATENCY_AT_MOST = 0.50
"""A tolerance beyond this judges nothing: such a latency is shown only."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One prediction and the measurement made after it."""

    predicted: Result
    measured: Result


@dataclass(frozen=True, slots=True)
class Quantity:
    """What is compared, how far it may be off, and whether the gap is relative.

    Where a run has a tolerance of its own (`judge`), it is judged up to `judged_up_to`.
    """

    name: str
    unit: str
    of: Callable[[Result], float]
    tolerance: float
    is_relative: bool = True
    judged_up_to: float = math.inf

    def gap(self, predicted: float, measured: float) -> float:
        """How far one is off the other, as a share of the latter or in itself."""
        if not self.is_relative:
            return predicted - measured
        if measured == 0:
            return 0.0 if predicted == 0 else 1.0
        return predicted / measured - 1.0


QUANTITIES = (
    Quantity("tokens_per_s", "tokens/s", lambda r: r.tokens_per_s, THROUGHPUT),
    Quantity("prefill_tokens_per_s", "tokens/s", lambda r: r.prefill.tokens_per_s, THROUGHPUT),
    Quantity("decode_tokens_per_s", "tokens/s", lambda r: r.decode.tokens_per_s, THROUGHPUT),
    Quantity("hit_rate", "share", lambda r: r.hit_rate, HIT_RATE, is_relative=False),
    Quantity("bytes_per_token", "B", lambda r: r.bytes_per_token, BYTES),
    Quantity("peak_device_bytes", "B", lambda r: float(r.peak_device_bytes), MEMORY),
)


def _latency(name: str, of: Callable[[Result], float]) -> Quantity:
    return Quantity(name, "s", of, LATENCY, judged_up_to=LATENCY_AT_MOST)


LATENCIES = (
    _latency("ttft_p50_s", lambda r: r.ttft.p50),
    _latency("ttft_p99_s", lambda r: r.ttft.p99),
    _latency("tpot_p50_s", lambda r: r.tpot.p50),
    _latency("tpot_p99_s", lambda r: r.tpot.p99),
)
SERVING_QUANTITIES = (*QUANTITIES, *LATENCIES)
ORDERED_BY = ("tokens_per_s", "tpot_p50_s")
"""Requests that a machine keeps up with are all served at the rate they come in: there speed is time per token."""


def noise_of(
    controls: Sequence[tuple[Result, Result]], quantities: Sequence[Quantity] = QUANTITIES
) -> dict[str, float]:
    """By quantity: how far two measurements of the same configuration differ (median, relative)."""
    return {
        quantity.name: float(
            np.median([_spread(quantity.of(one), quantity.of(two)) for one, two in controls])
        )
        for quantity in quantities
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
    quantities: Sequence[Quantity] = QUANTITIES,
    tolerances: Mapping[str, float] | None = None,
) -> VerifiedRun:
    """Compare one configuration's pairs; each gap is the median over the pairs.

    `tolerances` are those of this configuration, by quantity, where they are wider than the usual ones.
    """
    causes = time_causes(pairs)
    own = tolerances or {}
    checks = tuple(
        _check(
            replace(quantity, tolerance=max(quantity.tolerance, own.get(quantity.name, 0.0))),
            pairs,
            causes,
            noise.get(quantity.name, 0.0),
        )
        for quantity in quantities
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
    quantity: Quantity, pairs: Sequence[Pair], causes: dict[str, float], noise: float
) -> Check:
    predicted = [quantity.of(pair.predicted) for pair in pairs]
    measured = [quantity.of(pair.measured) for pair in pairs]
    gaps = [quantity.gap(p, m) for p, m in zip(predicted, measured, strict=True)]
    gap = float(np.median(gaps))
    is_timed = quantity.unit in ("tokens/s", "s")
    passed = abs(gap) <= quantity.tolerance
    is_judged = quantity.tolerance <= quantity.judged_up_to
    cause = _cause(is_timed, causes, noise) if is_judged else _NOT_JUDGED
    return Check(
        quantity=quantity.name,
        unit=quantity.unit,
        predicted=float(np.median(predicted)),
        measured=float(np.median(measured)),
        gap=gap,
        tolerance=quantity.tolerance,
        noise=noise,
        passed=passed,
        cause="" if passed and is_judged else cause,
        is_judged=is_judged,
    )


_NOT_JUDGED = f"under this load {SPEED_STEP:.0%} more or less speed change it by more than half"


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
    runs: Sequence[VerifiedRun],
    noise: Mapping[str, float],
    *,
    emulated_link: str,
    arrivals: str = "",
    notes: Sequence[str] = (),
) -> Verdict:
    """The verdict over all configurations, in words; `arrivals` says how requests came, if they did."""
    every = [check for run in runs for check in run.checks]
    checks = [check for check in every if check.is_judged]
    failed = sum(not check.passed for check in checks)
    gaps = [abs(c.gap) for c in checks if c.quantity == "tokens_per_s"]
    variation = noise["tokens_per_s"]
    is_ordered = all(
        order_is_preserved(runs, noise[quantity], quantity)
        for quantity in ORDERED_BY
        if quantity in noise
    )
    is_same = all(run.same_tokens for run in runs if run.is_lossless)
    replays = all(run.log_replays for run in runs)
    validated = not failed and is_ordered and is_same and replays
    under_load = f", requests as they arrive ({arrivals})" if arrivals else ""
    facts = (
        f"{len(runs)} configurations{under_load}: throughput off by {np.median(gaps):.1%} in the median and "
        f"{max(gaps):.1%} at worst; two runs of the same configuration differ by {variation:.1%}."
    )
    facts += _latency_facts(every) if arrivals else ""
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
            *(
                (f"The link is emulated ({emulated_link}); these are not times of a real bus.",)
                if emulated_link
                else ()
            ),
            *notes,
        ),
        arrivals=arrivals,
    )


def _latency_facts(checks: Sequence[Check]) -> str:
    """How far typical latencies are off, judged or not, and how many of all are only shown."""
    words = ""
    for quantity, name in (("ttft_p50_s", "to the first token"), ("tpot_p50_s", "per token")):
        gaps = [abs(check.gap) for check in checks if check.quantity == quantity]
        words += f" Median time {name} off by {np.median(gaps):.1%} in the median and {max(gaps):.1%} at worst."
    latencies = [check for check in checks if check.unit == "s"]
    shown = sum(not check.is_judged for check in latencies)
    if shown:
        words += (
            f" {shown} of {len(latencies)} latencies are shown, not judged: a machine up to {SPEED_STEP:.0%} faster "
            f"or slower would have them more than {LATENCY_AT_MOST:.0%} off."
        )
    return words


def _loss(run: VerifiedRun) -> str:
    """What a lossy configuration did to the text, as no promise is made of it."""
    texts = [measured.text for measured in run.measured if measured.text is not None]
    changed, tokens = sum(t.tokens_changed for t in texts), sum(t.tokens for t in texts)
    return f"{run.label} is LOSSY: {changed} of {tokens} generated tokens differ from the resident model's."


def order_is_preserved(
    runs: Sequence[VerifiedRun], noise: float, quantity: str = "tokens_per_s"
) -> bool:
    """Whether every pair that measurement can tell apart is predicted in the same order.

    Pairs closer than twice the noise (at least 2 %) count as ties; what is not judged is left out.
    """
    tie = max(0.02, 2 * noise)
    values = [
        (check.predicted, check.measured)
        for run in runs
        for check in run.checks
        if check.quantity == quantity and check.is_judged
    ]
    for place, (predicted, measured) in enumerate(values):
        for other_predicted, other_measured in values[place + 1 :]:
            low, high = sorted((measured, other_measured))
            is_apart = high > low * (1 + tie)
            is_swapped = (measured - other_measured) * (predicted - other_predicted) < 0
            if is_apart and is_swapped:
                return False
    return True

"""Judging hand-made pairs: tolerances to the edge, causes by name, ties in the order."""

from dataclasses import replace

import pytest
from expertflow.runtime.verdict import (
    SERVING_QUANTITIES,
    Pair,
    judge,
    noise_of,
    order_is_preserved,
    summarise,
    time_causes,
)
from expertflow.runtime.verify import configurations
from expertflow.simulator.result import (
    Bounds,
    MemoryResult,
    Percentiles,
    PhaseResult,
    PrefetchResult,
    Result,
    TimeSplit,
)
from expertflow.tracer.types import Provenance

_LATENCY = Percentiles(mean=0.1, p50=0.1, p95=0.1, p99=0.1)
_PHASE = PhaseResult(
    steps=10,
    tokens=100,
    seconds=1.0,
    tokens_per_s=100.0,
    demanded=200,
    hits=100,
    lates=0,
    misses=100,
    hit_rate=0.5,
    late_rate=0.0,
    miss_rate=0.5,
    bytes_moved=1000,
    bytes_per_token=10.0,
    stall_s=0.1,
    mean_distinct=2.0,
)
_TIME = TimeSplit(
    total_s=1.0,
    mixer_s=0.3,
    experts_s=0.3,
    stall_s=0.2,
    decision_s=0.1,
    readback_s=0.05,
    lookahead_s=0.0,
    other_s=0.05,
)
BASE = Result(
    source="measured",
    label="lru @ 9 slots",
    policy={},
    policy_hash="0" * 16,
    trace_id="t",
    model_id="m",
    device="d",
    link="l",
    link_origin="measured",
    slots=9,
    total_experts=24,
    batch_size=1,
    tokens_per_s=100.0,
    ttft_s=0.1,
    tpot_s=0.1,
    ttft=_LATENCY,
    tpot=_LATENCY,
    hit_rate=0.5,
    late_rate=0.0,
    miss_rate=0.5,
    bytes_per_token=1000.0,
    stall_s=0.2,
    link_busy_share=0.2,
    slots_ratio=0.5,
    peak_device_bytes=10_000,
    memory=MemoryResult(non_expert_weights=5000, slots=4000, kv_cache=500, activations=500),
    time=_TIME,
    prefill=_PHASE,
    decode=_PHASE,
    prefetch=PrefetchResult(),
    bounds=Bounds(),
    provenance=Provenance(command="", created="", versions={}, seed=0),
    same_tokens=True,
    log_replays=True,
)


def result(**changes) -> Result:
    time = {name: changes.pop(name) for name in list(changes) if name.endswith("_s_split")}
    split = {name.removesuffix("_split"): seconds for name, seconds in time.items()}
    return replace(BASE, time=replace(_TIME, **split), **changes)


def judged(predicted: Result, *measured: Result, noise: float = 0.0):
    return judge("lru", [Pair(predicted, one) for one in measured], True, {"tokens_per_s": noise})


def check(run, quantity: str):
    return next(check for check in run.checks if check.quantity == quantity)


def test_equal_pairs_pass_every_check():
    run = judged(BASE, BASE)

    assert all(check.passed and check.gap == 0 and not check.cause for check in run.checks)
    assert {check.quantity for check in run.checks} == {
        "tokens_per_s",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "hit_rate",
        "bytes_per_token",
        "peak_device_bytes",
    }


@pytest.mark.parametrize(
    ("quantity", "at", "edge"),
    [
        ("tokens_per_s", 100.0, 0.10),
        ("bytes_per_token", 1000.0, 0.02),
        ("peak_device_bytes", 10_000, 0.02),
    ],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_relative_tolerances_hold_to_the_edge(quantity, at, edge, sign):
    inside = judged(result(**{quantity: at * (1 + sign * (edge - 1e-6))}), BASE)
    outside = judged(result(**{quantity: at * (1 + sign * (edge + 1e-6))}), BASE)

    assert check(inside, quantity).passed
    assert not check(outside, quantity).passed
    assert check(outside, quantity).gap == pytest.approx(sign * edge, abs=1e-4)
    assert check(outside, quantity).tolerance == edge


@pytest.mark.parametrize("sign", [-1, 1])
def test_hit_rate_is_judged_in_points(sign):
    inside = judged(result(hit_rate=0.5 + sign * 0.0099), BASE)
    outside = judged(result(hit_rate=0.5 + sign * 0.0101), BASE)

    assert check(inside, "hit_rate").passed
    assert not check(outside, "hit_rate").passed
    assert check(outside, "hit_rate").gap == pytest.approx(sign * 0.0101)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_phases_are_judged_apart(phase):
    run = judged(result(**{phase: replace(_PHASE, tokens_per_s=150.0)}), BASE)

    failed = [check.quantity for check in run.checks if not check.passed]
    assert failed == [f"{phase}_tokens_per_s"]


def test_gap_is_the_median_over_the_repeats():
    run = judged(BASE, result(tokens_per_s=50.0), BASE, result(tokens_per_s=101.0))

    assert check(run, "tokens_per_s").gap == 0
    assert check(run, "tokens_per_s").passed
    assert len(run.measured) == 3


def test_nothing_measured_is_no_gap_only_if_nothing_was_predicted():
    nothing = result(bytes_per_token=0.0)

    assert check(judged(nothing, nothing), "bytes_per_token").gap == 0
    assert not check(judged(BASE, nothing), "bytes_per_token").passed


def test_noise_is_that_of_the_same_quantity():
    slower = result(tokens_per_s=80.0)

    noise = noise_of([(BASE, BASE), (BASE, slower), (BASE, slower)])

    assert noise["tokens_per_s"] == pytest.approx(20 / 90)
    assert noise["decode_tokens_per_s"] == noise["bytes_per_token"] == 0
    assert check(judged(BASE, BASE, noise=0.07), "tokens_per_s").noise == 0.07
    assert check(judged(BASE, BASE, noise=0.07), "hit_rate").noise == 0


@pytest.mark.parametrize(
    ("part", "seconds", "words"),
    [
        ("stall_s", 0.6, "stall time overestimated by 40.0%"),
        ("mixer_s", 0.05, "mixer time underestimated by 25.0%"),
        ("lookahead_s", 0.2, "lookahead time overestimated by 20.0%"),
    ],
)
def test_cause_names_the_part_that_is_furthest_off(part, seconds, words):
    run = judged(result(tokens_per_s=50.0, **{f"{part}_split": seconds}), BASE)

    assert words in check(run, "tokens_per_s").cause
    assert run.causes[part] == pytest.approx(seconds - getattr(_TIME, part))


def test_cause_of_a_wrong_decision_points_to_the_log():
    run = judged(result(hit_rate=0.9), BASE)

    assert "decision log" in check(run, "hit_rate").cause


def test_causes_are_shares_of_the_measured_time():
    measured = result(total_s_split=2.0)

    causes = time_causes([Pair(result(stall_s_split=0.4), measured)])

    assert causes["stall_s"] == pytest.approx(0.1)
    assert causes["mixer_s"] == 0


def test_one_log_that_does_not_replay_marks_the_run():
    run = judged(BASE, BASE, result(log_replays=False), BASE)

    assert not run.log_replays


def under_load(predicted: Result, measured: Result, **tolerances: float):
    return judge(
        "lru", [Pair(predicted, measured)], True, {},
        quantities=SERVING_QUANTITIES, tolerances=tolerances,
    )  # fmt: skip


def late(**seconds: float) -> Percentiles:
    return replace(_LATENCY, **seconds)


@pytest.mark.parametrize("latency", ["ttft", "tpot"])
@pytest.mark.parametrize("quantile", ["p50", "p99"])
def test_latencies_are_judged_by_quantile(latency, quantile):
    name = f"{latency}_{quantile}_s"
    inside, outside = (result(**{latency: late(**{quantile: s})}) for s in (0.1099, 0.1101))

    assert check(under_load(inside, BASE), name).passed
    failed = [one.quantity for one in under_load(outside, BASE).checks if not one.passed]
    assert failed == [name]
    assert check(under_load(outside, BASE), name).tolerance == 0.10


def test_a_tolerance_of_its_own_widens_and_never_narrows():
    off = result(ttft=late(p50=0.14))

    assert check(under_load(off, BASE, ttft_p50_s=0.41), "ttft_p50_s").passed
    assert check(under_load(off, BASE, ttft_p50_s=0.39), "ttft_p50_s").passed is False
    assert check(under_load(off, BASE, ttft_p50_s=0.01), "ttft_p50_s").tolerance == 0.10


def test_what_cannot_be_forecast_is_shown_and_decides_nothing():
    chaotic = under_load(result(ttft=late(p99=0.5)), BASE, ttft_p99_s=0.51)
    shown = check(chaotic, "ttft_p99_s")

    assert shown.gap == pytest.approx(4)
    assert not shown.passed
    assert not shown.is_judged
    assert "half" in shown.cause
    verdict = summarise(
        [chaotic], noise_of([(BASE, BASE)], SERVING_QUANTITIES), emulated_link="", arrivals="so"
    )
    assert verdict.validated
    assert "1 of 4 latencies are shown, not judged" in verdict.summary
    assert "requests as they arrive (so)" in verdict.summary


def test_other_quantities_are_judged_however_wide_their_tolerance():
    run = under_load(result(tokens_per_s=250.0), BASE, tokens_per_s=0.9)

    assert check(run, "tokens_per_s").is_judged
    assert not check(run, "tokens_per_s").passed


def test_under_load_policies_are_ordered_by_time_per_token_too():
    """All are served at the rate that requests come in, so throughput cannot tell them apart."""
    fast, slow = result(tpot=late(p50=0.05)), result(tpot=late(p50=0.052))
    noise = noise_of([(BASE, BASE)], SERVING_QUANTITIES)

    def verdict(*pairs):
        judged = [under_load(*pair) for pair in pairs]
        return summarise(judged, noise, emulated_link="", arrivals="so")

    assert verdict((fast, fast), (slow, slow)).validated
    swapped = verdict((fast, slow), (slow, fast))
    assert all(one.passed for run in swapped.runs for one in run.checks)
    assert not swapped.order_preserved
    assert not swapped.validated


def test_a_verdict_on_batches_says_nothing_of_latencies():
    verdict = summarise([judged(BASE, BASE)], noise_of([(BASE, BASE)]), emulated_link="")

    assert verdict.arrivals == ""
    assert "first token" not in verdict.summary
    assert verdict.validated


def runs(*speeds: tuple[float, float]):
    """One judged run per (predicted, measured) throughput."""
    return [judged(result(tokens_per_s=p), result(tokens_per_s=m)) for p, m in speeds]


def test_order_is_preserved_when_every_pair_agrees():
    assert order_is_preserved(runs((10, 11), (20, 19), (30, 40)), 0.0)


def test_order_is_lost_when_two_are_swapped():
    assert not order_is_preserved(runs((10, 20), (20, 10)), 0.0)


@pytest.mark.parametrize(("measured", "preserved"), [(101.9, True), (102.1, False)])
def test_runs_within_two_percent_are_ties(measured, preserved):
    assert order_is_preserved(runs((110, 100.0), (100, measured)), 0.0) is preserved


@pytest.mark.parametrize(("noise", "preserved"), [(0.04, False), (0.06, True)])
def test_runs_within_twice_the_noise_are_ties(noise, preserved):
    assert order_is_preserved(runs((110, 100.0), (100, 110.0)), noise) is preserved


@pytest.mark.parametrize("order", [1, -1])
def test_ties_do_not_depend_on_the_order_of_the_runs(order):
    pair = runs((110, 100.0), (100, 102.03))[::order]

    assert not order_is_preserved(pair, 0.0)


def test_predicted_tie_is_no_swap():
    assert order_is_preserved(runs((100, 100), (100, 150)), 0.0)


def test_one_run_alone_is_in_order():
    assert order_is_preserved(runs((1, 100)), 0.0)


def test_configurations_are_different_and_start_with_the_policy_and_the_baseline(bench):
    spec = bench.spec(9)

    found = configurations(spec, bench.workloads[1])

    assert found[0] == spec
    assert (found[1].cache.name, found[1].slots) == ("none", 9)
    assert len({one.behaviour_hash() for one in found}) == len(found)
    assert any(one.predictor.name == "gate_lookahead" for one in found)
    assert all("future" not in one.needs() for one in found)


def test_on_demand_policy_is_its_own_baseline(bench):
    found = configurations(bench.spec(9, "none"), bench.workloads[1])

    assert [one.cache.name for one in found].count("none") >= 1
    assert len({one.behaviour_hash() for one in found}) == len(found)

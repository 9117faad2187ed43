"""Choosing: the fastest of what was tried, judged on what it did not learn from, and said plainly."""

from dataclasses import replace
from typing import ClassVar

import pyarrow as pa
import pytest
from expertflow.simulator.choose import Goals, budgets_of, runs_of, tune
from expertflow.simulator.curves import layer_curves
from expertflow.simulator.explain import plainness
from expertflow.simulator.forecast import Forecaster, forecaster
from expertflow.simulator.policy.checked import tiny_lessons
from expertflow.simulator.policy.registry import allocations, caches, predictors
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.space import Budget
from expertflow.simulator.split import split_by_batch
from expertflow.simulator.workload import workload_of
from expertflow.tracer.arrays import routing_arrays
from expertflow.tracer.errors import TraceError, UsageError
from expertflow.tracer.quantities import LinkSpec
from expertflow.tracer.store import Trace
from expertflow.tracer.synthetic import synthetic_trace

SLOTS = 32  # of 64
HALF = Budget("0.5", SLOTS)


def steady(ready: Forecaster) -> Forecaster:
    """Without the policies' own time, which is measured anew on each run of the tests."""
    return replace(ready, decision_is_measured=True)


@pytest.fixture(scope="module")
def ready(trace) -> Forecaster:
    return steady(forecaster(trace))


@pytest.fixture(scope="module")
def choice(ready):
    return tune(ready, budgets=[HALF])


def test_the_fastest_is_chosen_or_the_plainest_that_is_as_fast(choice):
    chosen, *rest = choice.tuning.candidates
    speeds = [result.tokens_per_s for result in rest[:23]]
    fastest = max(chosen.tokens_per_s, *speeds)

    assert speeds == sorted(speeds, reverse=True)
    assert chosen.tokens_per_s > 0.99 * fastest
    for other in rest:
        if other.tokens_per_s > 0.99 * fastest:
            assert plainness(chosen) <= plainness(other)
    assert choice.tuning.chosen == choice.predicted.label == chosen.label
    assert choice.tuning.runner_up == rest[0].label
    assert choice.spec.label == choice.predicted.label


def test_all_members_the_trace_can_feed_are_tried(ready, choice):
    fed = [
        (cache, allocation, predictor)
        for cache in caches.names()
        for allocation in allocations.names()
        for predictor in predictors.names()
        if not {"future", "paths"} & (caches.get(cache).needs | predictors.get(predictor).needs)
        and not getattr(predictors.get(predictor), "is_baseline", False)
        # With look-ahead to one layer there is no depth to choose.
        and not hasattr(predictors.get(predictor), "depth_param")
        # Predictors that only infer are tried with plain slots.
        if predictor in ("none", "gate_lookahead") or allocation == "equal"
    ]

    assert choice.tuning.tried == len(fed)


def test_report_keeps_the_best_and_the_plain_ones(choice):
    plain = {
        r.policy["cache"]
        for r in choice.tuning.candidates
        if r.policy["predictor"] == "none" and r.policy["allocation"] == "equal"
    }

    assert 24 <= len(choice.tuning.candidates) <= 27
    assert plain >= {"none", "lru"}


def test_progress_ends_with_the_last_prediction(ready):
    counted: list[int] = []

    tune(ready, budgets=[HALF], advance=counted.append)

    assert sum(counted) <= runs_of(ready, [HALF])
    assert sum(counted) > choice_count(ready)


def choice_count(ready: Forecaster) -> int:
    return tune(ready, budgets=[HALF]).tuning.tried


def test_policies_are_judged_on_batches_they_did_not_learn_from(ready, choice):
    learn, judge = split_by_batch(ready.workload)
    judged = replace(ready, workload=judge)

    assert not set(learn.steps.number.tolist()) & set(judge.steps.number.tolist())
    assert len(learn.steps) + len(judge.steps) == len(ready.workload.steps)
    assert not set(learn.prompt_tokens) & set(judge.prompt_tokens)
    spec = make_spec(slots=SLOTS, cache="lru", popularity=learn.popularity())
    (told,) = [c for c in choice.tuning.candidates if c.label == spec.label]
    assert told.tokens_per_s == judged.predict(spec, with_bounds=False).tokens_per_s


def test_chosen_policy_is_given_what_the_whole_trace_teaches(ready, choice):
    learn, _ = split_by_batch(ready.workload)

    assert choice.spec.cache.name == "static"
    assert choice.spec.cache.params["popularity"] == ready.workload.popularity()
    assert choice.spec.cache.params["popularity"] != learn.popularity()


def test_a_single_batch_is_learned_from_and_judged_on(tmp_path):
    one = synthetic_trace(tmp_path / "t", sequences=2, batch_size=2, new_tokens=4)
    workload = workload_of(one)

    assert split_by_batch(workload) == (workload, workload)


def test_no_candidate_beats_its_bounds(ready, choice):
    learn, judge = split_by_batch(ready.workload)
    judged = replace(ready, workload=judge)
    belady = choice.tuning.bounds[0]

    assert belady.policy["cache"] == "belady"
    for candidate in choice.tuning.candidates:
        bounds = judged.bounds(
            make_spec(
                slots=SLOTS,
                allocation=candidate.policy["allocation"],
                popularity=learn.popularity(),
                curves=layer_curves(learn),
            ),
            candidate,
        )
        assert candidate.tokens_per_s <= bounds.link_tokens_per_s
        assert candidate.tokens_per_s <= bounds.all_resident_tokens_per_s
        assert 0 < bounds.share_of_best <= 1
        if candidate.policy["predictor"] == "none":
            assert candidate.hit_rate <= bounds.belady_hit_rate
            assert candidate.tokens_per_s <= bounds.belady_tokens_per_s
    assert max(b.tokens_per_s for b in choice.tuning.bounds) >= choice.predicted.tokens_per_s


def test_bounds_are_never_candidates(choice):
    members = {r.policy["cache"] for r in choice.tuning.candidates}
    predictors = {r.policy["predictor"] for r in choice.tuning.candidates}

    assert "belady" not in members
    assert "oracle" not in predictors
    assert {r.policy["predictor"] for r in choice.tuning.bounds} == {"none", "oracle"}


def test_curve_rises_to_everything_and_belady_is_on_top(choice):
    curve: dict[str, list[float]] = {}
    for point in choice.tuning.curve:
        curve.setdefault(point.cache, []).append(point.hit_rate)

    assert curve["static"][-1] == curve["belady"][-1] == 1.0
    for name in ("lru", "lfu", "static"):
        assert all(h <= b for h, b in zip(curve[name], curve["belady"], strict=True))
    assert {p.cache for p in choice.tuning.curve if p.is_bound} == {"belady"}


# --- words -------------------------------------------------------------------------------------


def test_declared_link_is_said_not_to_be_measured(ready, choice):
    text = " ".join(choice.tuning.explanation)

    assert ready.link_origin == "declared"
    assert "The link is declared (declared PCIe 4.0 x16), not a measured bus." in text


def test_emulated_link_is_said_not_to_be_measured_and_a_measured_one_is_not(ready):
    emulated = replace(ready, link_origin="emulated", link="8GB/s+10us")
    measured = replace(ready, link_origin="measured")

    told = [" ".join(tune(f, budgets=[HALF]).tuning.explanation) for f in (emulated, measured)]

    assert "The link is emulated (8GB/s+10us), not a measured bus." in told[0]
    assert "not a measured bus" not in told[1]


def test_link_given_by_hand_is_declared(trace):
    ready = forecaster(trace, link=LinkSpec.parse("2GB/s+10us"))

    assert (ready.link, ready.link_origin) == ("2GB/s+10us", "declared")
    assert ready.costs.copy_s == pytest.approx(10e-6 + (4 << 20) / 2e9)


def test_free_link_is_said_to_need_no_policy(ready):
    costs = replace(ready.costs, copy_s=0.0, busy_copy_s=0.0, wake_s=0.0)

    choice = tune(replace(ready, costs=costs), budgets=[HALF])

    text = " ".join(choice.tuning.explanation)
    assert "No policy beats loading every expert on demand" in text
    assert "No policy helps here: computation, not loading, sets the pace." in text
    assert "too close to call" in text
    # On a tie the simplest wins.
    assert choice.spec.label == f"none @ {SLOTS} slots"


def test_link_without_hope_is_said_to_need_link_or_memory(ready):
    # Slots for less than one event, and a predictor that is never right: every policy waits alike.
    hopeless = replace(
        ready,
        workload=replace(ready.workload, lookahead=0),
        costs=replace(ready.costs, copy_s=1.0, busy_copy_s=1.0),
    )

    choice = tune(hopeless, budgets=[Budget("1slot", 1)])

    text = " ".join(choice.tuning.explanation)
    assert "No policy helps here: buy link or memory." in text
    assert "sets the pace" not in text


def test_explanation_names_the_gain_the_bounds_and_the_ratio(choice):
    text = " ".join(choice.tuning.explanation)

    for words in (
        "loading every expert on demand",
        "Runner-up",
        "evictions that know the future",
        "r = ",
        "Peak device",
    ):
        assert words in text


def test_slots_below_one_event_are_said_to_be_too_few(ready):
    choice = tune(ready, budgets=[Budget("4slots", 4)])

    assert any("raise the budget" in line for line in choice.tuning.explanation)
    assert choice.predicted.slots_ratio > 1


def test_a_plainer_policy_that_is_as_good_is_named():
    def policy(cache: str, predictor: str = "none", allocation: str = "equal"):
        class Named:
            policy: ClassVar = {"cache": cache, "predictor": predictor, "allocation": allocation}

        return plainness(Named)  # type: ignore[arg-type]

    assert policy("lru") < policy("slru(protected=0.8)") < policy("lru", "gate_lookahead(depth=1)")
    assert policy("lru") < policy("lru", allocation="global") < policy("lru", allocation="adapmoe")


# --- goals --------------------------------------------------------------------------------------


def test_smallest_budget_that_meets_a_speed_is_chosen(ready):
    ladder = budgets_of(ready.shape.total_experts)
    speeds = [tune(ready, budgets=[budget]).predicted.tokens_per_s for budget in ladder[:4]]
    goals = Goals(min_tokens_per_s=(speeds[1] + speeds[2]) / 2)

    choice = tune(ready, budgets=ladder, goals=goals)

    assert speeds[1] < speeds[2]
    assert choice.spec.slots == ladder[2].slots
    assert choice.tuning.meets_goals
    assert "meets what was asked for: at least" in choice.tuning.explanation[0]


def test_goals_nobody_meets_are_said_so_with_what_was_reached(ready):
    choice = tune(ready, budgets=[HALF], goals=Goals(max_ttft_s=1e-9))

    assert not choice.tuning.meets_goals
    assert "Nothing that was tried meets" in choice.tuning.explanation[0]
    assert "first token (p95) within 1 ns" in choice.tuning.explanation[0]


def test_a_goal_can_choose_another_than_the_fastest(ready):
    results = tune(ready, budgets=[HALF]).tuning.candidates
    patient = min(results, key=lambda result: result.tpot.p95)

    choice = tune(ready, budgets=[HALF], goals=Goals(max_tpot_s=patient.tpot.p95))

    assert choice.predicted.tpot.p95 <= patient.tpot.p95


# --- trust --------------------------------------------------------------------------------------


def test_front_has_nothing_that_another_beats_in_speed_and_memory(choice):
    front = choice.tuning.pareto

    assert front
    for one in front:
        for other in front:
            assert one.tokens_per_s >= other.tokens_per_s or (
                one.peak_device_bytes < other.peak_device_bytes
            )


def test_sensitivity_says_what_a_machine_ten_percent_off_would_change(choice):
    changes = {change.change: change for change in choice.tuning.sensitivity}

    assert set(changes) == {
        f"{what} 10 % {how}" for what in ("link", "computation") for how in ("slower", "faster")
    }
    slower, faster = changes["link 10 % slower"], changes["link 10 % faster"]
    assert slower.chosen_tokens_per_s < choice.predicted.tokens_per_s < faster.chosen_tokens_per_s
    for change in changes.values():
        assert change.loss == pytest.approx(
            1 - change.chosen_tokens_per_s / change.best_tokens_per_s
        )
        assert change.loss >= 0


def test_margin_is_the_lead_over_the_runner_up(choice):
    best, second = choice.tuning.candidates[:2]

    assert choice.tuning.margin == pytest.approx(best.tokens_per_s / second.tokens_per_s - 1)


# --- forecasts ---------------------------------------------------------------------------------


def test_forecast_counts_every_demand_and_token(trace, ready):
    result = ready.predict(make_spec(slots=SLOTS))
    routing = trace.table("routing").to_pandas()
    distinct = routing.explode("experts").drop_duplicates(["step", "layer", "experts"])

    assert result.source == "predicted"
    assert result.prefill.demanded + result.decode.demanded == len(distinct)
    assert result.decode.tokens == 8 * 11
    assert result.hit_rate + result.late_rate + result.miss_rate == pytest.approx(1.0)
    assert result.memory.slots == SLOTS * trace.shape.expert_bytes


def test_forecasts_of_a_steady_machine_repeat_to_the_last_bit(ready):
    spec = make_spec(slots=SLOTS, predictor="gate_lookahead")

    assert ready.predict(spec) == ready.predict(spec)


@pytest.mark.parametrize("allocation", allocations.names())
def test_bounds_are_those_of_the_policys_own_pools(trace, ready, allocation):
    lessons = tiny_lessons(trace.shape)
    spec = make_spec(slots=SLOTS, allocation=allocation, misses="load", **lessons)

    result = ready.predict(spec)

    assert 0 < result.hit_rate <= result.bounds.belady_hit_rate
    assert 0 < result.tokens_per_s <= result.bounds.belady_tokens_per_s


def test_policys_own_time_is_measured_and_charged(trace):
    result = forecaster(trace).predict(make_spec(slots=SLOTS), with_bounds=False)

    assert result.time.decision_s > 0


def test_everything_resident_needs_no_loads_after_the_first(ready):
    result = ready.predict(make_spec(slots=64, cache="static", popularity=[[1] * 16] * 4))

    assert result.hit_rate == 1.0
    assert result.stall_s == 0.0
    # What is left is the read-back of the router's choice, which a resident model does without.
    resident_s = result.time.total_s - result.time.readback_s
    assert result.bounds.all_resident_tokens_per_s == pytest.approx(
        result.tokens_per_s * result.time.total_s / resident_s
    )


def test_predictor_without_its_signals_is_refused_with_the_next_step(tmp_path):
    plain = forecaster(synthetic_trace(tmp_path / "t", lookahead=0, new_tokens=2))
    spec = make_spec(slots=8, predictor="gate_lookahead", predictor_params={"depth": 2})

    with pytest.raises(UsageError, match=r"recorded 0\. Trace again with --lookahead 2"):
        plain.predict(spec)
    tried = tune(plain, budgets=[Budget("8slots", 8)]).tuning.candidates
    assert tried
    assert not any("gate_lookahead" in result.policy["predictor"] for result in tried)


class _TraceOf(Trace):
    """A trace some of whose rows were changed on the way in."""

    def __init__(self, trace: Trace, table: str, rows: pa.Table) -> None:
        super().__init__(trace.path, trace.manifest)
        self._changed = {table: rows}

    def table(self, name, columns=None, **asked):
        if name in self._changed:
            rows = self._changed[name]
            return rows.select(list(columns)) if columns is not None else rows
        return super().table(name, columns, **asked)

    def routing_arrays(self, **asked):
        if "routing" in self._changed:
            return routing_arrays(self._changed["routing"])
        return super().routing_arrays(**asked)


def test_tokens_without_a_prediction_predict_nothing(trace):
    rows = trace.table("routing")
    place = rows.schema.get_field_index("lookahead_1")
    mask = pa.array([number % 3 == 0 for number in range(len(rows))])
    kept = rows["lookahead_1"].to_pylist()
    holes = pa.array(
        [None if hole else ids for hole, ids in zip(mask.to_pylist(), kept, strict=True)],
        type=rows.schema.field(place).type,
    )
    changed = _TraceOf(trace, "routing", rows.set_column(place, rows.schema.field(place), holes))

    found = workload_of(changed)

    groups = [
        found.signals(number, 1).lookahead.get(1, ())
        for place in range(len(found.steps))
        for number in found.events_of(place)
    ]
    ids = [expert for event in groups for group in event for expert in group]
    whole = sum(len(event) for event in groups)
    assert whole == sum(ids is not None for ids in holes.to_pylist())
    assert max(ids) < trace.shape.num_experts


def test_trace_without_times_is_refused(trace):
    changed = _TraceOf(trace, "steps", trace.table("steps").slice(0, 0))

    with pytest.raises(TraceError, match="no times of whole passes"):
        workload_of(changed)

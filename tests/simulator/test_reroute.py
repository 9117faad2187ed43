"""Rerouted workloads: against a slow reading, in both engines, with arrivals, in tune and on the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
from expertflow.simulator.account import totals_of
from expertflow.simulator.arrivals import read_arrivals
from expertflow.simulator.choose import tune
from expertflow.simulator.engine import simulate
from expertflow.simulator.engines import run
from expertflow.simulator.forecast import forecaster
from expertflow.simulator.judge import judge_of
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.policy.spec import AS_ROUTED, Member, build_routing, make_spec
from expertflow.simulator.reroute import (
    ReroutedSource,
    rerouted,
    rerouted_source,
    routing_result,
    said_at,
)
from expertflow.simulator.serving import ServingSettings, serve
from expertflow.simulator.source import Recorded
from expertflow.simulator.space import DEFAULTS, Budget, Point
from expertflow.simulator.sweep_row import SCHEMA, failed_row, rows_of, table_of
from expertflow.simulator.workload import Rows, Steps, build_workload
from expertflow.tracer.errors import UsageError
from expertflow.tracer.main import main
from expertflow.tracer.store import NO_EXPERT
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import make_machine

VOTE = Member(name="des_vote", params={"beta": 0.25})
SEQ = Member(name="des_seq", params={"k": 1})
EXPERTS, LAYERS, TOP_K = 8, 2, 3


def workload_with(logits, *, known=EXPERTS, weights=True, router_order=None):
    """Passes of tokens with these logits [steps, layers, tokens, experts], weights normalised over the top 3."""
    steps, layers, tokens, experts = logits.shape
    flat = logits.reshape(-1, experts)
    order = np.argsort(-flat, axis=1, kind="stable")
    scores = np.take_along_axis(flat, order, 1)
    shares = np.exp(scores[:, :TOP_K])
    shares = (shares / shares.sum(1, keepdims=True)).astype(np.float16)
    chosen = order[:, :TOP_K].astype(np.uint16)
    if router_order is not None:  # a router need not list its choice by weight
        chosen, shares = chosen[:, router_order], shares[:, router_order]
    rows = Rows(
        experts=chosen,
        sequence=np.tile(np.arange(tokens), steps * layers),
        weights=shares if weights else None,
        score_ids=order[:, :known].astype(np.uint16) if known else None,
        scores=scores[:, :known].astype(np.float16) if known else None,
    )
    number = np.arange(steps)
    return build_workload(
        Steps(
            number=number,
            is_decode=number > 0,
            batch=np.full(steps, tokens),
            tokens=np.full(steps, tokens),
            context=4 + number,
            member_ptr=np.arange(steps + 1) * tokens,
            members=np.tile(np.arange(tokens), steps),
        ),
        np.repeat(number, layers * tokens),
        np.tile(np.repeat(np.arange(layers), tokens), steps),
        rows,
        prompt_tokens=dict.fromkeys(range(tokens), 1),
        batch_size=tokens,
        num_layers=layers,
        num_experts=experts,
        lookahead=0,
    )


def random_logits(seed=0, steps=4, tokens=5):
    dice = np.random.default_rng(seed)
    return dice.integers(-8, 8, (steps, LAYERS, tokens, EXPERTS)) / 4


def slow_events(logits, member):
    """Demanded experts of every event, straight from the formulas."""
    found = []
    for event in logits.reshape(-1, *logits.shape[2:]):
        tops = [sorted(range(EXPERTS), key=lambda e, row=row: (-row[e], e)) for row in event]
        if member.name == "des_seq":
            core = {e for order in tops for e in order[: member.params["k"]]}
        else:
            votes = np.zeros(EXPERTS)
            for row, order in zip(event, tops, strict=True):
                own = order[:TOP_K]
                shares = np.exp(row[own])
                votes[own] += (shares / shares.sum()).astype(np.float16)
            size = round(member.params["beta"] * EXPERTS)
            core = set(sorted(range(EXPERTS), key=lambda e: (-votes[e], e))[:size])
        chosen = [[e for e in order if e in core][:TOP_K] for order in tops]
        found.append((chosen, sorted({e for ids in chosen for e in ids})))
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([VOTE, SEQ, Member(name="des_vote", params={"beta": 0.6})]),
       st.sampled_from([None, [2, 0, 1]]))  # fmt: skip
def test_events_are_what_the_formulas_say(seed, member, router_order):
    logits = random_logits(seed)
    workload = workload_with(logits, router_order=router_order)

    made = rerouted(workload, member)

    for number, (chosen, distinct) in enumerate(slow_events(logits, member)):
        event = made.event(number)
        assert list(event.experts) == distinct
        counts = [sum(expert in ids for ids in chosen) for expert in distinct]
        assert list(event.facts.tokens) == counts
        rows = made.rows.experts[slice(*made.row_ptr[number : number + 2])]
        assert [sorted(set(ids.tolist()) - {NO_EXPERT}) for ids in rows] == [
            sorted(ids) for ids in chosen
        ]
    assert made.weights is not None
    assert workload.weights is not None
    for one in (made, workload):  # every token still weighs 1 in all
        assert one.weights is not None
        assert one.weights.sum() == pytest.approx(len(one.rows.experts), rel=1e-3)


def test_as_routed_is_the_workload_itself_and_others_are_made_once():
    workload = workload_with(random_logits())

    assert rerouted(workload, AS_ROUTED) is workload
    made = rerouted(workload, VOTE)
    assert rerouted(workload, VOTE) is made
    assert rerouted(made, VOTE) is made
    assert made.routing == VOTE
    with pytest.raises(ValueError, match="already"):
        rerouted(made, SEQ)


def test_without_scores_tokens_are_restricted_to_what_was_recorded_and_it_is_said():
    workload = workload_with(random_logits(), known=0)

    made = rerouted(workload, VOTE)

    before, after = workload.rows.experts, made.rows.experts
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        assert set(new) - {NO_EXPERT} <= set(old)
    assert (after == NO_EXPERT).any()
    found = routing_result(made)
    assert found is not None
    assert found.scores == "restricted to the recorded top-3"
    assert "Restricted to the recorded top-3" in found.finding
    assert 0 < found.short_share <= 1


def test_with_scores_of_all_experts_des_seq_leaves_no_token_short_of_what_is_shared():
    made = rerouted(workload_with(random_logits(tokens=9)), SEQ)

    for number in range(made.num_events):
        rows = made.rows.experts[slice(*made.row_ptr[number : number + 2])]
        size = min(TOP_K, len(made.event(number).experts))
        assert ((rows != NO_EXPERT).sum(axis=1) == size).all()


def test_nothing_to_go_by_is_refused():
    workload = workload_with(random_logits(), known=0, weights=False)

    with pytest.raises(UsageError, match="--scores 8"):
        rerouted(workload, VOTE)


def test_counts_of_what_changed_are_those_of_the_tokens():
    logits = random_logits()
    workload = workload_with(logits)

    found = routing_result(rerouted(workload, VOTE))

    assert found is not None
    slow = slow_events(logits, VOTE)
    own = [
        [sorted(range(EXPERTS), key=lambda e, row=row: (-row[e], e))[:TOP_K] for row in event]
        for event in logits.reshape(-1, *logits.shape[2:])
    ]
    lost = sum(
        len(set(a) - set(b))
        for (chosen, _), mine in zip(slow, own, strict=True)
        for a, b in zip(mine, chosen, strict=True)
    )
    assert found.changed_share == pytest.approx(lost / (TOP_K * len(workload.rows.experts)))
    assert found.distinct_after == pytest.approx(np.mean([len(d) for _, d in slow]))
    assert found.distinct_before == pytest.approx(np.diff(workload.ptr).mean())
    assert found.is_approximate
    assert "Approximate: routing changes later hidden states" in found.finding


def test_both_engines_replay_the_rerouted_workload():
    workload = workload_with(random_logits())
    shape = tiny_shape(LAYERS, EXPERTS, TOP_K)
    spec = make_spec(slots=6, routing="des_vote", routing_params=VOTE.params)
    costs = make_machine(copy=1.0, experts=1.0)

    totals, engine = run(workload, spec, shape, costs)

    by_hand = totals_of(simulate(rerouted(workload, VOTE), spec, shape, costs))
    assert engine in ("compiled", "reference")
    assert np.array_equal(totals.steps.misses, by_hand.steps.misses)
    assert np.array_equal(totals.steps.total_s, by_hand.steps.total_s)
    again, _ = run(Recorded(workload), spec, shape, costs)
    assert np.array_equal(again.steps.misses, by_hand.steps.misses)
    plain, _ = run(workload, replace(spec, routing=AS_ROUTED), shape, costs)
    assert plain.steps.distinct.sum() > totals.steps.distinct.sum()


def test_requests_that_arrive_share_experts_with_those_they_run_with():
    workload = workload_with(random_logits(tokens=4))
    spec = make_spec(slots=6, routing="des_vote", routing_params=VOTE.params)
    serving = serve(
        workload, spec, read_arrivals("poisson:50", limit=6), ServingSettings(max_batch=4)
    )
    source = rerouted_source(serving, VOTE)
    assert isinstance(source, ReroutedSource)
    assert rerouted_source(source, VOTE) is source
    live = build_routing(VOTE)

    now, passes = 0.0, 0
    while (found := source.next(now)) is not None:
        if isinstance(found, float):
            now += found
            continue
        one, place = found
        for number in one.events_of(place):
            assert len(one.event(number).experts) <= round(0.25 * EXPERTS)
        source.ended(now := now + 1.0)
        passes += 1

    result = routing_result(source)
    assert passes > 3
    assert result is not None
    assert result.distinct_after <= 2 < result.distinct_before
    assert live.route(said_at(workload, 0)[0]) is not None


# --- forecasts, tune, sweeps, commands -----------------------------------------------------------


def test_a_prediction_says_what_the_routing_did_and_its_bounds_are_of_the_same_demands(trace):
    ready = forecaster(trace)
    spec = make_spec(slots=6, routing="des_vote", routing_params={"beta": 0.3})

    plain, lossy = ready.predict(replace(spec, routing=AS_ROUTED)), ready.predict(spec)

    assert plain.routing is None
    assert lossy.routing is not None
    events = sum(phase.demanded for phase in (lossy.prefill, lossy.decode))
    assert events == pytest.approx(lossy.routing.distinct_after * ready.workload.num_events)
    assert lossy.prefill.demanded < plain.prefill.demanded
    assert lossy.bounds.belady_hit_rate >= lossy.hit_rate
    assert lossy.policy["routing"] == "des_vote(beta=0.3)"
    assert [e.kind for e in ready.record(spec).log].count("event") == events


def test_what_a_policy_learns_is_learned_under_its_routing(trace):
    ready = forecaster(trace)
    judge = judge_of(ready)
    members = {kind: Member(name=name) for kind, name in DEFAULTS.items()}
    point = Point(
        budget="6slots",
        slots=6,
        link=None,
        members={**members, "cache": Member(name="static"), "routing": VOTE},
    )

    spec = judge.spec(point)

    assert judge.learn is not None
    popularity = rerouted(judge.learn, VOTE).popularity()
    assert popularity != judge.popularity
    assert spec.cache.params["popularity"] == popularity
    assert spec.routing == VOTE


def test_tune_chooses_no_lossy_routing_unless_one_is_named(trace):
    ready = replace(forecaster(trace), decision_is_measured=True)
    budget = [Budget("0.25", max(1, trace.shape.total_experts // 4))]

    plain = tune(ready, budgets=budget)
    named = tune(ready, budgets=budget, routing=VOTE)

    assert {c.policy["routing"] for c in plain.tuning.candidates} == {"as_routed"}
    assert plain.spec.is_lossless
    assert {c.policy["routing"] for c in named.tuning.candidates} == {str(VOTE)}
    assert {c.policy["routing"] for c in named.tuning.bounds} == {str(VOTE)}
    assert named.spec.routing == VOTE
    assert named.predicted.routing is not None
    assert any("LOSSY" in line for line in named.tuning.explanation)
    assert not any("LOSSY" in line for line in plain.tuning.explanation)


def test_points_and_rows_older_than_routings_stay_what_they_were():
    old = {kind: Member(name=name) for kind, name in DEFAULTS.items() if kind != "routing"}
    point = Point(budget="1slots", slots=1, link=None, members=old)
    new = replace(point, members={**old, "routing": AS_ROUTED})

    assert point.key == new.key
    assert point.needs == new.needs == frozenset()
    table = table_of([failed_row(new, "no", link="l", link_origin="measured", seconds=0.0)])
    before = table.drop_columns(["routing"])
    assert SCHEMA.names[-1] == "routing"
    assert rows_of(before) == rows_of(table)


def shown(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    return stopped.value.code, capsys.readouterr()


def test_simulate_prints_that_it_is_lossy_and_approximate(trace, capsys):
    args = ("simulate", trace.path, "--routing", "des_vote", "--routing-param", "beta=0.3")

    code, said = shown(capsys, *args)
    assert code == 0
    assert "LOSSY" in said.out
    assert "confirm on the model" in said.out
    assert "before" in said.out

    code, said = shown(capsys, *args, "--json")
    document = json.loads(said.out)
    assert code == 0
    assert document["routing"]["is_approximate"] is True
    assert document["routing"]["routing"] == "des_vote(beta=0.3)"


def test_wrong_routings_are_refused(trace, capsys):
    code, said = shown(capsys, "simulate", trace.path, "--routing", "des_vot")
    assert code == 2
    assert "Did you mean 'des_vote'" in said.err
    code, said = shown(capsys, "simulate", trace.path, "--routing", "des_seq", "--routing-param", "k=0")  # fmt: skip
    assert code == 2
    assert "k >= 1" in said.err


def test_a_sweep_tries_the_routings_of_its_space(trace, tmp_path, capsys):
    space = tmp_path / "space.toml"
    space.write_text(
        '[space]\nbudgets = [0.25]\ncaches = ["lru"]\nallocations = ["equal"]\npredictors = ["none"]\n'
        'misses = ["load"]\nroutings = ["as_routed", {name = "des_vote", beta = [0.3, 0.6]}]\nbounds = false\n'
    )
    code, said = shown(
        capsys, "sweep", trace.path, "--space", space, "--out", tmp_path / "s", "--json"
    )
    assert code == 0, said.err
    code, said = shown(capsys, "list", "--json")
    kinds = json.loads(said.out)["families"]["routing"]
    assert {m["name"]: m["is_lossless"] for m in kinds} == {
        "as_routed": True,
        "des_seq": False,
        "des_vote": False,
    }

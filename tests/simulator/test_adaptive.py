"""Adaptive look-ahead: its step size by hand, what it is told, its forest, and what is computed first."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from expertflow.simulator import engines, feasible
from expertflow.simulator.compiled.replay import has_twin
from expertflow.simulator.engine import simulate
from expertflow.simulator.feasible import builtin_space, lacking
from expertflow.simulator.judge import judge_of
from expertflow.simulator.layer_times import layer_times
from expertflow.simulator.lessons import lessons_of
from expertflow.simulator.policy.base import Outcome, Signals
from expertflow.simulator.policy.checked import (
    CheckedDriver,
    ScriptedEvent,
    random_script,
    require_replay,
    tiny_lessons,
    tiny_shape,
)
from expertflow.simulator.policy.clues import FEATURES, MOST_TOKENS, Clues
from expertflow.simulator.policy.forest import Forest
from expertflow.simulator.policy.predictors.gate_lookahead import GateLookahead
from expertflow.simulator.policy.registry import caches, predictors
from expertflow.simulator.policy.spec import (
    Member,
    PolicyFile,
    make_spec,
    read_policy,
    write_policy,
)
from expertflow.simulator.policy.stride import Stride, enough
from expertflow.simulator.space import Budget, rival_points
from expertflow.simulator.split import split_by_batch
from expertflow.simulator.workload import workload_of
from expertflow.tracer.errors import ResourceError, UsageError
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.types import ExpertKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import make_machine, make_steps

TIMES = {"copy_s": 1.0, "layer_s": 2.0, "token_s": 0.5}
DEMO = Path(__file__).parents[2] / "traces" / "demo"


def keys(*pairs):
    return tuple(ExpertKey(*pair) for pair in pairs)


def outcome(hits=(), lates=(), misses=(), fetched=()):
    return Outcome(keys(*hits), keys(*lates), keys(*misses), keys(*fetched))


def stride(most=9, raise_at=1000, lower_at=1000, **times):
    return Stride({**TIMES, **times}, most, raise_at, lower_at)


# --- the step size -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "tokens", "layers"),
    [
        (1, 0, 1),  # 1 · 1 / 2
        (4, 0, 2),  # 4 / 2
        (5, 0, 3),  # 5 / 2, rounded up
        (8, 4, 2),  # 8 / (2 + 4 · 0.5)
        (80, 0, 9),  # no more than `most`
        (0, 0, 1),  # no less than one
    ],
)
def test_step_size_is_copy_time_over_layer_time(expected, tokens, layers):
    assert stride().layers(0, expected, tokens) == layers


def test_experts_that_were_there_anyway_need_no_time():
    found = stride()
    for _ in range(200):
        found.hear(3, outcome(hits=[(3, 0), (3, 1), (3, 2)], misses=[(3, 5)]))

    assert found.layers(2, 8, 0) == 2  # a quarter of eight has to be moved: 2 / 2, and a rest
    assert found.layers(3, 8, 0) == 4  # nothing is known of layer 4


def test_what_was_fetched_in_time_had_to_be_moved_too():
    found = stride()
    for _ in range(200):
        found.hear(3, outcome(hits=[(3, 0), (3, 1)], fetched=[(3, 0), (3, 1)]))

    assert found.layers(2, 8, 0) == 4


def test_stalls_lengthen_the_step_and_fetches_in_vain_shorten_it():
    found = stride(raise_at=3, lower_at=2)
    found.hear(1, outcome(lates=[(1, 0)], misses=[(1, 1)]))
    assert found.bias == 0
    found.hear(1, outcome(misses=[(1, 2)]))
    assert found.bias == 1
    assert found.layers(0, 4, 0) == 3

    found.hear(0, outcome(fetched=[(1, 4), (1, 5), (1, 6)]))
    assert found.bias == 1
    found.hear(1, outcome(hits=[(1, 4)]))

    assert found.bias == 0


def test_both_counts_start_again_after_a_change():
    found = stride(raise_at=2, lower_at=2)
    found.hear(1, outcome(hits=[(1, 0)], fetched=[(1, 7)]))  # one in vain
    found.hear(1, outcome(misses=[(1, 2), (1, 3)]))
    assert found.bias == 1
    found.hear(1, outcome(hits=[(1, 0)], fetched=[(1, 7)]))

    assert found.bias == 1


def test_the_bias_does_not_run_away():
    found = stride(most=3, raise_at=1, lower_at=1)
    for _ in range(50):
        found.hear(1, outcome(misses=[(1, 2)]))
    assert found.bias == 2
    for _ in range(50):
        found.hear(1, outcome(hits=[(1, 0)], fetched=[(1, 3), (1, 4)]))

    assert found.bias == -2
    assert found.layers(0, 4, 0) == 1


def test_a_late_fetch_is_no_fetch_in_vain():
    found = stride(raise_at=1000, lower_at=1)
    found.hear(1, outcome(lates=[(1, 2)], fetched=[(1, 2)]))

    assert found.bias == 0


@pytest.mark.parametrize("wrong", [{"most": 0}, {"raise_at": 0}, {"lower_at": 0}, {"covered": 0.0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match="adaptive takes"):
        predictors.build("adaptive", {"layer_times": TIMES, **wrong})


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 9), st.integers(1, 9), max_size=8),
    st.floats(0.01, 1.0),
)
def test_no_fewer_experts_hold_the_share_that_is_asked_for(scores, covered):
    found = enough(scores, covered)
    held = [scores[expert] for expert in found]

    assert sum(held) >= covered * sum(scores.values())
    assert held == sorted(held, reverse=True)
    if found:
        assert sum(held[:-1]) < covered * sum(scores.values())


# --- what it says ------------------------------------------------------------------------------


def test_it_looks_as_far_as_the_copies_take():
    near = predictors.build("adaptive", {"layer_times": TIMES, "covered": 1.0})
    far = predictors.build("adaptive", {"layer_times": {**TIMES, "copy_s": 3.0}, "covered": 1.0})
    signals = Signals({1: [[4, 2]], 2: [[5, 6]], 3: [[7, 0]]})

    # 2 · 1 / 2.5 = 0.8 layers; 2 · 3 / 2.5 = 2.4 layers.
    assert near.predict(0, signals) == list(keys((1, 2), (1, 4)))
    assert far.predict(0, signals) == list(keys((1, 2), (1, 4), (2, 5), (2, 6), (3, 0), (3, 7)))
    assert far.stride.chosen == Counter({3: 1})


def test_rare_votes_are_left_out():
    predictor = predictors.build("adaptive", {"layer_times": TIMES, "covered": 0.75, "most": 1})

    assert predictor.predict(0, Signals({1: [[1, 3], [1, 3], [1, 3], [1, 5]]})) == list(
        keys((1, 1), (1, 3))
    )


def test_past_the_last_layer_it_says_nothing():
    assert list(predictors.build("adaptive", {"layer_times": TIMES}).predict(3, Signals({}))) == []


# --- being told --------------------------------------------------------------------------------


class Ear(GateLookahead):
    """Notes what it is told and asked, in order."""

    name = "ear"
    notes = ()

    def __init__(self):
        super().__init__()
        Ear.notes = []

    def hear(self, layer, outcome):
        Ear.notes.append((layer, outcome))

    def predict(self, layer, signals):
        Ear.notes.append((layer, None))
        return super().predict(layer, signals)


@pytest.fixture
def ear():
    predictors.register("ear", Ear)
    yield
    predictors.unregister("ear")


def test_a_listener_is_told_of_every_event_before_it_is_asked(ear):
    shape = tiny_shape()
    script = [
        ScriptedEvent(
            event.step, event.layer, event.experts, None, event.ends, Signals({1: [[1, 2]]})
        )
        for event in random_script(shape, 4)
    ]
    spec = make_spec(slots=6, predictor="ear")

    answers = CheckedDriver(spec.build(shape)).run(script)

    assert len(Ear.notes) == 2 * len(script)
    fetched = 0
    for event, answer, told, asked in zip(
        script, answers, Ear.notes[::2], Ear.notes[1::2], strict=True
    ):
        layer, outcome = told
        assert layer == event.layer
        assert asked == (event.layer, None)
        counts = (len(outcome.hits), len(outcome.lates), len(outcome.misses))
        assert counts == (answer.hits, answer.lates, answer.misses)
        assert sorted((*outcome.hits, *outcome.lates, *outcome.misses)) == list(event.keys)
        fetched += len(outcome.fetched)
    assert fetched > 5
    require_replay(spec, shape, script)


def test_what_listens_cannot_be_taped_and_runs_on_the_reference_engine(ear):
    pytest.importorskip("numba")
    taught = tiny_lessons(tiny_shape())
    for name in ("ear", "adaptive", "adaptive_forest"):
        spec = make_spec(slots=4, predictor=name, **taught)

        assert not has_twin(spec)
        assert engines.engine_for(spec) == "reference"
        assert engines.engine_for(replace(spec, predictor=Member(name="none"))) == "compiled"


# --- how deep a member looks -------------------------------------------------------------------


class Deep(GateLookahead):
    """Two layers ahead unless told otherwise."""

    name = "deep"

    def __init__(self, depth: int = 2):
        super().__init__(depth)


def test_depth_is_the_members_own_default_unless_given():
    taught = tiny_lessons(tiny_shape())
    predictors.register("deep", Deep)
    try:
        assert make_spec(slots=1, predictor="deep").lookahead_depth == 2
        given = make_spec(slots=1, predictor="deep", predictor_params={"depth": 1})
        assert given.lookahead_depth == 1
    finally:
        predictors.unregister("deep")
    assert make_spec(slots=1, predictor="gate_lookahead").lookahead_depth == 1
    assert make_spec(slots=1, predictor="adaptive", **taught).lookahead_depth == 3
    assert make_spec(slots=1, predictor="previous_token").lookahead_depth == 0


def test_policies_written_before_keep_their_hash():
    assert read_policy(DEMO / "policy.json").behaviour_hash == "b0d8f4555a379ee2"


# --- times that are measured -------------------------------------------------------------------


def test_layer_times_are_those_of_the_mean_pass():
    workload = make_steps([[(0, 1), (2,)], [(3,), (4,)]])
    machine = make_machine(
        copy=2.0, busy=3.0, mixer=0.5, experts=0.25, readback=0.125, decision=1.0
    )

    assert layer_times(machine, workload) == {"copy_s": 3.0, "layer_s": 1.875, "token_s": 0.0}


def test_a_machine_on_which_nothing_takes_time_has_none():
    workload = make_steps([[(0, 1), (2,)], [(3,), (4,)]])

    assert layer_times(make_machine(copy=1.0), workload) is None
    assert layer_times(make_machine(experts=1.0), workload) is None
    assert "times of a copy" in lacking({"layer_times"}, workload, make_machine())


def test_they_go_into_the_policy_and_change_its_hash():
    slow, fast = (
        make_spec(slots=2, predictor="adaptive", layer_times={**TIMES, "copy_s": seconds})
        for seconds in (1.0, 2.0)
    )

    assert slow.predictor.params["layer_times"]["copy_s"] == 1.0
    assert slow.behaviour_hash() != fast.behaviour_hash()
    with pytest.raises(UsageError, match="needs the times of a copy and of a layer"):
        make_spec(slots=2, predictor="adaptive")


# --- the forest --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep_trace(tmp_path_factory):
    """Three layers of look-ahead, gates that err, tokens that stick."""
    return synthetic_trace(
        tmp_path_factory.mktemp("deep") / "t", sequences=12, new_tokens=40, lookahead=3, hit=0.6
    )


@pytest.fixture(scope="module")
def learned(deep_trace):
    pytest.importorskip("sklearn")
    return lessons_of(workload_of(deep_trace), {"transitions", "forest"})


def test_the_forest_without_scikit_learn_says_what_scikit_learn_says(deep_trace):
    pytest.importorskip("sklearn")
    from expertflow.simulator.forest import document_of, fit, training_rows

    features, wanted = training_rows(workload_of(deep_trace))
    fitted = fit(features, wanted, seed=3)
    forest = Forest(json.loads(json.dumps(document_of(fitted))), FEATURES)
    rows = features[:: max(1, len(features) // 500)]

    ours = [forest(tuple(row)) for row in rows.tolist()]

    assert len(features) > 1000
    assert np.ptp(ours) > 0.1
    assert ours == pytest.approx(fitted.predict(rows).tolist(), rel=1e-12, abs=1e-12)


def test_training_twice_gives_the_same_forest(deep_trace, learned):
    again = lessons_of(workload_of(deep_trace), {"forest"})

    assert again["forest"] == learned["forest"]


def test_features_are_worked_out_by_hand():
    clues = Clues([[4, 2, 0, 0], [0, 8, 8, 4]], ["0 900 2 100|3 1000||", "|||"])
    clues.enter(0, Signals({1: [[2, 1]]}, [[0, 1]], [5]))
    clues.enter(1, Signals({}, [[3, 1]], [5]))
    clues.enter(0, Signals({1: [[2, 0]]}, [[0, 1]], [5]))

    found = clues.of(1)

    named = {expert: dict(zip(FEATURES, row, strict=True)) for expert, row in found.items()}
    assert sorted(named) == [0, 1, 2, 3]
    assert [named[e]["votes"] for e in range(4)] == [1000, 0, 1000, 0]
    assert [named[e]["rank"] for e in range(4)] == [500, 0, 1000, 0]
    assert [named[e]["previous"] for e in range(4)] == [0, 1000, 0, 1000]
    assert [named[e]["popularity"] for e in range(4)] == [0, 960, 960, 448]
    # From 0: nine tenths to 0, one to 2; from 1: all to 3. The two likeliest are kept, of a sum for k = 2.
    assert [named[e]["follows"] for e in range(4)] == [896, 0, 0, 960]
    assert all(row["ahead"] == row["layer"] == row["tokens"] == 1 for row in named.values())


def test_large_events_follow_the_votes_alone():
    taught = tiny_lessons(tiny_shape())
    params = {"layer_times": TIMES, "popularity": taught["popularity"], "covered": 0.9, "most": 1}
    tables = {need: taught["lessons"][need] for need in ("forest", "transitions")}
    corrected = predictors.build("adaptive_forest", {**params, **tables})
    plain = predictors.build("adaptive", {"layer_times": TIMES, "most": 1})
    many = [[n % 3, 5] for n in range(MOST_TOKENS + 1)]
    signals = Signals({1: many}, many, list(range(len(many))))

    assert corrected.predict(0, signals) == plain.predict(0, signals)


def test_it_names_experts_that_no_gate_named_and_drops_some_that_one_did(deep_trace, learned):
    workload = workload_of(deep_trace)
    shape = deep_trace.shape
    spec = make_spec(
        slots=24,
        predictor="adaptive_forest",
        popularity=workload.popularity(),
        layer_times=TIMES,
        lessons=learned,
        predictor_params={"covered": 0.9},
    )
    predictor = predictors.build("adaptive_forest", dict(spec.predictor.params))
    beyond = less = 0
    for number in np.flatnonzero(workload.event_is_decode()).tolist():
        signals = workload.signals(number, 3, routed=True)
        said = set(predictor.predict(int(workload.layer[number]), signals))
        gates = {
            ExpertKey(int(workload.layer[number]) + 1, expert)
            for group in signals.lookahead.get(1, ())
            for expert in group
        }
        nearest = {key for key in said if key.layer == workload.layer[number] + 1}
        beyond += len(nearest - gates)
        less += len(gates - nearest)

    assert shape.num_moe_layers == 4
    assert beyond > 0
    assert less > 0


def test_correction_finds_more_than_early_gates_on_prompts_it_did_not_see(deep_trace):
    pytest.importorskip("sklearn")
    from expertflow.simulator.forest import accuracy, learn_forest

    learn, judged = split_by_batch(workload_of(deep_trace))
    rows = accuracy(judged, learn, learn_forest(learn))

    assert [(row.ahead, row.named) for row in rows] == [(d, n) for d in (1, 2, 3) for n in (1, 2)]
    for row in rows:
        assert 0 < row.gate_recall <= 1
        assert 0 < row.forest_precision <= 1
    deepest = rows[-1]
    assert deepest.forest_recall > deepest.gate_recall


def test_the_policy_holds_its_forest_and_stays_small(deep_trace, learned, tmp_path):
    spec = make_spec(
        slots=24,
        predictor="adaptive_forest",
        popularity=workload_of(deep_trace).popularity(),
        layer_times=TIMES,
        lessons=learned,
    )
    path = tmp_path / "policy.json"
    write_policy(
        path,
        PolicyFile(
            behaviour=spec,
            behaviour_hash=spec.behaviour_hash(),
            shape=deep_trace.shape,
            budget="24slots",
            trace="none",
        ),
    )

    assert read_policy(path).behaviour == spec
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "expertflow.forest/9"}, "expected 'expertflow.forest/1'"),
        ({"features": ["votes"]}, r"over the features \['votes'\]"),
        ({"trees": []}, "1 to 20,000 nodes"),
    ],
)
def test_a_foreign_forest_is_refused(change, words):
    document = tiny_lessons(tiny_shape())["lessons"]["forest"] | change

    with pytest.raises(UsageError, match=words):
        Forest(document, FEATURES)


def test_without_scikit_learn_training_says_what_to_install(deep_trace, monkeypatch):
    from expertflow.simulator import forest

    monkeypatch.setattr(forest, "has_trainer", lambda: False)
    monkeypatch.setattr(feasible, "has_trainer", lambda: False)

    with pytest.raises(ResourceError, match=r"pip install 'expertflow-trace\[learn\]'"):
        lessons_of(workload_of(deep_trace), {"forest"})
    assert "scikit-learn" in lacking({"forest"}, workload_of(deep_trace), make_machine())


def test_without_look_ahead_there_is_nothing_to_learn(trace):
    blind = replace(workload_of(trace), lookahead=0)

    with pytest.raises(UsageError, match="trace again with --lookahead 3"):
        lessons_of(blind, {"forest"})


# --- what sweeps try ---------------------------------------------------------------------------


def test_depth_is_left_to_them_where_a_trace_recorded_several(deep_trace, trace):
    machine = make_machine(copy=1.0, experts=1.0)
    deep = builtin_space(workload_of(deep_trace), machine, [Budget("half", 32)])
    shallow = builtin_space(workload_of(trace), machine, [Budget("half", 32)])

    assert {o.name: o.params for o in deep.rivals}["adaptive"] == {"most": (3,)}
    assert "adaptive" not in {o.name for o in (*shallow.rivals, *shallow.members["predictor"])}


def with_waves(machine):
    """What one more wave costs in a decode pass is known."""
    experts = replace(machine.decode.experts, weights=(1.0, 0.0, 0.0, 0.0, 0.0, 0.5))
    return replace(machine, decode=replace(machine.decode, experts=experts))


def test_computing_residents_first_is_tried_where_a_second_wave_has_a_price(deep_trace):
    machine = make_machine(copy=1.0, experts=1.0)
    unknown = builtin_space(workload_of(deep_trace), machine, [Budget("half", 32)])
    space = builtin_space(workload_of(deep_trace), with_waves(machine), [Budget("half", 32)])

    assert unknown.answers == ()

    pairs = {
        (point.members["cache"].name, point.members["predictor"].name)
        for point in rival_points(space)
        if point.members["misses"].name == "resident_first"
    }

    assert "resident_first" not in {o.name for o in space.members["misses"]}
    assert {("lru", "none"), ("two_level_lru", "gate_lookahead")} <= pairs


def test_where_it_has_none_a_prediction_says_so(deep_trace):
    from expertflow.simulator.forecast import forecaster

    ready = forecaster(deep_trace)
    known = replace(ready, costs=with_waves(ready.costs))
    spec = make_spec(slots=24, cache="lru", misses="resident_first")

    told, silent = (one._context(spec).warnings for one in (ready, known))

    assert "second costs in decode passes was not measured" in told[-1]
    assert silent == ready.warnings
    assert ready._context(make_spec(slots=24)).warnings == ready.warnings


def test_a_sweep_runs_them(deep_trace):
    from expertflow.simulator.forecast import forecaster

    ready = forecaster(deep_trace)
    pytest.importorskip("sklearn")
    judge = judge_of(ready, lessons=["transitions", "forest"])
    space = builtin_space(judge.forecaster.workload, ready.costs, [Budget("half", 32)])
    points = [
        point
        for point in rival_points(space)
        if point.members["predictor"].name.startswith("adaptive")
        and point.members["cache"].name == "two_level_lru"
    ]

    rows = [judge.predict(point) for point in points]

    assert len(rows) == 2
    assert [row.error for row in rows] == ["", ""]
    assert {row.engine for row in rows} == {"reference"}


# --- two levels and predictions ----------------------------------------------------------------


def lived(cache, *events):
    for kind, *told in events:
        if kind == "event":
            cache.begin(keys(*told), None)
            for key in keys(*told):
                cache.admit(key) if key not in cache._residents else cache.touch(key)
            cache.released(keys(*told))
        elif kind == "fetch":
            cache.admit(keys(*told)[0])
        else:
            cache.expect(keys(*told))
    return cache


def test_what_is_predicted_stays_though_it_was_not_demanded():
    events = [("event", (0, 1)), ("fetch", (1, 2)), ("event", (0, 3))]
    plain = lived(caches.build("two_level_lru", {}), *events)
    told = lived(caches.build("two_level_lru", {}), *events, ("expect", (1, 2)))

    assert plain.victim(()) == ExpertKey(1, 2)
    assert told.victim(()) == ExpertKey(0, 1)


def test_newer_words_on_a_layer_replace_older_ones():
    events = [("event", (0, 1)), ("fetch", (1, 2)), ("expect", (1, 2), (2, 0)), ("expect", (1, 5))]

    assert lived(caches.build("two_level_lru", {}), *events).victim(()) == ExpertKey(1, 2)


def test_when_its_layer_has_been_routed_nothing_is_predicted_of_it():
    events = [("event", (0, 1)), ("fetch", (1, 2)), ("expect", (1, 2)), ("event", (1, 7))]

    assert lived(caches.build("two_level_lru", {}), *events).victim(()) == ExpertKey(1, 2)


# --- residents first ---------------------------------------------------------------------------


def split(slots, *events):
    core = make_spec(slots=slots, misses="resident_first", allocation="global").build(tiny_shape())
    driver = CheckedDriver(core)
    return [driver.event(ScriptedEvent(n, 0, experts)) for n, experts in enumerate(events)]


def test_residents_run_while_the_rest_is_loaded():
    answers = split(6, (0, 1, 2), (1, 2, 5, 7))

    first, second = answers[1].waves
    assert len(answers[0].waves) == 1
    assert (first.experts, second.experts) == ((1, 2), (5, 7))
    assert [load.key.expert for load in first.loads] == [5, 7]
    assert (first.waits, second.waits) == (False, True)
    assert second.loads == ()


def test_with_all_or_nothing_there_it_is_one_wave():
    answers = split(6, (0, 1, 2), (0, 1), (5, 6))

    assert [len(answer.waves) for answer in answers] == [1, 1, 1]


def test_events_beyond_the_slots_split_only_their_first_round():
    answers = split(3, (0, 1), (0, 2, 3, 4, 5))

    assert [wave.experts for wave in answers[1].waves] == [(0,), (2, 3), (4, 5)]
    assert [len(wave.loads) for wave in answers[1].waves] == [2, 0, 2]
    assert [wave.waits for wave in answers[1].waves] == [False, True, True]


def test_copies_hide_behind_the_residents_computation():
    workload = make_steps([[(0, 1)], [(0, 1, 2, 3)]], experts=8)
    machine = make_machine(copy=1.0, experts=4.0)
    shape = tiny_shape(1, 8)
    seconds = {
        answer: simulate(workload, make_spec(slots=6, misses=answer), shape, machine).steps
        for answer in ("load", "resident_first")
    }

    # Two copies of 1 s and 4 s of computation, half of which is of what is there.
    assert seconds["load"]["stall_s"][2] == 2.0
    assert seconds["load"]["total_s"][2] == 6.0
    assert seconds["resident_first"]["stall_s"][2] == 0.0
    assert seconds["resident_first"]["total_s"][2] == 4.0
    assert seconds["resident_first"]["waves"][2] == 2


def test_the_second_walk_of_the_kernel_is_charged():
    workload = make_steps([[(0, 1)], [(0, 1, 2, 3)]], experts=8)
    machine = replace(make_machine(copy=1.0, experts=4.0), group_s=0.25)
    spec = make_spec(slots=6, misses="resident_first")

    record = simulate(workload, spec, tiny_shape(1, 8), machine)

    walks = 0.25 * (2 * 6 - 1)
    assert record.steps["experts_s"][2] == pytest.approx(4.0 + walks)


def test_a_pass_that_computes_residents_first_counts_as_one_in_waves():
    workload = make_steps([[(0, 1)], [(0, 1, 2)]], experts=8)
    machine = replace(make_machine(copy=1.0, experts=4.0), gathered_bytes_per_token=1000)
    shape = tiny_shape(1, 8)
    plain, first = (
        simulate(workload, make_spec(slots=6, misses=answer), shape, machine).memory
        for answer in ("load", "resident_first")
    )

    assert plain.activations == 0
    assert first.activations == 1000 * workload.step(1).tokens

"""What each predictor says, worked out by hand; what they learn; and the invented one's promises."""

import json
from dataclasses import replace

import numpy as np
import pytest
from expertflow.simulator.compiled import tapes
from expertflow.simulator.compiled.tapes import asked, tape_of
from expertflow.simulator.costs import Linear
from expertflow.simulator.engine import simulate
from expertflow.simulator.engines import run as run_engine
from expertflow.simulator.feasible import builtin_space, lacking
from expertflow.simulator.forecast import forecaster
from expertflow.simulator.judge import judge_of
from expertflow.simulator.layer_times import layer_times
from expertflow.simulator.lessons import lessons_of
from expertflow.simulator.policy.ahead import BySequence, Walk
from expertflow.simulator.policy.base import LESSONS, Signals
from expertflow.simulator.policy.chance import chance
from expertflow.simulator.policy.checked import (
    CheckedDriver,
    ScriptedEvent,
    tiny_lessons,
    tiny_shape,
)
from expertflow.simulator.policy.future import Future
from expertflow.simulator.policy.registry import predictors
from expertflow.simulator.policy.spec import (
    Member,
    PolicyFile,
    make_spec,
    read_policy,
    write_policy,
)
from expertflow.simulator.policy.tables import packed, unpacked, unpacked_pairs
from expertflow.simulator.space import DEFAULTS, Budget, Point, bound_points, rival_points
from expertflow.simulator.split import split_by_batch
from expertflow.simulator.workload import workload_of
from expertflow.tracer.errors import UsageError
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.types import ExpertKey

from tests.builders import make_machine, make_steps

LEARNING = [
    name for name in predictors.names() if not predictors.get(name).needs & {"future", "paths"}
]


TABLES = [need for need in LESSONS if need != "forest"]
"""What any trace teaches; the forest wants look-ahead, and has tests of its own (test_adaptive.py)."""


def keys(*pairs: tuple[int, int]) -> list[ExpertKey]:
    return [ExpertKey(*pair) for pair in pairs]


def said(predictor, layer, rows, sequences=None, tokens=None):
    """Its answer to one event, as (layer, expert) pairs. `rows` are the experts of each token."""
    numbers = range(len(rows)) if sequences is None else sequences
    ids = tokens if tokens is not None else [-1] * len(rows)
    found = predictor.predict(layer, Signals({}, rows, list(numbers), ids))
    return [tuple(key) for key in found]


def build(name, **params):
    return predictors.build(name, params)


# --- walking and remembering -------------------------------------------------------------------


def test_a_walk_learns_how_many_layers_there_are():
    walk = Walk()

    assert walk.enter(0)
    assert not walk.enter(1)
    assert walk.ahead(2) == []
    assert walk.enter(0)
    assert walk.num_layers == 2
    assert walk.ahead(1) == [1]
    assert walk.ahead(9) == [1, 0]
    assert walk.ahead(9, wraps=False) == [1]


def test_a_model_of_one_layer_has_a_pass_at_every_event():
    walk = Walk()

    assert [walk.enter(0) for _ in range(3)] == [True, True, True]
    assert walk.ahead(1) == [0]


def test_sequences_not_seen_for_long_are_forgotten():
    states = BySequence(list, keep=4)
    for number in range(100):
        states.next_pass()
        states.of(number).append("x")
        states.of(-1).append("y")

    assert len(states) <= 10
    assert len(states.of(-1)) == 100


@pytest.mark.parametrize("name", LEARNING)
def test_memory_stays_bounded_when_sequences_come_and_go(name):
    shape = tiny_shape()
    taught = tiny_lessons(shape)
    params = {
        need: lesson
        for need, lesson in {**taught, **taught["lessons"]}.items()
        if need in predictors.get(name).needs
    }
    predictor = build(name, **params)
    for step in range(1000):
        for layer in range(3):
            said(predictor, layer, [[1, 2], [step % 8, 3]], [step, step + 1], [step % 30, 5])

    held = [value for value in vars(predictor).values() if isinstance(value, BySequence)]
    assert all(0 < len(states) < 140 for states in held)


# --- hand-worked answers -----------------------------------------------------------------------


def test_previous_token_says_what_the_sequence_did_a_token_ago():
    predictor = build("previous_token")

    assert said(predictor, 0, [[0, 1]]) == []
    assert said(predictor, 1, [[2, 3]]) == []
    assert said(predictor, 0, [[4, 5]]) == [(1, 2), (1, 3)]
    # Past the last layer: this token's own first layer.
    assert said(predictor, 1, [[6, 7]]) == [(0, 4), (0, 5)]


def test_previous_token_follows_each_sequence_and_counts_votes():
    predictor = build("previous_token", width=2)
    said(predictor, 0, [[0], [0], [0]], [7, 8, 9])
    said(predictor, 1, [[1, 4], [2, 4], [3, 5]], [7, 8, 9])

    # Sequence 8 has ended, and 10 is new: nothing is known of it.
    assert said(predictor, 0, [[0], [0], [0]], [9, 10, 7]) == [(1, 1), (1, 3)]
    assert said(build("previous_token"), 0, [[0]], [7]) == []


def test_previous_token_takes_a_prompts_last_token():
    predictor = build("previous_token")
    said(predictor, 0, [[0], [1], [2]], [5, 5, 5])
    said(predictor, 1, [[3], [4], [6]], [5, 5, 5])

    assert said(predictor, 0, [[0]], [5]) == [(1, 6)]


def test_previous_layer_repeats_the_numbers_one_layer_on():
    predictor = build("previous_layer", horizon=2)
    for layer in range(3):
        assert said(predictor, layer, [[1, 2]]) == []

    assert said(predictor, 0, [[4, 1], [2, 1]]) == [
        (1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4),
    ]  # fmt: skip
    assert said(predictor, 1, [[3]]) == [(2, 3)]
    assert said(predictor, 2, [[3]]) == []


def test_popular_names_the_most_demanded_and_never_the_unused():
    counts = [[5, 9, 0], [1, 1, 7]]
    predictor = build("popular", popularity=counts, width=2)

    assert said(predictor, 0, []) == [(1, 2), (1, 0)]
    assert said(predictor, 1, []) == [(0, 1), (0, 0)]
    assert said(build("popular", popularity=counts, width=3), 1, []) == [(0, 1), (0, 0)]


def test_token_table_looks_the_ids_up():
    table = {"-1": "0 1|1 0", "7": "2 3|3 2", "8": "0|4 3"}
    predictor = build("token_table", token_table=table)

    assert said(predictor, 0, [[2, 3]], tokens=[7]) == [(1, 3), (1, 2)]
    # An id it has never seen counts as any token; as many as this layer asked for.
    assert said(predictor, 0, [[2]], tokens=[99]) == [(1, 1)]
    # 3 has 2 + 1 points, 4 has 2, 2 has 1.
    assert said(predictor, 0, [[0, 1], [2, 3]], tokens=[7, 8]) == [(1, 3), (1, 4), (1, 2)]
    assert said(predictor, 1, [[3]], tokens=[7]) == [], "the next token is not known"


def test_markov_adds_up_the_followers_of_what_was_chosen():
    tables = ["1 600 2 400|2 900 0 100|0 1000", "0 1000|1 1000|2 1000", "2 1000|2 1000|1 500 2 500"]
    predictor = build("markov", transitions=tables, width=2)

    # Expert 0: 1 by 600, 2 by 400; expert 1: 2 by 900, 0 by 100.
    assert said(predictor, 0, [[0, 1]]) == [(1, 2), (1, 1)]
    assert said(build("markov", transitions=tables), 0, [[0]]) == [(1, 1)]
    assert said(predictor, 2, [[2]]) == [(0, 1), (0, 2)], "layer 0 of the next token"


def test_markov_follows_the_followers():
    tables = ["1 1000|2 1000|0 1000"] * 3
    predictor = build("markov", transitions=tables, horizon=2)

    assert said(predictor, 0, [[0]]) == [(1, 1), (2, 2)]


def test_activation_match_takes_the_most_alike_sequence():
    known = ["0 1000|1 1000|2 1000", "3 1000|4 900 5 100|6 700 7 300"]
    predictor = build("activation_match", activations=known, horizon=2, width=2)

    # Sequence 1: all its tokens so far went to expert 3. Shares × nearness: 900 × 2/3, 700 × 1/3, 300 × 1/3, 100 × 2/3.
    assert said(predictor, 0, [[3]], [1]) == [(1, 4), (2, 6), (2, 7), (1, 5)]
    # Then it behaves like the other: 1 token like the second matrix, 1 like the first, then 2.
    said(predictor, 1, [[1]], [1])
    assert said(predictor, 2, [[2]], [1])[0] == (0, 0)


def test_activation_match_keeps_sequences_apart_and_adds_them_up():
    known = ["0 1000|1 1000", "3 1000|4 1000"]
    predictor = build("activation_match", activations=known, horizon=1)

    assert said(predictor, 0, [[3], [3], [0]], [1, 2, 3]) == [(1, 4), (1, 1)]


def test_map_search_follows_the_paths_most_alike():
    paths = ["0 1|2 3|4 5", "0 2|6 7|0 1", "0 1|2 4|6 7"]
    predictor = build("map_search", maps=paths, nearest=2, delta=0.5)

    # Maps 0 and 2 share two experts; they agree on 2.
    assert said(predictor, 0, [[0, 1]]) == [(1, 2)]
    # Two and one more experts shared: map 0 leads with 4 to 3.
    assert said(predictor, 1, [[2, 3]]) == [(2, 4), (2, 5)]
    assert said(predictor, 2, [[4, 5]]) == []
    # A new pass, a new path.
    assert said(predictor, 0, [[2, 0]]) == [(1, 6), (1, 7)]


def test_map_search_says_nothing_of_what_it_has_never_seen():
    predictor = build("map_search", maps=["0 1|2 3"], nearest=2)

    assert said(predictor, 0, [[5, 6]]) == []


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("previous_token", {"horizon": 0}, "horizon >= 1"),
        ("previous_layer", {"width": -1}, "width >= 0"),
        ("map_search", {"maps": ["0|0"], "delta": 0.0}, "0 < delta <= 1"),
        ("map_search", {"maps": ["0|0"], "nearest": 0}, "nearest >= 1"),
        ("synthetic", {"future": Future([]), "recall": 1.5}, "0 <= recall <= 1"),
        ("synthetic", {"future": Future([]), "precision": 0.0}, "0 < precision <= 1"),
        ("synthetic", {"future": Future([]), "latency_s": -1.0}, "latency_s >= 0"),
    ],
)
def test_impossible_parameters_are_refused(name, params, words):
    with pytest.raises(UsageError, match=words):
        build(name, **params)


# --- synthetic ---------------------------------------------------------------------------------


def many_events(count=4000, layers=4, experts=32, top_k=4):
    rng = np.random.default_rng(1)
    return [
        tuple(
            ExpertKey(number % layers, int(expert))
            for expert in np.sort(rng.choice(experts, top_k, replace=False))
        )
        for number in range(count)
    ]


def told(events, **params):
    future = Future(events)
    predictor = build("synthetic", future=future, **params)
    answers = []
    for event in events:
        future.advance()
        answers.append(list(predictor.predict(event[0].layer, Signals({}))))
    return answers


@pytest.mark.parametrize(
    ("recall", "precision"), [(0.8, 0.5), (0.3, 0.9), (0.95, 0.25), (1.0, 1.0), (0.5, 1.0)]
)
def test_synthetic_reaches_its_recall_and_precision(recall, precision):
    events = many_events()
    right = named = needed = 0
    for answer, event in zip(
        told(events, recall=recall, precision=precision), events[1:], strict=False
    ):
        assert len(set(answer)) == len(answer)
        assert {key.layer for key in answer} <= {event[0].layer}
        right += len(set(answer) & set(event))
        named += len(answer)
        needed += len(event)

    assert right / needed == pytest.approx(recall, abs=0.01)
    assert right / named == pytest.approx(precision, abs=0.01)


def test_synthetic_is_deterministic_and_differs_by_seed():
    events = many_events(200)
    quality = {"recall": 0.7, "precision": 0.6}

    assert told(events, **quality) == told(events, **quality)
    assert told(events, **quality) != told(events, **quality, seed=1)


def test_synthetic_says_the_same_of_an_event_whenever_it_is_asked():
    events = many_events(200)
    near = told(events, recall=0.7, precision=0.6)
    far = told(events, recall=0.7, precision=0.6, horizon=2)

    for number in range(len(events) - 2):
        assert far[number] == near[number] + near[number + 1]


def test_perfect_synthetic_is_the_oracle(trace):
    workload = workload_of(trace)
    for horizon in (1, 3):
        oracle, synthetic = (
            tape_of(
                workload, make_spec(slots=8, predictor=name, predictor_params={"horizon": horizon})
            )
            for name in ("oracle", "synthetic")
        )
        assert oracle.ptr.tolist() == synthetic.ptr.tolist()
        assert oracle.keys.tolist() == synthetic.keys.tolist()


@pytest.mark.parametrize(
    "params",
    [
        {"recall": 0.5, "precision": 0.4},
        {"recall": 0.9, "precision": 0.7, "horizon": 3, "seed": -5},
        {"recall": 0.8, "precision": 1e-300},
        {"recall": 0.0, "precision": 0.1},
    ],
)
def test_synthetic_by_loops_is_synthetic_by_asking(trace, params):
    workload = workload_of(trace)
    spec = make_spec(slots=8, predictor="synthetic", predictor_params=params)

    quick, slow = tape_of(workload, spec), asked(workload, spec)

    assert quick.ptr.tolist() == slow.ptr.tolist()
    assert quick.keys.tolist() == slow.keys.tolist()


def test_chances_are_spread_evenly():
    drawn = np.asarray([chance(3, event, expert) for event in range(200) for expert in range(50)])

    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert counts.min() > 400
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03


def test_latency_is_charged_for_every_event(trace):
    ready = replace(forecaster(trace), decision_is_measured=True, is_declared=True)
    ready = replace(ready, costs=replace(ready.costs, copy_s=0.0, busy_copy_s=0.0, wake_s=0.0))
    quick, slow = (
        ready.predict(
            make_spec(slots=8, predictor="synthetic", predictor_params={"latency_s": seconds}),
            with_bounds=False,
        )
        for seconds in (0.0, 0.5)
    )

    expected = 0.5 * ready.workload.num_events
    assert slow.time.total_s - quick.time.total_s == pytest.approx(expected)


def test_a_predictor_without_gates_is_not_charged_for_gates(trace):
    def charged(name: str, **params) -> tuple[float, ...]:
        base = forecaster(trace)
        costs = base.costs
        decode = replace(costs.decode, lookahead=Linear((3.0, 2.0, 1.0)))
        ready = replace(base, costs=replace(costs, decode=decode), decision_is_measured=True)
        spec = replace(make_spec(slots=8), predictor=Member(name=name, params=params))
        return ready._charged(spec).decode.lookahead.weights

    assert charged("none") == charged("gate_lookahead") == (3.0, 2.0, 1.0)
    assert charged("synthetic", latency_s=0.25) == (0.25, 0.0, 1.0)
    own_s, token_s, load_s = charged("previous_token")
    assert 0.0 < own_s < 0.1
    assert (token_s, load_s) == (0.0, 1.0)


# --- lessons -----------------------------------------------------------------------------------


def test_tables_are_text_and_back():
    assert packed([[3, 17], [], [0]]) == "3 17||0"
    assert unpacked("3 17||0") == [[3, 17], [], [0]]
    assert unpacked_pairs("3 17 4 5|") == [[(3, 17), (4, 5)], []]


def two_layers(steps, experts=4):
    """One sequence of one token per step; each step is the expert of two layers, and the token's id."""
    workload = make_steps([[[a], [b]] for a, b, _ in steps], experts=experts)
    ids = np.repeat([token for *_, token in steps], 2).astype(np.int32)
    return replace(workload, rows=replace(workload.rows, token=ids))


def test_transitions_count_what_follows_and_join_tokens():
    workload = two_layers([(0, 1, 5), (0, 2, 5), (0, 1, 5), (3, 1, 6)])

    tables = lessons_of(workload, ["transitions"])["transitions"]

    assert unpacked_pairs(tables[0]) == [[(1, 667), (2, 333)], [], [], [(1, 1000)]]
    # After the last layer the next token's first: 1 → 0, 2 → 0, 1 → 3.
    assert unpacked_pairs(tables[1]) == [[], [(0, 500), (3, 500)], [(0, 1000)], []]


def test_token_table_ranks_experts_by_id():
    workload = two_layers([(0, 1, 5), (0, 2, 5), (3, 2, 5), (3, 1, 6)])

    table = lessons_of(workload, ["token_table"])["token_table"]

    assert table == {"-1": "0 3|1 2", "5": "0 3|2 1", "6": "3|1"}


def test_activations_are_shares_of_a_sequences_tokens():
    workload = two_layers([(0, 1, 5), (0, 2, 5), (3, 2, 5), (3, 2, 6)])

    assert lessons_of(workload, ["activations"])["activations"] == ["0 500 3 500|2 750 1 250"]


def test_maps_are_paths_none_twice():
    workload = two_layers([(0, 1, 5), (0, 2, 5), (0, 1, 5), (3, 1, 6)])

    assert lessons_of(workload, ["maps"])["maps"] == ["0|1", "0|2", "3|1"]


def test_matrices_stand_for_different_sequences(tmp_path):
    trace = synthetic_trace(
        tmp_path / "t", sequences=24, new_tokens=8, prompt_tokens=8, layers=3, skew=2.0
    )

    found = lessons_of(workload_of(trace), ["activations"])["activations"]

    assert 2 <= len(set(found)) == len(found) <= 24


@pytest.mark.parametrize(("layers", "experts", "top_k"), [(24, 32, 4), (16, 64, 8), (48, 128, 8)])
def test_lessons_fit_into_a_policy_file(tmp_path, layers, experts, top_k):
    trace = synthetic_trace(
        tmp_path / "t", layers=layers, experts=experts, top_k=top_k, sequences=80,
        prompt_tokens=12, new_tokens=3, batch_size=4,
    )  # fmt: skip
    workload = workload_of(trace)
    taught = lessons_of(workload, LESSONS)

    assert set(taught) == set(LESSONS)
    for name in LEARNING:
        if not predictors.get(name).needs & set(LESSONS):
            continue
        spec = make_spec(
            slots=8,
            predictor=name,
            lessons=taught,
            popularity=workload.popularity(),
            layer_times={"copy_s": 1.0, "layer_s": 1.0, "token_s": 0.0},
        )
        path = tmp_path / f"{name}.json"
        write_policy(
            path,
            PolicyFile(
                behaviour=spec,
                behaviour_hash=spec.behaviour_hash(),
                shape=trace.shape,
                budget="8slots",
                trace="t",
            ),
        )

        assert path.stat().st_size < 1_000_000
        assert read_policy(path).behaviour.behaviour_hash() == spec.behaviour_hash()
        read_policy(path).behaviour.build(trace.shape)


def test_what_is_learned_comes_from_the_learning_half(trace):
    ready = forecaster(trace)
    learn, judged = split_by_batch(ready.workload)

    taught = judge_of(ready, lessons=LESSONS).lessons

    assert taught == lessons_of(learn, LESSONS)
    assert taught != lessons_of(judged, LESSONS)
    assert judge_of(ready).lessons == {}
    assert judge_of(ready, lessons=LESSONS, learn_from_all=True).lessons == lessons_of(
        ready.workload, LESSONS
    )


@pytest.mark.parametrize("name", LEARNING)
def test_a_judge_gives_each_predictor_what_it_needs(trace, name):
    judge = judge_of(forecaster(trace), lessons=LESSONS)
    members = {kind: Member(name=member) for kind, member in DEFAULTS.items()}
    # The trace recorded one layer of look-ahead.
    limit = getattr(predictors.get(name), "depth_param", None)
    member = Member(name=name, params={limit: 1} if limit else {})
    point = Point(budget="8slots", slots=8, link=None, members={**members, "predictor": member})

    row = judge.predict(point)

    assert not row.error
    judge.require([("predictor", member)])


def test_token_ids_that_were_not_recorded_are_missed(trace):
    ready = forecaster(trace)
    rows = ready.workload.rows
    assert rows.token is not None
    without = replace(ready.workload, rows=replace(rows, token=np.full_like(rows.token, -1)))

    assert "token ids" in lacking({"routing", "token_table"}, without, ready.costs)
    assert not lacking({"routing", "token_table"}, ready.workload, ready.costs)
    with pytest.raises(UsageError, match="token ids"):
        lessons_of(without, ["token_table"])
    spec = make_spec(slots=8, predictor="token_table", lessons=lessons_of(ready.workload, TABLES))
    with pytest.raises(UsageError, match="token ids"):
        replace(ready, workload=without).predict(spec)


def test_rivals_are_tried_with_every_cache_and_plain_others(trace):
    ready = forecaster(trace)
    space = builtin_space(ready.workload, ready.costs, [])
    space = replace(space, budgets=(Budget("8slots", 8),))
    points = rival_points(space)

    assert {option.name for option in space.members["predictor"]} == {"none", "gate_lookahead"}
    assert {p.members["predictor"].name for p in points} >= {"markov", "popular", "token_table"}
    assert {p.members["allocation"].name for p in points} == {"equal"}
    assert len(points) == len(space.rivals) * len(space.members["cache"])
    assert "synthetic" not in {p.members["predictor"].name for p in bound_points(space)}


# --- in use ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sticky(tmp_path_factory):
    trace = synthetic_trace(
        tmp_path_factory.mktemp("sticky") / "t", sequences=8, new_tokens=24, prompt_tokens=4,
        batch_size=1, experts=16, top_k=2, stickiness=0.7, skew=0.5,
    )  # fmt: skip
    return workload_of(trace)


def quality(workload, spec):
    """Recall and precision over the next event, decode only."""
    tape, is_decode = asked(workload, spec), workload.event_is_decode()
    events, width = workload.keys(), workload.num_experts
    right = named = needed = 0
    for number in range(workload.num_events - 1):
        if not is_decode[number]:
            continue
        truth = set(events[workload.ptr[number + 1] : workload.ptr[number + 2]].tolist())
        layer = int(workload.layer[number + 1])
        mine = {
            k
            for k in tape.keys[tape.ptr[number] : tape.ptr[number + 1]].tolist()
            if k // width == layer
        }
        right, named, needed = right + len(mine & truth), named + len(mine), needed + len(truth)
    return right / needed, right / named


def test_previous_token_beats_chance_on_a_sticky_trace(sticky):
    recall, precision = quality(sticky, make_spec(slots=8, predictor="previous_token"))

    assert recall > 0.5
    assert precision > 0.5 > 3 * 2 / 16


def test_popularity_and_likeness_beat_chance_too(sticky):
    learn, judged = split_by_batch(sticky)
    taught = lessons_of(learn, TABLES)
    for name in ("popular", "markov", "activation_match"):
        spec = make_spec(
            slots=8,
            predictor=name,
            popularity=learn.popularity(),
            lessons=taught,
            predictor_params={"width": 2},
        )

        assert quality(judged, spec)[0] > 2 / 16, name


@pytest.mark.parametrize("name", ["markov", "map_search", "token_table"])
def test_where_the_next_layer_follows_from_this_one_they_are_right(name):
    steps = [(n * n % 7, (n * n + 1) % 7, n * n % 7) for n in range(60)]
    workload = two_layers(steps, experts=7)
    taught = lessons_of(workload, TABLES)
    spec = make_spec(slots=8, predictor=name, lessons=taught)

    tape, truth = asked(workload, spec), workload.keys()

    for number in range(0, workload.num_events, 2):
        assert tape.keys[tape.ptr[number] : tape.ptr[number + 1]].tolist() == [truth[number + 1]]


@pytest.mark.parametrize("name", LEARNING)
def test_engines_agree_and_logs_repeat(trace, name):
    workload, shape = workload_of(trace), trace.shape
    machine = make_machine(copy=0.3, mixer=0.2, experts=0.4, lookahead=0.05, chunks=3)
    spec = make_spec(
        slots=20,
        predictor=name,
        popularity=workload.popularity(),
        layer_times=layer_times(machine, workload),
        lessons=lessons_of(workload, LESSONS),
    )

    first, again = (simulate(workload, spec, shape, machine) for _ in range(2))
    totals, engine = run_engine(workload, spec, shape, machine)

    assert engine == ("reference" if hasattr(predictors.get(name), "hear") else "compiled")
    assert list(first.log) == list(again.log)
    total_s = [
        s
        for s, layer in zip(first.steps["total_s"], first.steps["layer"], strict=True)
        if layer == -1
    ]
    assert totals.steps.total_s.tolist() == total_s


@pytest.mark.parametrize("name", LEARNING)
def test_decisions_repeat_on_a_pretended_device(name):
    shape = tiny_shape()
    spec = make_spec(slots=9, predictor=name, **tiny_lessons(shape))
    script = [
        ScriptedEvent(
            step, layer, tuple(sorted({(step * 3 + layer) % 8, (step + 5 * layer) % 8})), None,
            ends=(step, layer), signals=Signals({}, [[(step * 3 + layer) % 8]], [step // 5], [step % 9]),
        )
        for step in range(12)
        for layer in range(3)
    ]  # fmt: skip
    logs = []
    for _ in range(2):
        log = []
        CheckedDriver(spec.build(shape, log=log)).run(script)
        logs.append(log)

    assert logs[0] == logs[1]
    assert len(logs[0]) > 100


def test_a_tape_is_asked_once_for_all_caches(trace, monkeypatch):
    workload, calls = workload_of(trace), []
    monkeypatch.setattr(tapes, "asked", lambda *args: calls.append(args) or asked(*args))

    for cache in ("lru", "lfu"):
        for horizon in (1, 2):
            params = {"horizon": horizon}
            tape_of(
                workload,
                make_spec(
                    slots=4, cache=cache, predictor="previous_token", predictor_params=params
                ),
            )

    assert len(calls) == 2
    tape_of(workload_of(trace), make_spec(slots=4, predictor="previous_token"))
    assert len(calls) == 3


def test_experts_of_a_row_are_told_without_holes():
    workload = make_steps([[[1, 2], []], [[3], [0, 1]]], experts=4)

    assert workload.signals(0, 0, routed=True).routed == [[1], [2]]
    assert workload.signals(1, 0, routed=True).routed == [[]]


def test_a_policy_with_a_table_shows_its_parameters_only(trace):
    taught = lessons_of(workload_of(trace), ["maps"])
    spec = make_spec(
        slots=4, predictor="map_search", lessons=taught, predictor_params={"delta": 0.5}
    )

    assert spec.label == "lru + map_search(delta=0.5) @ 4 slots"
    assert json.loads(json.dumps(taught)) == taught

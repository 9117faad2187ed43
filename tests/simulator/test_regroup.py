"""Batches in turns, regrouped by route: the algorithm, the workload it makes, and what it is charged."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from expertflow.simulator.arrivals import read_arrivals
from expertflow.simulator.compiled.testing import require_equal
from expertflow.simulator.costs import Linear
from expertflow.simulator.forecast import forecaster
from expertflow.simulator.hardware import machine_of
from expertflow.simulator.kv_copies import fit_kv_move, measure_host_kv_move
from expertflow.simulator.memory import PassSizes, predicted_memory
from expertflow.simulator.paths import PathCosts, PathLatency, PathTable
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.policy.medoids import assign, cluster
from expertflow.simulator.policy.registry import schedulers
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.policy.units import arrange, ask, distinct, even_sizes, regrouping_of
from expertflow.simulator.regroup import charged, in_units
from expertflow.simulator.routes import routes_of
from expertflow.simulator.serving import ServingSettings, serve
from expertflow.simulator.workload import Rows, Steps, Workload, build_workload, workload_of
from expertflow.tracer.errors import UsageError
from expertflow.tracer.main import main
from expertflow.tracer.store import NO_EXPERT
from expertflow.tracer.synthetic import synthetic_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import make_machine

LAYERS, EXPERTS = 2, 8


# --- the algorithm -------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_assignment_to_fixed_medoids_is_the_cheapest_there_is(data):
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    row = st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes))
    costs = data.draw(st.lists(row, min_size=sum(sizes), max_size=sum(sizes)))
    clusters = [number for number, size in enumerate(sizes) for _ in range(size)]

    found = assign(costs, sizes)

    best = min(
        sum(costs[item][number] for item, number in enumerate(order))
        for order in set(itertools.permutations(clusters))
    )
    assert [found.count(number) for number in range(len(sizes))] == sizes
    assert sum(costs[item][number] for item, number in enumerate(found)) == best


def test_sequences_of_two_kinds_are_told_apart():
    one, other = 0b1111, 0b11110000
    routes = [one, other, one ^ 1, other ^ 16, one, other ^ 32]

    assert sorted(cluster(routes, [3, 3], 30)) == [[0, 2, 4], [1, 3, 5]]


@settings(max_examples=100, deadline=None)
@given(routes=st.lists(st.integers(0, 2**20), min_size=2, max_size=16), limit=st.integers(1, 5))
def test_clusters_have_their_sizes_and_hold_everyone_once(routes, limit):
    sizes = even_sizes(len(routes), limit)

    found = cluster(routes, sizes, 30)

    assert [len(group) for group in found] == sizes
    assert sorted(itertools.chain(*found)) == list(range(len(routes)))
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= limit


@settings(max_examples=100, deadline=None)
@given(
    routes=st.lists(st.integers(1, 2**12), min_size=8, max_size=8),
    min_gain=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_batches_stay_unless_the_experts_to_be_expected_fall_by_enough(routes, min_gain):
    scheduler = schedulers.build("route_similarity", {"min_gain": min_gain})
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]

    found = ask(scheduler, routes, groups, 4)

    if found != groups:
        before = distinct(routes, groups)
        assert before - distinct(routes, found) > min_gain * before


def test_fewer_batches_are_made_where_fewer_do():
    scheduler = schedulers.build("route_similarity", {"min_gain": 1.0})

    assert ask(scheduler, [1, 2, 4], [[0, 1], [2]], 4) == [[0, 1, 2]]


def test_tokens_of_which_nothing_is_known_move_nobody():
    scheduler = schedulers.build("route_similarity", {"min_gain": 0.0})

    assert ask(scheduler, [0] * 6, [[0, 2, 4], [1, 3, 5]], 3) == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
    "answer",
    [[[0, 1], [1, 2]], [[0, 1]], [[0, 1, 2]], [[0], [1], [2]], [[0, 1, 2], []], [[0, 1], [3]]],
)
def test_an_answer_that_is_no_partition_is_refused_with_the_schedulers_name(answer):
    class Wrong(type(schedulers.build("fcfs", {}))):
        name = "wrong"

        def regroup(self, routes, groups, limit):
            return answer

    with pytest.raises(UsageError, match=r"'wrong' made .* expected each of them once"):
        ask(Wrong(batches=2), [1, 2, 3], [[0, 1], [2]], 2)


def test_a_scheduler_that_can_only_pick_is_left_alone():
    class Picks:
        name, needs, is_lossless = "picks", frozenset(), True

        def pick(self, waiting, limit):
            return [0]

    assert regrouping_of(Picks()) is None


@pytest.mark.parametrize(
    "params",
    [{"batches": 0}, {"every": 0}, {"iterations": 1.5}, {"min_gain": 2}, {"batches": True}],
)
def test_wrong_parameters_are_refused(params):
    with pytest.raises(UsageError, match=next(iter(params))):
        schedulers.build("route_similarity", params)


# --- places --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_rows_are_where_the_placements_say(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    names = iter(range(100))
    held = [[next(names) for _ in range(size)] for size in sizes]
    left = [s for rows in held for s in rows if data.draw(st.booleans())]
    order = data.draw(st.permutations(left))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(left)), max_size=len(held) - 1)))
    groups = [order[a:b] for a, b in itertools.pairwise([0, *cuts, len(left)]) if b > a]

    placed = arrange(held, groups)

    # Carry it out as a driver does: everything is read before anything is written.
    old = [list(rows) for rows in held]
    for placement in placed:
        rows = [] if placement.is_new else old[placement.base][: len(placement.rows)]
        rows += [-1] * (len(placement.rows) - len(rows))
        for row in placement.copied:
            batch, source = placement.sources[row]
            rows[row] = held[batch][source]
        assert rows == list(placement.rows)
    assert sorted(map(sorted, groups)) == sorted(sorted(p.rows) for p in placed)
    assert len({placement.base for placement in placed}) == len(placed)


def test_nobody_is_copied_where_nobody_moves():
    placed = arrange([[0, 1], [2, 3]], [[3, 2], [0, 1]])

    assert [placement.copied for placement in placed] == [(), ()]
    assert [placement.rows for placement in placed] == [(0, 1), (2, 3)]


def test_an_exchange_copies_two_rows():
    placed = arrange([[0, 1], [2, 3]], [[0, 3], [2, 1]])

    assert [placement.rows for placement in placed] == [(0, 3), (2, 1)]
    assert sum(len(placement.copied) for placement in placed) == 2
    assert sum(placement.arrived for placement in placed) == 2


# --- routes --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, EXPERTS), min_size=12, max_size=12))
def test_a_route_has_a_bit_per_layer_and_expert(ids):
    experts = np.array(ids).reshape(2, LAYERS, 3)
    experts[experts == EXPERTS] = NO_EXPERT

    for token, route in enumerate(routes_of(experts, EXPERTS)):
        bits = {
            layer * EXPERTS + expert
            for layer in range(LAYERS)
            for expert in experts[token, layer].tolist()
            if expert != NO_EXPERT
        }
        assert route == sum(1 << bit for bit in bits)


# --- the workload --------------------------------------------------------------------------------


def recorded(lengths, *, batch=2, prompt=2, seed=0, pads=True) -> Workload:
    """Batches of sequences with a prompt and so many decode steps each, ended ones as padding (expert 7).

    Even sequences choose experts below 3, odd ones from 3 to 5.
    """
    draw = np.random.default_rng(seed)
    rows: list[tuple[int, int, int, bool, int, list[int]]] = []
    sizes, members = [], []

    def chosen(sequence, is_pad):
        if is_pad:
            return [7]
        return [int(draw.integers(3)) + 3 * (sequence % 2)]

    for first in range(0, len(lengths), batch):
        group = list(range(first, min(first + batch, len(lengths))))
        width = prompt + first
        for count in range(1 + max(lengths[s] for s in group)):
            step = len(sizes)
            alive = [s for s in group if lengths[s] >= count]
            here = group if pads else alive
            query = width if count == 0 else 1
            sizes.append((count > 0, len(here), len(here) * query, width + count))
            members.append(alive)
            for layer in range(LAYERS):
                for s in here:
                    for place in range(query):
                        is_pad = (count == 0 and place < width - prompt) or s not in alive
                        position = (
                            -1
                            if is_pad
                            else place - (width - prompt)
                            if count == 0
                            else prompt + count - 1
                        )
                        rows.append((step, layer, s, is_pad, position, chosen(s, is_pad)))
    step, layer, sequence, is_pad, position, experts = (
        np.asarray(c) for c in zip(*rows, strict=True)
    )
    is_decode, size, tokens, context = (np.asarray(c) for c in zip(*sizes, strict=True))
    return build_workload(
        Steps(
            number=np.arange(len(sizes)),
            is_decode=is_decode,
            batch=size,
            tokens=tokens,
            context=context,
            member_ptr=np.concatenate(([0], np.cumsum([len(m) for m in members]))),
            members=np.concatenate([np.asarray(m, np.int64) for m in members]),
        ),
        step,
        layer,
        Rows(
            experts=experts.astype(np.uint16),
            sequence=sequence.astype(np.int32),
            is_pad=is_pad.astype(bool),
            position=position,
        ),
        prompt_tokens=dict.fromkeys(range(len(lengths)), prompt),
        batch_size=batch,
        num_layers=LAYERS,
        num_experts=EXPERTS,
        lookahead=0,
    )


def spec_of(scheduler="route_similarity", slots=8, **params):
    return make_spec(slots=slots, scheduler=scheduler, scheduler_params=params)


def tokens_of(workload, *, decode: bool):
    """What every sequence's tokens chose, by sequence and layer, in order of time; padding left out."""
    found: dict[tuple[int, int], list[list[int]]] = {}
    for step, number in workload.walk():
        if (step.phase == "decode") != decode:
            continue
        for row in range(*workload.row_ptr[number : number + 2].tolist()):
            if not workload.rows.is_pad[row]:
                key = (int(workload.rows.sequence[row]), int(workload.layer[number]))
                found.setdefault(key, []).append(workload.rows.experts[row].tolist())
    return found


def passes_of(workload, *, decode: bool = True):
    steps = (workload.step(place) for place in range(len(workload.steps)))
    return [step for step in steps if (step.phase == "decode") == decode]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    batches=st.integers(2, 4),
    every=st.integers(1, 3),
    pads=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_token_is_fed_once_with_the_experts_it_chose(lengths, batches, every, pads, seed):
    workload = recorded(lengths, seed=seed, pads=pads)

    found = in_units(workload, spec_of(batches=batches, every=every, min_gain=0.0)).workload

    for decode in (False, True):
        assert tokens_of(found, decode=decode) == tokens_of(workload, decode=decode)
    assert passes_of(found, decode=False) == [
        replace(step, step=new.step, kv_beside=new.kv_beside)
        for step, new in zip(
            passes_of(workload, decode=False), passes_of(found, decode=False), strict=True
        )
    ]
    assert not found.rows.is_pad[
        np.repeat(found.event_is_decode(), np.diff(found.row_ptr))
    ].any(), "who has ended leaves"
    assert found.steps.number.tolist() == list(range(len(found.steps)))


def test_batches_of_a_unit_take_turns():
    workload = recorded([3, 3, 3, 3])

    found = in_units(workload, spec_of("fcfs", batches=2)).workload

    assert [step.sequences for step in passes_of(found)] == [(0, 1), (2, 3)] * 3
    assert [step.context for step in passes_of(found)] == [5, 5, 6, 6, 7, 7]


def test_regrouping_brings_like_to_like():
    workload = recorded([4, 4, 4, 4])
    before = in_units(workload, spec_of("fcfs", batches=2)).workload

    found = in_units(workload, spec_of(min_gain=0.0)).workload

    assert {frozenset(step.sequences) for step in passes_of(found)} == {
        frozenset({0, 2}),
        frozenset({1, 3}),
    }
    assert found.mean_distinct("decode") < before.mean_distinct("decode")


def test_regrouping_goes_by_the_token_before_unless_the_future_is_known():
    """Sequences change their kind in the third decode step; who looks back notices one step later."""
    workload = recorded([4, 4, 4, 4])
    experts = workload.rows.experts.copy()
    late = np.repeat(
        np.repeat(workload.steps.context >= 5, np.diff(workload.event_ptr)),
        np.diff(workload.row_ptr),
    )
    late &= workload.rows.position >= 4
    one = late & np.isin(workload.rows.sequence, [0, 1])
    experts[one] = experts[one] % 3
    experts[late & ~one] = 3 + experts[late & ~one] % 3
    workload = build_workload(
        workload.steps,
        np.repeat(
            np.repeat(workload.steps.number, np.diff(workload.event_ptr)), np.diff(workload.row_ptr)
        ),
        np.repeat(workload.layer, np.diff(workload.row_ptr)),
        replace(workload.rows, experts=experts),
        prompt_tokens=workload.prompt_tokens,
        batch_size=2,
        num_layers=LAYERS,
        num_experts=EXPERTS,
        lookahead=0,
    )
    apart, together = frozenset({0, 2}), frozenset({0, 1})

    def of_first(name):
        found = in_units(workload, spec_of(name, min_gain=0.0)).workload
        return [frozenset(s.sequences) for s in passes_of(found) if 0 in s.sequences]

    assert of_first("route_oracle") == [apart, apart, together, together]
    assert of_first("route_similarity") == [apart, apart, apart, together]


def test_predicted_paths_are_what_path_similarity_goes_by():
    workload = recorded([2, 2, 2, 2])
    position = np.tile(np.arange(-1, 5), 4)
    sequence = np.repeat(np.arange(4), 6)
    lies = np.where(sequence // 2 == 0, 0, 5).astype(np.uint16)
    table = PathTable(
        sequence=sequence,
        position=position,
        experts=np.repeat(lies[:, None, None], LAYERS, axis=1),
    )

    found = in_units(workload.with_paths(table), spec_of("path_similarity", min_gain=0.0))

    assert found.source == "predicted"
    assert {step.sequences for step in passes_of(found.workload)} == {(0, 1), (2, 3)}


def test_one_batch_at_a_time_is_the_recording_itself():
    assert in_units(recorded([2, 2]), make_spec(slots=4)) is None


def test_sequences_in_two_batches_cannot_be_regrouped():
    workload = recorded([3, 3, 3, 3])
    steps = workload.steps
    broken = replace(
        workload, steps=replace(steps, members=np.where(steps.members == 2, 0, steps.members))
    )

    with pytest.raises(UsageError, match="join and leave running batches"):
        in_units(broken, spec_of())


# --- what it is charged --------------------------------------------------------------------------


def costs_of(**more):
    return replace(make_machine(copy=0.5, mixer=0.1, experts=0.1, head=0.1), **more)


def test_scheduling_and_moves_are_charged_to_the_pass_they_come_before():
    workload, shape = recorded([3, 3, 3, 3]), tiny_shape(LAYERS, EXPERTS, 1)
    units = in_units(workload, spec_of(min_gain=0.0))
    costs = costs_of(kv_move=Linear((2.0, 1e-3)))

    found, result = charged(units, costs, shape)

    first = next(turn for turn in units.turns if turn.begins)
    # The batch of the narrower prompts is made as wide as the other, then two rows are exchanged.
    assert (first.rows, first.positions) == (2 + 2, 2 * 4 + 2 * 4)
    seconds = 2.0 * first.rows + 1e-3 * first.positions * shape.kv_bytes_per_token
    own = units.decision_s()[4]
    assert found.steps.overhead_s[first.place] == pytest.approx(seconds + own)
    assert found.steps.is_decode[first.place]
    assert result.move_s == pytest.approx(
        sum(2.0 * t.rows + 1e-3 * t.positions * shape.kv_bytes_per_token for t in units.turns)
    )
    assert result.decision_s == pytest.approx(3 * own)
    assert (result.asked, result.changed, result.moved) == (3, 1, 2)
    assert result.passes == 6


def test_a_path_predictor_is_charged_for_the_whole_unit_before_each_turn():
    workload, shape = recorded([3, 3, 3, 3]), tiny_shape(LAYERS, EXPERTS, 1)
    units = in_units(workload, spec_of("fcfs", batches=2))

    found, result = charged(
        units, costs_of(), shape, lambda phase, count: count * (1.0 if phase == "decode" else 10.0)
    )

    assert found.steps.overhead_s[[turn.place for turn in units.turns]].tolist() == [44.0, 4.0, 4.0]
    assert result.decision_s == 52.0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    overhead=st.sampled_from([0.0, 0.3, 1.7]),
    predictor=st.sampled_from(["none", "previous_token", "oracle"]),
)
def test_both_engines_charge_the_same_to_the_last_bit(seed, overhead, predictor):
    pytest.importorskip("numba")
    workload, shape = recorded([3, 1, 2, 3], seed=seed), tiny_shape(LAYERS, EXPERTS, 1)
    spec = replace(
        spec_of(min_gain=0.0, slots=1 + seed % 9),
        predictor=make_spec(slots=1, predictor=predictor).predictor,
    )
    costs = costs_of(kv_move=Linear((overhead, 1e-3 * overhead)), busy_copy_s=0.7)
    found, result = charged(in_units(workload, spec), costs, shape)

    totals = require_equal(found, spec, shape, costs)

    assert totals.steps.schedule_s.sum() == pytest.approx(result.decision_s + result.move_s)
    assert totals.steps.schedule_s.sum() <= totals.steps.total_s.sum()


def test_kv_caches_of_the_other_batches_count_as_device_memory():
    workload, shape = recorded([3, 3, 3, 3]), tiny_shape(LAYERS, EXPERTS, 1)

    def kv_bytes(made):
        sizes = PassSizes.of_steps(made.steps, np.zeros(len(made.steps)))
        return predicted_memory(sizes, 4, shape, costs_of()).kv_cache

    alone, turns = (
        kv_bytes(workload),
        kv_bytes(in_units(workload, spec_of("fcfs", batches=2)).workload),
    )

    assert alone == 2 * 7 * shape.kv_bytes_per_token
    assert turns == 2 * alone


# --- forecasts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batched(tmp_path_factory):
    return synthetic_trace(
        tmp_path_factory.mktemp("regroup") / "t",
        sequences=8,
        new_tokens=6,
        prompt_tokens=4,
        batch_size=2,
    )


def test_a_forecast_counts_regrouping_in_its_time(batched):
    ready = forecaster(batched)
    spec = make_spec(slots=8, scheduler="route_similarity", scheduler_params={"min_gain": 0.0})

    result = ready.predict(spec)

    parts = [getattr(result.time, name) for name in result.time.__slots__ if name != "total_s"]
    found = result.regrouping
    assert found.asked > 0
    assert result.time.schedule_s == pytest.approx(found.decision_s + found.move_s)
    assert sum(parts) == pytest.approx(result.time.total_s)
    assert "route_similarity" in result.label
    assert any("host memory" in text for text in result.warnings)
    assert result.bounds.belady_tokens_per_s > 0
    record = ready.record(spec)
    assert len(record.steps["step"]) == (1 + batched.shape.num_moe_layers) * len(
        in_units(ready.workload, spec).workload.steps
    )


def test_a_declared_machine_moves_keys_and_values_at_its_memory_bandwidth(batched):
    shape = replace(batched.shape, expert_bytes=1 << 20)

    costs = machine_of(shape, "rtx4090", "pcie4x16").costs

    assert costs.kv_move(3, 1e9) == pytest.approx(2e9 / 1008e9, rel=0.01)


def test_requests_that_arrive_are_not_regrouped(batched):
    ready, spec = forecaster(batched), make_spec(slots=8, scheduler="route_similarity")
    serving = serve(
        ready.workload,
        spec,
        read_arrivals("closed:2", limit=4, seed=0),
        ServingSettings(max_batch=2),
    )

    with pytest.raises(UsageError, match="regroups the recorded batches"):
        ready.predict(spec, serving=serving)


def test_predicted_paths_must_be_there(batched):
    with pytest.raises(UsageError, match="scheduler 'path_similarity' needs predicted paths"):
        forecaster(batched).predict(make_spec(slots=8, scheduler="path_similarity"))


def test_a_path_predictors_time_is_charged_once(batched):
    ready = forecaster(batched)
    tokens = 10
    sequence, position = (
        a.ravel() for a in np.meshgrid(np.arange(8), np.arange(tokens), indexing="ij")
    )
    guess = np.zeros((8 * tokens, ready.shape.num_moe_layers, ready.shape.top_k), np.uint16)
    table = PathTable(sequence=sequence, position=position, experts=guess)
    latency = PathLatency(device="x", prompt_tokens=4, points=((1, 3.0, 2.0), (4, 3.0, 2.0)))
    ready = replace(
        ready,
        workload=ready.workload.with_paths(table),
        path_costs=PathCosts(pass_s={"prefill": 0.5, "decode": 0.25}, latency=latency),
    )

    alone = ready.predict(make_spec(slots=8, scheduler="path_similarity"))
    both = ready.predict(make_spec(slots=8, scheduler="path_similarity", predictor="path"))

    # Two units of two batches; five decode steps each, and the prompts of a unit read once.
    assert alone.regrouping.decision_s == pytest.approx(2 * 3.0 + 2 * 5 * 2.0, rel=0.01)
    assert both.regrouping.decision_s == alone.regrouping.decision_s
    prompts = 4 * 0.5
    assert both.time.lookahead_s == pytest.approx(prompts, rel=0.05)


def test_simulate_takes_a_scheduler_and_its_parameters(batched, capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "simulate",
                str(batched.path),
                "--scheduler",
                "route_similarity",
                "--scheduler-param",
                "every=2",
            ]
        )

    assert not stop.value.code
    assert "route_similarity(every=2)" in capsys.readouterr().out


def test_a_bound_cannot_be_deployed():
    with pytest.raises(UsageError, match=r"scheduler 'route_oracle'.*cannot be deployed"):
        make_spec(slots=4, scheduler="route_oracle").build_scheduler()


def test_costs_of_moving_rows_are_never_negative_and_fit_what_was_measured():
    points = [
        (rows, size * rows, 1e-6 * rows + 1e-9 * size * rows)
        for rows in (1, 2, 4)
        for size in (1e3, 1e5)
    ]

    assert fit_kv_move(points).weights == pytest.approx((1e-6, 1e-9))
    assert fit_kv_move([(1, 10.0, 1.0), (2, 20.0, 2.0), (4, 400.0, 3.0)]).weights[0] >= 0
    measured = measure_host_kv_move(tiny_shape())
    assert min(measured.weights) >= 0
    assert max(measured.weights) > 0


def test_workload_of_a_trace_goes_in_units(batched):
    found = in_units(workload_of(batched), make_spec(slots=4, scheduler="route_oracle")).workload

    assert found.steps.is_decode.sum() == len(passes_of(found))
    assert tokens_of(found, decode=True) == tokens_of(workload_of(batched), decode=True)

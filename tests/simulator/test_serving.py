"""Requests as they arrive, in continuous batches: timelines worked out by hand, and what holds for any of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from expertflow.simulator.account import RunContext, SequenceTimes, summarize, totals_of
from expertflow.simulator.arrivals import Arrival, Arrivals, read_arrivals
from expertflow.simulator.engine import simulate
from expertflow.simulator.policy.base import Waiting
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.report import result_rows
from expertflow.simulator.saturation import Load, ServedTimes, is_saturated, judge_arrivals
from expertflow.simulator.serving import Serving, ServingSettings, serve
from expertflow.simulator.token_table import TokenTable
from expertflow.simulator.workload import Rows, Steps, Workload, build_workload, workload_of
from expertflow.tracer.errors import UsageError
from expertflow.tracer.main import main
from expertflow.tracer.probe import provenance
from expertflow.tracer.store import NO_EXPERT
from hypothesis import given, settings
from hypothesis import strategies as st

SPEC = make_spec(slots=4)


def recorded(*lengths: tuple[int, int], layers: int = 1, weights: bool = False) -> Workload:
    """Sequences of (prompt rows, decode rows), one after the other, whose n-th token of all demands expert n."""
    sizes, owners, is_decode, context = [], [], [], []
    for owner, (prompt, decodes) in enumerate(lengths):
        for place, size in enumerate([prompt] * (prompt > 0) + [1] * decodes):
            sizes.append(size)
            owners.append(owner)
            is_decode.append(prompt == 0 or place > 0)
            context.append(prompt + place)
    steps = len(sizes)
    size, member = np.array(sizes), np.array(owners)
    number = np.arange(steps)
    token = np.arange(size.sum())
    numbers = np.repeat(number, size * layers)
    place = [np.arange(layers).repeat(n) for n in sizes]
    ids = np.concatenate(
        [np.tile(found, layers) for found in np.split(token, np.cumsum(size)[:-1])]
    )
    owner = np.repeat(member, size * layers)
    return build_workload(
        Steps(
            number=number,
            is_decode=np.array(is_decode),
            batch=np.ones(steps, np.int64),
            tokens=size,
            context=np.array(context),
            member_ptr=np.arange(steps + 1),
            members=member,
        ),
        numbers,
        np.concatenate(place),
        Rows(
            experts=ids[:, None].astype(np.uint16),
            sequence=owner.astype(np.int32),
            weights=(ids[:, None] / 7).astype(np.float16) if weights else None,
        ),
        prompt_tokens={n: prompt for n, (prompt, _) in enumerate(lengths)},
        batch_size=1,
        num_layers=layers,
        num_experts=int(size.sum()),
        lookahead=0,
    )


def at(*times: float) -> Arrivals:
    return Arrivals(requests=tuple(Arrival(time_s) for time_s in times), description="by hand")


def serving_of(workload: Workload, arrivals: Arrivals, **settings) -> Serving:
    return serve(workload, SPEC, arrivals, ServingSettings(**{"max_batch": 8, **settings}))


def walk(serving: Serving, durations: Sequence[float] = (1.0,)) -> list[tuple[float, Workload]]:
    """Run to the end with passes of these durations, over and over; returns when each began, and each."""
    now_s, found = 0.0, []
    while (answer := serving.next(now_s)) is not None:
        if isinstance(answer, float):
            assert answer > 0
            now_s += answer
            continue
        workload, place = answer
        assert place == 0
        found.append((now_s, workload))
        now_s += durations[(len(found) - 1) % len(durations)]
        serving.ended(now_s)
    return found


def fed(workload: Workload) -> list[tuple[int, int]]:
    """(request, token) of a pass, by its first layer's rows."""
    rows = slice(0, int(workload.row_ptr[1]))
    return list(
        zip(
            workload.rows.sequence[rows].tolist(),
            workload.rows.experts[rows, 0].tolist(),
            strict=True,
        )
    )


def token_s(serving: Serving) -> list[tuple[float, ...]]:
    return [found.token_s for found in serving.sequences()]


def assert_same(one: Workload, other: Workload) -> None:
    for name in ("event_ptr", "layer", "ptr", "experts", "counts", "weights", "row_ptr"):
        left, right = getattr(one, name), getattr(other, name)
        assert np.array_equal(left, right), name
        assert left is None or left.dtype == right.dtype, name
    for name in ("number", "is_decode", "batch", "tokens", "context", "member_ptr", "members"):
        assert np.array_equal(getattr(one.steps, name), getattr(other.steps, name)), name
    assert np.array_equal(one.rows.experts, other.rows.experts)
    assert np.array_equal(one.rows.sequence, other.rows.sequence)
    assert one.rows.lookahead.keys() == other.rows.lookahead.keys()
    for depth, ids in one.rows.lookahead.items():
        assert np.array_equal(ids, other.rows.lookahead[depth])


# --- the routing of single tokens --------------------------------------------------------------


def test_the_table_holds_every_token_of_a_trace_in_order_without_padding(trace):
    found, table = trace.routing_arrays(), TokenTable.of(workload_of(trace))

    assert found.is_pad.any()
    assert table.num_sequences == 8
    assert not table.has_holes
    for sequence in range(8):
        tokens = range(*table.first[sequence : sequence + 2].tolist())
        for layer in range(trace.shape.num_moe_layers):
            rows = np.flatnonzero(
                (found.sequence == sequence) & (found.layer == layer) & ~found.is_pad
            )
            rows = rows[np.argsort(found.position[rows])]
            assert np.array_equal(table.experts[tokens, layer], found.experts[rows])
            assert np.array_equal(table.weights[tokens, layer], found.weights[rows])
            assert np.array_equal(table.lookahead[1][tokens, layer], found.lookahead[1][rows])
        prompt = (~found.phase_is_decode[rows]).sum()
        assert table.prompts[sequence] == prompt == workload_of(trace).prompt_tokens[sequence]


def test_a_layer_that_recorded_fewer_rows_has_holes_and_demands_nothing_for_them():
    whole = recorded((3, 1), (2, 2), layers=2)
    is_kept = np.ones(len(whole.rows.experts), bool)
    is_kept[3:6] = False  # the second layer's rows of the first prompt
    step = np.repeat(
        np.repeat(whole.steps.number, np.diff(whole.event_ptr)), np.diff(whole.row_ptr)
    )
    layer = np.repeat(whole.layer, np.diff(whole.row_ptr))
    workload = build_workload(
        whole.steps, step[is_kept], layer[is_kept], whole.rows.take(np.flatnonzero(is_kept)),
        prompt_tokens=whole.prompt_tokens, batch_size=1, num_layers=2, num_experts=8, lookahead=0,
    )  # fmt: skip

    table = TokenTable.of(workload)
    (_, first), *_ = walk(serving_of(workload, at(0.0, 0.0)))

    assert table.has_holes
    assert table.experts[:4, :, 0].tolist() == [
        [0, NO_EXPERT],
        [1, NO_EXPERT],
        [2, NO_EXPERT],
        [3, 3],
    ]
    assert first.event(0).experts == (0, 1, 2, 4, 5)
    assert first.event(1).experts == (4, 5)


@pytest.mark.parametrize("lengths", ["trace", "arrivals"])
def test_one_pass_is_what_the_builder_of_workloads_makes_of_it(trace, lengths):
    requests = tuple(Arrival(0.0, 3 + n % 5, 2 + n % 7) for n in range(20))
    arrivals = Arrivals(requests=requests, description="", users=5)
    chosen = ServingSettings(max_batch=4, max_step_tokens=9, lengths=lengths)
    table = TokenTable.of(workload_of(trace))

    ahead = serve(table, SPEC, arrivals, chosen).closed_workload()
    passes = [workload for _, workload in walk(serve(table, SPEC, arrivals, chosen))]

    assert len(ahead.steps) == len(passes)
    assert ahead.weights is not None
    assert ahead.rows.lookahead.keys() == {1}
    for place, one in enumerate(passes):
        assert_same(one, ahead.select(np.array([place])))


def test_one_pass_with_holes_is_what_the_builder_makes_of_it(steps_of):
    workload = steps_of([[(0, 1), ()], [(2,), (3,)], [(), (1, 2)]])
    loop = read_arrivals("closed:2", limit=3)

    ahead = serving_of(workload, loop).closed_workload()
    passes = [one for _, one in walk(serving_of(workload, loop))]

    for place, one in enumerate(passes):
        assert_same(one, ahead.select(np.array([place])))


def test_requests_all_there_at_once_and_of_one_length_run_as_they_were_recorded(trace):
    workload = workload_of(trace)
    steps = workload.select(np.flatnonzero(workload.steps.is_decode))
    batch = steps.select(np.arange(11))  # the first batch of two, eleven decode passes

    (_, first), *rest = walk(serving_of(batch, at(0.0, 0.0)))

    assert len(rest) == 10
    for place, one in enumerate([first, *(one for _, one in rest)]):
        same = batch.select(np.array([place]))
        assert np.array_equal(one.experts, same.experts)
        assert np.array_equal(one.counts, same.counts)
        assert np.array_equal(one.weights, same.weights)


# --- timelines by hand: every pass takes a second ----------------------------------------------


def test_a_request_waits_for_its_turn_and_its_times_count_from_its_arrival(machine):
    serving = serving_of(recorded((0, 3), (0, 2)), at(0.0, 0.5), max_batch=1)

    record = simulate(serving, SPEC, tiny_shape(1, 5), machine(mixer=1.0))

    assert record.sequences == [
        SequenceTimes(0, 0, (1.0, 2.0, 3.0), is_request=True),
        SequenceTimes(1, 0, (3.5, 4.5), is_request=True),
    ]
    assert record.steps["batch"][1::2] == [1] * 5


def test_a_request_joins_at_the_next_pass_and_another_leaves_without_stopping_it(machine):
    serving = serving_of(recorded((0, 3), (0, 4)), at(0.0, 0.5), max_batch=2)

    record = simulate(serving, SPEC, tiny_shape(1, 7), machine(mixer=1.0))

    assert record.sequences[1].token_s == (1.5, 2.5, 3.5, 4.5)
    assert record.steps["batch"][1::2] == [1, 2, 2, 1, 1]


def test_the_machine_waits_for_the_next_arrival(machine):
    serving = serving_of(recorded((0, 2), (0, 1)), at(0.0, 7.25))

    record = simulate(serving, SPEC, tiny_shape(1, 3), machine(mixer=1.0))

    assert record.steps["start_s"][1::2] == [0.0, 1.0, 7.25]
    assert record.sequences[1].token_s == (1.0,)
    assert serving.result().utilization == 3.0 / 8.25


def test_a_long_prompt_goes_in_by_chunks_and_its_last_one_gives_the_first_token():
    serving = serving_of(recorded((5, 1)), at(0.0), max_batch=1, max_step_tokens=2)

    passes = [one for _, one in walk(serving)]

    assert [fed(one) for one in passes] == [
        [(0, 0), (0, 1)],
        [(0, 2), (0, 3)],
        [(0, 4)],
        [(0, 5)],
    ]
    assert [one.step(0).phase for one in passes] == ["prefill"] * 3 + ["decode"]
    assert [one.step(0).context for one in passes] == [2, 4, 5, 6]
    assert [one.step(0).sequences for one in passes] == [(), (), (0,), (0,)]
    assert serving.sequences() == [SequenceTimes(0, 5, (3.0, 4.0), is_request=True)]


def test_a_prompt_shares_passes_with_those_who_generate():
    serving = serving_of(recorded((2, 4), (3, 1)), at(0.0, 1.0), max_step_tokens=2, max_batch=2)

    passes = [fed(one) for _, one in walk(serving)]

    # One token a pass is left for the second prompt while the first request generates.
    assert passes == [
        [(0, 0), (0, 1)],
        [(0, 2), (1, 6)],
        [(0, 3), (1, 7)],
        [(0, 4), (1, 8)],
        [(0, 5), (1, 9)],
    ]
    assert token_s(serving) == [(1.0, 2.0, 3.0, 4.0, 5.0), (3.0, 4.0)]
    assert serving.result().mixed_tokens == 3


def test_prompts_go_first_if_asked_to():
    serving = serving_of(
        recorded((2, 2), (3, 1)), at(0.0, 1.0), max_step_tokens=2, max_batch=2, mixed=False
    )

    passes = [fed(one) for _, one in walk(serving)]

    assert passes == [
        [(0, 0), (0, 1)],
        [(1, 4), (1, 5)],
        [(1, 6)],
        [(0, 2), (1, 7)],
        [(0, 3)],
    ]
    assert token_s(serving) == [(1.0, 4.0, 5.0), (2.0, 3.0)]
    assert serving.result().mixed_tokens == 0


def test_requests_take_the_recorded_sequences_in_turn():
    serving = serving_of(recorded((0, 1), (0, 2)), at(0.0, 10.0, 20.0, 30.0))

    assert [fed(one)[0] for _, one in walk(serving)] == [
        (0, 0), (1, 1), (1, 2), (2, 0), (3, 1), (3, 2),
    ]  # fmt: skip


def test_a_pass_says_how_large_it_is():
    serving = serving_of(recorded((4, 2), (1, 3)), at(0.0, 1.0))

    steps = [one.step(0) for _, one in walk(serving)]

    assert [(s.step, s.batch, s.tokens, s.context) for s in steps] == [
        (0, 1, 4, 4), (1, 2, 2, 5), (2, 2, 2, 6), (3, 1, 1, 3), (4, 1, 1, 4),
    ]  # fmt: skip


# --- lengths from the arrivals -----------------------------------------------------------------


def test_lengths_of_the_arrivals_cut_or_repeat_what_was_recorded():
    requests = (Arrival(0.0, 1, 2), Arrival(50.0, 3, 4))
    serving = serving_of(
        recorded((2, 2), (2, 2)), Arrivals(requests=requests, description=""), lengths="arrivals"
    )

    tokens = [token for _, one in walk(serving) for _, token in fed(one)]

    # The first uses one prompt row of two and one decode row of two; the second needs three of two, both times.
    assert tokens == [0, 2, 4, 5, 4, 6, 7, 6]
    assert [(len(s.token_s), s.prompt_tokens) for s in serving.sequences()] == [(2, 1), (4, 3)]
    assert "1 of 2 need more tokens than were recorded" in serving.warnings[0]


def test_without_recorded_prompts_their_length_is_context_only():
    serving = serving_of(
        recorded((0, 2)),
        Arrivals(requests=(Arrival(0.0, 100, 3),), description=""),
        lengths="arrivals",
    )

    passes = [one for _, one in walk(serving)]

    assert [one.step(0).context for one in passes] == [101, 102, 103]
    assert [token for one in passes for _, token in fed(one)] == [0, 1, 0]
    assert "their passes are not run" in serving.warnings[1]


def test_lengths_of_arrivals_that_have_none_are_refused():
    with pytest.raises(UsageError, match="say nothing about lengths"):
        serving_of(recorded((0, 1)), at(0.0), lengths="arrivals")


# --- anything goes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """Any requests over any sequences, with any settings, and passes of any duration."""

    lengths: list[tuple[int, int]]
    gaps: list[float]
    settings: ServingSettings
    durations: list[float]
    users: int | None = None

    @property
    def arrivals(self) -> Arrivals:
        times = np.cumsum(self.gaps).tolist()
        requests = tuple(Arrival(time_s) for time_s in times)
        return Arrivals(requests=requests, description="any", users=self.users)

    def rows(self, request: int) -> list[int]:
        """What a request should feed: its sequence's expert numbers."""
        sizes = [prompt + decodes for prompt, decodes in self.lengths]
        place = request % len(sizes)
        return list(range(sum(sizes[:place]), sum(sizes[: place + 1])))


@st.composite
def servings(draw: st.DrawFn) -> Given:
    has_prompts = draw(st.booleans())
    prompt = st.integers(1, 6) if has_prompts else st.just(0)
    decodes = st.integers(0 if has_prompts else 1, 5)
    max_batch = draw(st.integers(1, 4))
    seconds = st.sampled_from((0.0, 0.1, 0.7, 1.0, 3.3))
    return Given(
        draw(st.lists(st.tuples(prompt, decodes), min_size=1, max_size=4)),
        draw(st.lists(seconds, min_size=1, max_size=9)),
        ServingSettings(
            max_batch=max_batch,
            max_step_tokens=max_batch + draw(st.integers(0, 4)),
            mixed=draw(st.booleans()),
        ),
        draw(st.lists(st.sampled_from((0.1, 0.7, 1.0)), min_size=1, max_size=3)),
        draw(st.none() | st.integers(1, 6)),
    )


@settings(max_examples=200, deadline=None)
@given(case=servings())
def test_every_token_of_every_request_is_fed_once_and_in_order(case):
    serving = serve(recorded(*case.lengths), SPEC, case.arrivals, case.settings)

    passes = walk(serving, case.durations)

    by_request: dict[int, list[int]] = {}
    for _, one in passes:
        for request, token in fed(one):
            by_request.setdefault(request, []).append(token)
    assert by_request == {number: case.rows(number) for number in range(len(case.gaps))}
    for found in serving.sequences():
        prompt, decodes = case.lengths[found.sequence % len(case.lengths)]
        assert len(found.token_s) == decodes + (prompt > 0)
        assert found.prompt_tokens == prompt
        assert list(found.token_s) == sorted(found.token_s)


@settings(max_examples=200, deadline=None)
@given(case=servings())
def test_passes_keep_to_the_limits_and_nobody_waits_while_there_is_room(case):
    serving = serve(recorded(*case.lengths), SPEC, case.arrivals, case.settings)

    passes = walk(serving, case.durations)

    left = {number: len(case.rows(number)) for number in range(len(case.gaps))}
    arrived = [request.time_s for request in case.arrivals.requests]
    issued = case.users
    for now_s, one in passes:
        if case.users is None:
            there = {n for n, count in left.items() if count and arrived[n] <= now_s}
        else:
            there = {n for n, count in left.items() if count and n < issued}
        rows = fed(one)
        working = {request for request, _ in rows}
        step = one.step(0)
        assert step.tokens == len(rows) <= case.settings.max_step_tokens
        assert 1 <= step.batch == len(working) <= case.settings.max_batch
        assert working <= there
        if case.settings.mixed:
            is_full = len(rows) == case.settings.max_step_tokens
            assert is_full or len(working) == min(len(there), case.settings.max_batch)
        for request, _ in rows:
            left[request] -= 1
        if case.users is not None:
            issued += sum(left[request] == 0 for request in working)
    assert not any(left.values())


@settings(max_examples=200, deadline=None)
@given(case=servings())
def test_first_come_is_first_served_and_no_token_comes_before_its_request(case):
    serving = serve(recorded(*case.lengths), SPEC, case.arrivals, case.settings)

    passes = walk(serving, case.durations)

    begun: dict[int, float] = {}
    for now_s, one in passes:
        for request, _ in fed(one):
            begun.setdefault(request, now_s)
    order = [begun[request] for request in range(len(case.gaps))]
    assert order == sorted(order)
    if case.users is None:
        assert all(b >= a.time_s for b, a in zip(order, case.arrivals.requests, strict=True))
    assert all(found.token_s[0] > 0 for found in serving.sequences())


@settings(max_examples=100, deadline=None)
@given(case=servings())
def test_the_machine_idles_only_when_everybody_who_arrived_is_finished(case):
    case = replace(case, users=None)
    serving = serve(recorded(*case.lengths), SPEC, case.arrivals, case.settings)

    passes = walk(serving, case.durations)

    ends = [
        now_s + case.durations[place % len(case.durations)]
        for place, (now_s, _) in enumerate(passes)
    ]
    finish = {s.sequence: s.token_s[-1] for s in serving.sequences()}
    times = [request.time_s for request in case.arrivals.requests]
    for end_s, (start_s, _) in zip(ends, passes[1:], strict=False):
        if start_s > end_s:
            assert start_s == pytest.approx(min(t for t in times if t > end_s))
            assert all(
                times[n] + finish[n] <= end_s + 1e-9 for n, t in enumerate(times) if t <= end_s
            )


# --- closed loops ------------------------------------------------------------------------------


def test_a_closed_loop_keeps_its_users_at_work():
    serving = serving_of(recorded((0, 2), (0, 3)), read_arrivals("closed:2", limit=5))

    passes = [fed(one) for _, one in walk(serving)]

    assert [[request for request, _ in one] for one in passes] == [
        [0, 1], [0, 1], [1, 2], [2, 3], [3, 4], [3, 4],
    ]  # fmt: skip
    # Request 2 arrives when 0 is finished, at 2; 3 when 1 is, at 3; 4 when 2 is, at 4.
    assert token_s(serving) == [(1, 2), (1, 2, 3), (1, 2), (1, 2, 3), (1, 2)]
    assert serving.result().queue.mean == 0.0


def test_users_beyond_the_largest_batch_queue():
    serving = serving_of(recorded((0, 2)), read_arrivals("closed:2", limit=3), max_batch=1)

    walk(serving)

    assert token_s(serving) == [(1, 2), (3, 4), (3, 4)]
    assert serving.result().queue.mean == pytest.approx(4 / 3)


@settings(max_examples=60, deadline=None)
@given(case=servings(), users=st.integers(1, 6))
def test_a_closed_loop_worked_out_ahead_is_the_one_that_runs(machine, case, users):
    case = replace(case, users=users)
    workload = recorded(*case.lengths, layers=2, weights=True)
    table, shape = TokenTable.of(workload), tiny_shape(2, workload.num_experts)
    costs = machine(copy=0.3, mixer=0.7, experts=0.1, head=0.2)
    live, planned = (serve(table, SPEC, case.arrivals, case.settings) for _ in range(2))

    first = simulate(live, SPEC, shape, costs)
    second = simulate(planned.closed_workload(), SPEC, shape, costs)

    assert first.steps == second.steps
    assert first.log == second.log
    assert first.copies == second.copies
    assert first.sequences == second.sequences
    assert first.memory == second.memory
    columns = second.steps
    is_whole = np.asarray(columns["layer"]) < 0
    planned.retime(np.asarray(columns["total_s"])[is_whole])
    one, other = live.result(), planned.result()
    assert one.span_s == pytest.approx(other.span_s)
    assert one.queue.mean == pytest.approx(other.queue.mean)
    assert (one.mean_batch, one.mixed_tokens) == (other.mean_batch, other.mixed_tokens)


def test_a_closed_loop_worked_out_ahead_takes_bounds(machine):
    workload = serving_of(
        recorded((0, 4), (0, 3)), read_arrivals("closed:2", limit=6)
    ).closed_workload()
    spec = make_spec(slots=4, cache="belady", predictor="oracle")

    record = simulate(workload, spec, tiny_shape(1, 7), machine(copy=1.0, mixer=1.0))

    assert len(record.sequences) == 6


def test_times_of_requests_survive_a_selection_of_passes():
    serving = serving_of(recorded((4, 1)), read_arrivals("closed:1", limit=2), max_step_tokens=8)
    workload = serving.closed_workload()

    assert workload.arrived == {0: 0, 1: 2}
    assert workload.select(np.array([2, 3])).prompt_tokens == {1: 4}


def test_a_policy_that_knows_the_future_cannot_run_with_arrivals(machine):
    serving = serving_of(recorded((0, 2)), at(0.0))
    spec = make_spec(slots=2, cache="belady")

    with pytest.raises(UsageError, match="depends on the clock"):
        simulate(serving, spec, tiny_shape(1, 2), machine())
    with pytest.raises(UsageError, match="closed:USERS"):
        serving.closed_workload()


# --- schedulers and settings -------------------------------------------------------------------


class Shortest:
    """Shortest prompt first."""

    name = "shortest"
    needs = frozenset()
    is_lossless = True

    def pick(self, waiting: Sequence[Waiting], limit: int) -> Sequence[int]:
        return sorted(range(len(waiting)), key=lambda n: waiting[n].prompt_tokens)[:limit]


class Greedy(Shortest):
    def pick(self, waiting: Sequence[Waiting], limit: int) -> Sequence[int]:
        return range(limit + 1)


class Twice(Shortest):
    def pick(self, waiting: Sequence[Waiting], limit: int) -> Sequence[int]:
        return [0, 0]


class Nobody(Shortest):
    def pick(self, waiting: Sequence[Waiting], limit: int) -> Sequence[int]:
        return []


class Stranger(Shortest):
    def pick(self, waiting: Sequence[Waiting], limit: int) -> Sequence[int]:
        return [len(waiting)]


def with_scheduler(scheduler, *lengths, **settings) -> Serving:
    chosen = ServingSettings(**{"max_batch": 2, **settings})
    return Serving(TokenTable.of(recorded(*lengths)), at(*[0.0] * len(lengths)), scheduler, chosen)


def test_the_scheduler_says_who_joins():
    serving = with_scheduler(Shortest(), (5, 1), (2, 1), (3, 1), max_batch=1)

    walk(serving)

    assert token_s(serving) == [(5, 6), (1, 2), (3, 4)]


@pytest.mark.parametrize("scheduler", [Greedy(), Twice(), Nobody(), Stranger()])
def test_a_scheduler_that_picks_what_it_may_not_is_named(scheduler):
    with pytest.raises(
        UsageError, match=r"'shortest' picked positions .* of 3 waiting; expected 1 to 2"
    ):
        walk(with_scheduler(scheduler, (1, 1), (1, 1), (1, 1)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_batch": 0}, "at least 1, got 0"),
        ({"max_batch": 4, "max_step_tokens": 3}, "each of 4 sequences"),
        ({"max_batch": 4, "lengths": "arrival"}, "Did you mean 'arrivals'"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, said):
    with pytest.raises(UsageError, match=said):
        ServingSettings(**given)


# --- what a run gave ---------------------------------------------------------------------------


def judged(arrived, begun, finished, **load) -> object:
    known = {"users": None, "busy_s": 1.0, "mean_batch": 1.0, "mixed_tokens": 0}
    times = ServedTimes(*(np.array(values, dtype=float) for values in (arrived, begun, finished)))
    return judge_arrivals(times, Load(description="by hand", **{**known, **load}))


def test_rates_and_queueing_times_are_those_worked_out_by_hand():
    found = judged([0, 1, 2, 3, 4], [0, 1, 4, 5, 8], [4, 5, 6, 7, 10], busy_s=7.0)

    assert (found.requests, found.span_s, found.utilization) == (5, 10.0, 0.7)
    assert (found.offered_per_s, found.served_per_s) == (1.0, 0.5)
    # Delays 0, 0, 2, 2, 4; in service for 4, 4, 2, 2, 2.
    assert (found.queue.mean, found.queue.p50) == (1.6, 2.0)
    assert found.queue.p95 == pytest.approx(3.6)
    assert found.queue.p99 == pytest.approx(3.92)
    assert found.service_s == 2.8


def test_requests_that_all_come_at_once_are_no_rate():
    found = judged([0, 0, 0], [0, 1, 2], [1, 2, 3])

    assert not found.saturated
    assert found.offered_per_s == 0.0
    assert found.finding == "All 3 requests arrive at once; 1/s are served."


def test_a_closed_loop_is_never_saturated():
    found = judged([0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], users=2)

    assert not found.saturated
    assert found.finding.startswith("Closed loop: 2 requests in flight")


def test_few_requests_are_said_to_be_few():
    assert "too few to be sure" in judged([0, 1], [0, 1], [1, 2]).finding


def test_nothing_arrived_is_zeros():
    found = judged([], [], [])

    assert (found.requests, found.span_s, found.served_per_s) == (0, 0.0, 0.0)


def test_a_queue_that_grows_is_saturation_and_one_that_stays_is_not():
    arrived = np.arange(60.0)
    noise = np.random.default_rng(0).random(60)
    grows = arrived + 0.2 * arrived + noise
    stays = arrived + 5 + noise

    assert is_saturated(ServedTimes(arrived, grows, grows + 2))
    assert not is_saturated(ServedTimes(arrived, stays, stays + 2))


def test_requests_that_leave_more_slowly_than_they_come_are_saturation():
    # The delay rises to 5.4 s only, while a request is 10 s in service; but they leave at 0.94 of the rate.
    arrived = np.arange(90.0)
    begun = arrived + 0.06 * arrived
    fast = arrived + 0.004 * arrived

    assert is_saturated(ServedTimes(arrived, begun, begun + 10))
    assert not is_saturated(ServedTimes(arrived, fast, fast + 10))


def served_at(load: float, form: str, *, seed: int = 0, max_batch: int = 4, count: int = 200):
    """Requests of 10 tokens at a share of what the machine can serve, a second per pass."""
    rate = load * max_batch / 10
    text = f"poisson:{rate}" if form == "poisson" else f"every:{1 / rate}"
    serving = serving_of(
        recorded((0, 10)), read_arrivals(text, limit=count, seed=seed), max_batch=max_batch
    )
    walk(serving)
    return serving.result()


@pytest.mark.parametrize("form", ["poisson", "every"])
@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_twice_the_capacity_is_saturated_and_half_of_it_is_not(form, max_batch, seed):
    double = served_at(2.0, form, seed=seed, max_batch=max_batch)
    half = served_at(0.5, form, seed=seed, max_batch=max_batch)

    assert double.saturated
    assert double.served_per_s == pytest.approx(max_batch / 10, rel=0.05)
    assert double.finding.startswith("Saturated: requests arrive at")
    assert not half.saturated
    assert half.utilization * half.mean_batch < 0.7 * max_batch
    assert half.finding.startswith("Keeps up")


def test_a_little_too_much_is_saturated_in_the_long_run():
    assert served_at(1.15, "every").saturated
    assert not served_at(0.95, "every").saturated


def context(max_batch: int) -> RunContext:
    return RunContext(
        source="predicted", spec=SPEC, shape=tiny_shape(1, 8), trace_id="t", device="d", link="l",
        link_origin="declared", batch_size=max_batch, provenance=provenance(0, "imported"),
    )  # fmt: skip


def test_a_result_counts_first_tokens_from_arrivals_and_throughput_with_idle_time(machine):
    serving = serving_of(recorded((0, 3), (0, 2)), at(0.0, 0.5, 20.0), max_batch=1)

    record = simulate(serving, SPEC, tiny_shape(1, 8), machine(mixer=1.0))
    result = summarize(record, context(1), arrivals=serving.result())

    # First tokens after 1, 3.5 and 1 s though nothing had a prompt; then one a second.
    assert (result.ttft.mean, result.ttft.p50) == (pytest.approx(5.5 / 3), 1.0)
    assert result.ttft.p95 == pytest.approx(3.25)
    assert result.ttft.p99 == pytest.approx(3.45)
    assert (result.tpot.p50, result.tpot.p99) == (1.0, 1.0)
    assert result.tokens_per_s == pytest.approx(8 / 23.0)
    assert result.time.total_s == 8.0
    assert result.decode.tokens == 8
    assert result.arrivals is not None
    assert result.arrivals.span_s == 23.0


def test_tokens_generated_beside_prompts_do_not_count_as_decode(machine):
    serving = serving_of(recorded((2, 4), (3, 1)), at(0.0, 1.0), max_step_tokens=2, max_batch=2)

    record = simulate(serving, SPEC, tiny_shape(1, 10), machine(mixer=1.0))
    result = summarize(record, context(2), arrivals=serving.result())

    # Seven tokens: two first ones, three beside the second prompt, two in the last pass.
    assert (result.decode.steps, result.decode.tokens, result.prefill.tokens) == (1, 2, 5)


def test_the_table_for_people_holds_the_percentiles_and_the_finding(machine):
    serving = serving_of(recorded((0, 3), (0, 2)), at(0.0, 0.5, 20.0), max_batch=1)
    record = simulate(serving, SPEC, tiny_shape(1, 8), machine(mixer=1.0))

    rows = dict(result_rows(summarize(record, context(1), arrivals=serving.result())))

    assert rows["first token"] == "1.83 s mean, p50 1 s, p95 3.25 s, p99 3.45 s"
    assert rows["arrivals"] == "by hand: 3 requests"
    assert rows["queue"].startswith("833 ms mean, p50 0 s")
    assert rows["load"] == "passes run 35% of 23 s, 1.0 sequences each"
    assert rows["finding"].startswith("Keeps up: requests arrive at 0.1/s")


# --- both engines, and the command -------------------------------------------------------------


@pytest.mark.parametrize("predictor", ["none", "gate_lookahead"])
@pytest.mark.parametrize("form", ["poisson:20", "closed:3"])
def test_both_engines_serve_alike_to_the_last_bit(trace, machine, form, predictor):
    compiled = pytest.importorskip("expertflow.simulator.compiled.server")
    workload = workload_of(trace)
    spec = make_spec(slots=20, predictor=predictor)
    costs = machine(
        copy=0.003, mixer=0.001, experts=0.002, head=0.001, chunks=4,
        expert_bytes=trace.shape.expert_bytes,
    )  # fmt: skip
    table, arrivals = TokenTable.of(workload), read_arrivals(form, limit=12)
    chosen = ServingSettings(max_batch=4, max_step_tokens=8)

    servings = [serve(table, spec, arrivals, chosen) for _ in range(2)]
    one = totals_of(simulate(servings[0], spec, trace.shape, costs))
    other = compiled.serve(servings[1], spec, trace.shape, costs)

    assert one.sequences == other.sequences
    assert servings[0].result() == servings[1].result()
    assert np.array_equal(one.steps.hits, other.steps.hits)
    assert np.array_equal(one.steps.bytes_moved, other.steps.bytes_moved)


@pytest.fixture
def command(capsys):
    """Run a command line; returns its exit code, stdout and stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        streams = capsys.readouterr()
        return int(stop.value.code or 0), streams.out, streams.err

    return run


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--max-batch", 3), 2, "add --arrivals"),
        (("--arrivals", "poison:3"), 2, "Did you mean 'poisson'"),
        (("--arrivals", "gone.csv"), 3, "gone.csv cannot be read"),
        (("--arrivals", "closed:2", "--prefill", "last"), 2, "Known: first, mixed"),
        (("--arrivals", "closed:2", "--lengths", "mine"), 2, "Known: arrivals, trace"),
        (("--arrivals", "poisson:1", "--cache", "belady"), 2, "depends on the clock"),
    ],
)
def test_options_about_arrivals_that_cannot_be_end_with_their_code(
    command, trace, options, code, said
):
    found, _, errors = command("simulate", trace.path, *options)

    assert (found, said in " ".join(errors.split())) == (code, True)


@pytest.mark.parametrize("form", ["poisson:50", "closed:3"])
def test_simulate_says_how_requests_were_served(command, trace, form):
    code, out, _ = command(
        "simulate", trace.path, "--arrivals", form, "--max-batch", 3, "--requests", 9, "--json"
    )

    document = json.loads(out)
    assert code == 0
    assert document["batch_size"] == 3
    assert document["arrivals"]["requests"] == 9
    assert document["ttft"]["p99"] >= document["ttft"]["p50"] > 0
    assert (document["bounds"]["belady_tokens_per_s"] > 0) == form.startswith("closed")

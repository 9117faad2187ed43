"""Workloads as arrays: what is in them, what is taken out of them, and when their tokens appear."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from expertflow.simulator.policy.base import Facts
from expertflow.simulator.source import recorded_times
from expertflow.simulator.split import split_by_batch
from expertflow.simulator.workload import (
    Rows,
    Steps,
    Workload,
    build_workload,
    ranges,
    workload_of,
)
from expertflow.tracer.store import NO_EXPERT
from expertflow.tracer.types import ExpertKey

NO = NO_EXPERT


def steps_of_sizes(members: Sequence[Sequence[int]], prefills: Sequence[int] = (0,)) -> Steps:
    """Passes 10, 11, …, of the sequences that got a token from each."""
    count = len(members)
    return Steps(
        number=np.arange(10, 10 + count),
        is_decode=np.array([place not in prefills for place in range(count)]),
        batch=np.array([len(some) for some in members]),
        tokens=np.array([3 * len(some) for some in members]),
        context=np.arange(5, 5 + count),
        member_ptr=np.concatenate(([0], np.cumsum([len(some) for some in members]))),
        members=np.array([one for some in members for one in some], dtype=np.int64),
    )


def small() -> Workload:
    """Two passes of two layers, two experts per token of four.

    The first pass has three tokens in layer 0 (one of padding in both experts, one in one) and two in layer 1; the
    second has one token, which reaches layer 1 only.
    """
    rows = Rows(
        experts=np.array([[2, 0], [NO, NO], [2, NO], [1, 3], [3, 1], [0, 3]], dtype=np.uint16),
        sequence=np.array([0, 1, 1, 0, 1, 0]),
        weights=np.array(
            [[0.75, 0.25], [9.0, 9.0], [0.5, 9.0], [0.5, 0.125], [0.25, 1.0], [0.5, 0.5]],
            dtype=np.float16,
        ),
        lookahead={
            1: np.array([[1, 3], [NO, NO], [3, 0], [NO, NO], [NO, NO], [NO, NO]], dtype=np.uint16)
        },
    )
    return build_workload(
        steps_of_sizes([(0, 1), (0,)]),
        np.array([10, 10, 10, 10, 10, 11]),
        np.array([0, 0, 0, 1, 1, 1]),
        rows,
        prompt_tokens={0: 4, 1: 2},
        batch_size=2,
        num_layers=2,
        num_experts=4,
        lookahead=1,
    )


def everything(workload: Workload) -> list[tuple[object, ...]]:
    """All that can be asked of a workload, as plain objects."""
    told: list[tuple[object, ...]] = []
    for step, number in workload.walk():
        event = workload.event(number, is_prefill=step.phase == "prefill")
        told.append((step, event, workload.signals(number, 1, routed=True)))
    return told


# --- building ----------------------------------------------------------------------------------


def test_events_hold_distinct_experts_ascending_with_their_tokens_and_weights():
    workload = small()

    assert workload.num_events == 3
    assert [list(workload.events_of(place)) for place in range(2)] == [[0, 1], [2]]
    first, second, third = (workload.event(number) for number in range(3))
    assert (first.layer, first.experts) == (0, (0, 2))
    assert first.facts == Facts(False, (1, 2), (0.25, 0.75 + 0.5))
    assert (second.layer, second.experts) == (1, (1, 3))
    assert second.facts == Facts(False, (2, 2), (0.5 + 1.0, 0.125 + 0.25))
    assert (third.layer, third.experts, third.facts.tokens) == (1, (0, 3), (1, 1))
    assert workload.event(0, is_prefill=True).facts.is_prefill


def test_steps_say_their_size_and_whose_tokens_they_made():
    first, second = small().step(0), small().step(1)

    assert (first.step, first.phase, first.batch, first.tokens, first.context) == (
        10, "prefill", 2, 6, 5,
    )  # fmt: skip
    assert (first.sequences, second.sequences) == ((0, 1), (0,))
    assert second.phase == "decode"


def test_weights_nobody_recorded_are_none():
    workload = small()
    bare = build_workload(
        workload.steps,
        np.array([10, 10, 10, 10, 10, 11]),
        np.array([0, 0, 0, 1, 1, 1]),
        replace(workload.rows, weights=None),
        prompt_tokens={},
        batch_size=2,
        num_layers=2,
        num_experts=4,
        lookahead=1,
    )

    assert bare.weights is None
    assert bare.event(0).facts == Facts(False, (1, 2), ())
    assert bare.event(0).experts == workload.event(0).experts


def test_signals_tell_whole_predictions_of_layers_that_exist():
    workload = small()

    assert workload.signals(0, 1).lookahead == {1: [[1, 3], [3, 0]]}
    assert workload.signals(0, 0).lookahead == {}
    assert workload.signals(0, 2).lookahead == {1: [[1, 3], [3, 0]]}  # only depth 1 was recorded
    assert workload.signals(1, 1).lookahead == {}  # the last layer
    assert workload.signals(0, 1).routed == ()


def test_signals_tell_what_tokens_chose_to_those_who_ask():
    signals = small().signals(1, 1, routed=True)

    assert signals.routed == [[1, 3], [3, 1]]
    assert signals.sequences == [0, 1]


def test_a_pass_or_an_event_of_padding_alone_demands_nothing():
    rows = Rows(experts=np.full((2, 2), NO, dtype=np.uint16), sequence=np.zeros(2, dtype=int))

    workload = build_workload(
        steps_of_sizes([(), (), (0,)]),
        np.array([10, 12]),
        np.array([0, 0]),
        rows,
        prompt_tokens={},
        batch_size=1,
        num_layers=1,
        num_experts=4,
        lookahead=0,
    )

    assert [list(workload.events_of(place)) for place in range(3)] == [[0], [], [1]]
    assert workload.event(0).experts == workload.event(0).facts.tokens == ()
    assert workload.step(0).sequences == ()
    assert workload.events() == [(), ()]
    assert workload.popularity() == [[0, 0, 0, 0]]
    assert workload.mean_distinct("decode") == 0.0


def test_counts_are_over_all_events():
    workload = small()

    assert workload.events()[0] == (ExpertKey(0, 0), ExpertKey(0, 2))
    assert workload.popularity() == [[1, 0, 1, 0], [1, 1, 0, 2]]
    assert workload.keys().tolist() == [0, 2, 5, 7, 4, 7]
    assert workload.event_is_decode().tolist() == [False, False, True]
    assert (workload.mean_distinct("prefill"), workload.mean_distinct("decode")) == (2.0, 2.0)


def test_routing_of_a_trace_is_told_as_it_was_recorded(trace):
    """Against the rows themselves, counted one by one."""
    workload = workload_of(trace)
    rows: dict[tuple[int, int], list[Mapping[str, object]]] = {}
    for row in trace.table("routing").to_pylist():
        rows.setdefault((row["step"], row["layer"]), []).append(row)

    told = list(workload.walk())

    assert [(step.step, int(workload.layer[number])) for step, number in told] == sorted(rows)
    for step, number in told:
        event, own = workload.event(number), rows[step.step, int(workload.layer[number])]
        chosen = [expert for row in own for expert in row["experts"]]
        assert event.experts == tuple(sorted(set(chosen)))
        assert event.facts.tokens == tuple(chosen.count(expert) for expert in event.experts)
        real = [row["sequence"] for row in own if row["modality"] != "pad"]
        assert sorted(step.sequences) == sorted(set(real))


# --- parts -------------------------------------------------------------------------------------


def test_selected_steps_keep_all_that_is_theirs(trace):
    workload = workload_of(trace)
    places = np.array([5, 2, 3])
    own = {
        number: [told for told in everything(workload) if told[0].step == number]
        for number in workload.steps.number[places].tolist()
    }

    part = workload.select(places)

    assert everything(part) == [told for number in own for told in own[number]]
    assert len(part.rows.experts) == len(part.rows.sequence) == part.row_ptr[-1]
    present = {sequence for place in range(3) for sequence in part.step(place).sequences}
    assert part.prompt_tokens == {s: workload.prompt_tokens[s] for s in present}


def test_selecting_nothing_leaves_a_workload_of_nothing():
    part = small().select(np.array([], dtype=np.int64))

    assert (len(part.steps), part.num_events, part.prompt_tokens) == (0, 0, {})
    assert everything(part) == []
    assert recorded_times(part, np.zeros(0), np.zeros(0)) == []


def test_ranges_list_what_lies_in_intervals_in_the_order_asked_for():
    bounds = np.array([0, 2, 2, 5])

    assert ranges(bounds, np.array([2, 0, 1])).tolist() == [2, 3, 4, 0, 1]
    assert ranges(bounds, np.array([], dtype=np.int64)).tolist() == []


def without_events(members: Sequence[Sequence[int]], prefills: Sequence[int]) -> Workload:
    return build_workload(
        steps_of_sizes(members, prefills),
        np.zeros(0, dtype=np.int64),
        np.zeros(0, dtype=np.int64),
        Rows(experts=np.zeros((0, 2), dtype=np.uint16), sequence=np.zeros(0, dtype=np.int64)),
        prompt_tokens={0: 4, 1: 2, 2: 1},
        batch_size=2,
        num_layers=1,
        num_experts=4,
        lookahead=0,
    )


@pytest.mark.parametrize(
    ("prefills", "learned", "judged"),
    [
        ((0, 2, 4), [10, 11, 14], [12, 13]),
        # Without prompts a batch starts where a sequence is seen first.
        ((), [10, 11, 14], [12, 13]),
    ],
)
def test_every_other_batch_is_learned_from(prefills, learned, judged):
    workload = without_events([(0,), (0,), (1,), (1,), (2,)], prefills)

    learn, judge = split_by_batch(workload)

    assert (learn.steps.number.tolist(), judge.steps.number.tolist()) == (learned, judged)
    assert (set(learn.prompt_tokens), set(judge.prompt_tokens)) == ({0, 2}, {1})


# --- times -------------------------------------------------------------------------------------


def test_each_sequences_clock_starts_with_its_first_pass():
    # Sequence 1 joins in pass 1 and outlives sequence 0; pass 3 makes no token.
    workload = without_events([(0,), (1, 0), (1,), (), (1,)], (0, 1))
    start_s = np.array([0.0, 1.0, 3.0, 6.0, 10.0])
    end_s = np.array([0.5, 2.0, 5.0, 7.0, 15.0])

    zero, one = recorded_times(workload, start_s, end_s)

    assert (zero.sequence, zero.prompt_tokens, zero.token_s) == (0, 4, (0.5, 2.0))
    assert (one.sequence, one.prompt_tokens, one.token_s) == (1, 2, (1.0, 4.0, 14.0))


def test_sequences_of_unknown_prompts_have_none():
    workload = replace(without_events([(7,)], (0,)), prompt_tokens={})

    (only,) = recorded_times(workload, np.array([1.0]), np.array([3.0]))

    assert (only.sequence, only.prompt_tokens, only.token_s) == (7, 0, (2.0,))

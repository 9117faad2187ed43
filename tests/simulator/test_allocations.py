"""How slots are divided over layers: small cases by hand, and the best division by trying all."""

from itertools import accumulate, product

import pytest
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.policy.registry import allocations
from expertflow.simulator.policy.spec import make_spec
from hypothesis import given, settings
from hypothesis import strategies as st

LEARNED = {"marginal_gain": "curves", "adapmoe": "curves", "predicted_demand": "popularity"}


def held(name: str, learned: list[list[int]], experts: int, slots: int) -> list[int]:
    """Slots by layer."""
    member = allocations.build(name, {LEARNED[name]: learned})
    shares = member.divide(len(learned), experts, slots)
    assert [share.layers for share in shares] == [(layer,) for layer in range(len(learned))]
    return [share.slots for share in shares]


def hits(curves: list[list[int]], counts: list[int] | tuple[int, ...]) -> int:
    return sum(curve[count] for curve, count in zip(curves, counts, strict=True))


# --- all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNED)
def test_too_few_slots_become_one_pool(name):
    member = allocations.build(name, {LEARNED[name]: [[0, 1, 2]] * 3})

    (share,) = member.divide(3, 2, 2)

    assert share.layers == (0, 1, 2)
    assert share.slots == 2


@st.composite
def learned_of_any_size(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    layers, experts = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    width = st.integers(0, experts + 2)
    rows = [
        sorted(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
        for n in (draw(width) for _ in range(layers))
    ]
    return rows, experts, draw(st.integers(layers, layers * experts + 2))


@settings(deadline=None)
@given(st.sampled_from(sorted(LEARNED)), learned_of_any_size())
def test_every_slot_that_an_expert_can_fill_is_given(name, case):
    rows, experts, slots = case

    counts = held(name, rows, experts, slots)

    assert all(1 <= count <= experts for count in counts)
    assert sum(counts) == min(slots, experts * len(rows))


# --- marginal gain -----------------------------------------------------------------------------


def test_marginal_gain_gives_each_slot_where_it_adds_most_hits():
    curves = [[0, 5, 8, 9], [0, 4, 8, 9]]

    # One each; then 4 beats 3, then 3 beats 1, then 1 and 1 are equal.
    assert held("marginal_gain", curves, 3, 3) == [1, 2]
    assert held("marginal_gain", curves, 3, 4) == [2, 2]
    assert held("marginal_gain", curves, 3, 5) == [3, 2]


def test_marginal_gain_looks_behind_a_plain():
    # Layer 0 goes round three experts: nothing hits until all three fit.
    assert held("marginal_gain", [[0, 0, 0, 9], [0, 2, 4, 5]], 3, 4) == [3, 1]


# --- adapmoe -----------------------------------------------------------------------------------


def test_adapmoe_sees_a_rise_behind_a_plain():
    assert held("adapmoe", [[0, 0, 0, 9], [0, 2, 4, 5]], 3, 4) == [3, 1]


def test_adapmoe_divides_evenly_what_gains_nothing_lower_layers_first():
    assert held("adapmoe", [[0] * 5] * 3, 4, 8) == [3, 3, 2]
    assert held("adapmoe", [[0, 3, 3, 3, 3], [0, 3, 6, 9, 12], [0, 3, 3, 3, 3]], 4, 7) == [2, 4, 1]


@st.composite
def rising_curves(draw: st.DrawFn, *, concave: bool = False) -> tuple[list[list[int]], int, int]:
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    curves: list[list[int]] = []
    for _ in range(layers):
        gains = draw(st.lists(st.integers(0, 4), min_size=experts, max_size=experts))
        if concave:
            gains.sort(reverse=True)
        curves.append([0, *accumulate(gains)])
    return curves, experts, draw(st.integers(layers, layers * experts))


@settings(deadline=None)
@given(rising_curves())
def test_adapmoe_is_the_best_of_all_divisions_then_the_most_even_then_lower_first(case):
    curves, experts, slots = case
    every = (
        counts
        for counts in product(range(1, experts + 1), repeat=len(curves))
        if sum(counts) == slots
    )

    best = min(every, key=lambda c: (-hits(curves, c), sum(n * n for n in c), c[::-1]))

    assert held("adapmoe", curves, experts, slots) == list(best)


@settings(deadline=None)
@given(rising_curves(concave=True))
def test_marginal_gain_is_as_good_as_adapmoe_on_concave_curves(case):
    curves, experts, slots = case

    greedy = held("marginal_gain", curves, experts, slots)

    assert hits(curves, greedy) == hits(curves, held("adapmoe", curves, experts, slots))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 4), min_size=1, max_size=3))),
    st.integers(3, 15),
)
def test_adapmoe_has_the_hits_its_curves_promise_and_no_fewer_than_an_equal_division(rows, slots):
    shape = tiny_shape(3, 5)

    def run(allocation: str, slots: int, curves: list[list[int]] | None, *only: int) -> int:
        core = make_spec(slots=slots, allocation=allocation, curves=curves).build(shape)
        found = 0
        for step, (layer, experts) in enumerate(rows):
            if layer in (only or (0, 1, 2)):
                found += core.demand(step, layer, sorted(experts)).hits
                core.release(step, layer)
        return found

    # A layer alone in a global pool has what it would have in a pool of its own.
    curves = [
        [0, *(run("global", count, None, layer) for count in range(1, 6))] for layer in range(3)
    ]
    promised = hits(curves, held("adapmoe", curves, 5, slots))

    assert run("adapmoe", slots, curves) == promised
    assert promised >= run("equal", slots, None)


# --- predicted demand --------------------------------------------------------------------------


def test_predicted_demand_follows_the_most_demanded_experts_of_the_model():
    assert held("predicted_demand", [[9, 8, 7, 0], [6, 1, 0, 0]], 4, 4) == [3, 1]


def test_predicted_demand_of_the_papers_example():
    # Predicted are experts 2, 3, 4 of layer 1 and 2, 3 of layer 2, equally: earlier layers first.
    assert held("predicted_demand", [[0, 1, 1, 1], [0, 1, 1, 0]], 4, 4) == [3, 1]


def test_predicted_demand_leaves_no_layer_without_a_slot():
    assert held("predicted_demand", [[9, 8, 7], [1, 1, 1]], 3, 3) == [2, 1]
    assert held("predicted_demand", [[1, 1, 1], [9, 8, 7], [0, 0, 0]], 3, 5) == [1, 3, 1]


def test_predicted_demand_pays_a_layers_first_slot_with_its_most_demanded_expert():
    assert held("predicted_demand", [[9, 0, 0], [5, 4, 3]], 3, 3) == [1, 2]

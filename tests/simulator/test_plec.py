"""PLEC keeps what is planned, nearest need longest, and lets go of what was planned in vain."""

from dataclasses import replace

import pytest
from expertflow.simulator.policy.caches.plec import PLEC
from expertflow.simulator.policy.checked import Dice, tiny_shape
from expertflow.simulator.policy.spec import make_spec
from expertflow.tracer.types import ExpertKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import make_machine, make_steps


def keys(layer: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def core(slots: int, layers: int = 2, experts: int = 4, allocation: str = "global"):
    spec = make_spec(slots=slots, cache="plec", allocation=allocation)
    return spec.build(tiny_shape(layers, experts))


def settled(running, step, planned):
    loads = running.prefetch(step, planned)
    for load in loads:
        running.loaded(step, load.key)
    return [(load.key, load.evicts) for load in loads]


def test_slots_go_to_layers_by_the_plan_and_the_last_expert_gets_the_slot_of_the_first_that_ran():
    # The worked example of the paper: four slots, three experts predicted in the first layer, two in the second.
    running = core(slots=4)

    first = settled(running, 0, [*keys(0, 1, 2, 3), *keys(1, 1, 2)])
    assert [key for key, _ in first] == [*keys(0, 1, 2, 3), *keys(1, 1)]

    running.demand(0, 0, [1, 2, 3])
    assert (
        running.prefetch(0, keys(1, 1, 2)) == []
    )  # its three experts are running in the other slots
    running.release(0, 0)

    (second,) = settled(running, 0, keys(1, 1, 2))
    assert second == (ExpertKey(1, 2), ExpertKey(0, 1))


def test_fixed_slots_per_layer_stay_with_their_layer():
    running = core(slots=4, allocation="equal")

    first = settled(running, 0, [*keys(0, 1, 2, 3), *keys(1, 1, 2)])

    assert [key for key, _ in first] == [*keys(0, 1, 2), *keys(1, 1, 2)]


def test_planned_in_vain_goes_first():
    running = core(slots=3, layers=3)
    running.demand(0, 0, [0])
    running.release(0, 0)
    settled(running, 0, keys(1, 2, 3))
    running.demand(0, 1, [3])  # 2 was planned for this layer, which did without it
    running.release(0, 1)

    (load,) = running.prefetch(0, keys(2, 1))

    assert load.evicts == ExpertKey(1, 2)


def test_a_missing_expert_takes_the_slot_of_the_tail_of_the_plan():
    running = core(slots=2, layers=3)
    settled(running, 0, [*keys(1, 0), *keys(2, 0)])

    answer = running.demand(0, 0, [0])

    assert answer.waves[0].loads[0].evicts == ExpertKey(2, 0)


def test_of_one_layer_the_likeliest_stays_longest():
    running = core(slots=3, layers=2)
    settled(running, 0, keys(1, 2, 0, 1))

    answer = running.demand(0, 0, [0, 1])

    assert [load.evicts for load in answer.waves[0].loads] == keys(1, 1, 0)


def test_what_is_needed_sooner_evicts_what_is_planned_for_later():
    running = core(slots=2, layers=3)
    settled(running, 0, keys(2, 0, 1))

    loads = settled(running, 0, [*keys(1, 0), *keys(2, 0, 1)])

    assert loads == [(ExpertKey(1, 0), ExpertKey(2, 1))]


def test_a_new_word_on_a_layer_replaces_the_old_one():
    cache = PLEC()
    cache.size(3)
    for key in keys(1, 0, 1):
        cache.admit(key)
    cache.expect(keys(1, 0))
    cache.expect(keys(1, 1))

    assert cache.victim(()) == ExpertKey(1, 0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    horizon=st.integers(1, 4),
    allocation=st.sampled_from(["global", "equal"]),
)
def test_both_engines_agree_under_long_plans(seed, horizon, allocation):
    pytest.importorskip("numba")
    from expertflow.simulator.compiled.testing import require_equal

    dice = Dice(seed)
    layers, experts = 1 + dice.below(4), 2 + dice.below(5)
    steps = [
        [dice.some(range(experts), 1 + dice.below(experts)) for _ in range(layers)]
        for _ in range(1 + dice.below(8))
    ]
    spec = make_spec(
        slots=1 + dice.below(layers * experts),
        cache="plec",
        allocation=allocation,
        predictor="synthetic",
        predictor_params={"recall": 0.7, "precision": 0.6, "horizon": horizon, "seed": seed % 1000},
    )
    machine = make_machine(copy=0.3 + dice.below(3), mixer=0.5, experts=0.7, wake=0.1, chunks=2)
    machine = replace(machine, decode=replace(machine.decode, pass_lookahead_s=0.37))

    require_equal(make_steps(steps, experts=experts), spec, tiny_shape(layers, experts), machine)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_nothing_planned_is_evicted_while_something_unplanned_could_go(seed):
    dice = Dice(seed)
    running = core(slots=6, layers=3, experts=5)
    for step in range(6):
        for layer in range(3):
            experts = dice.some(range(5), 1 + dice.below(3))
            running.demand(step, layer, sorted(experts))
            plan = [ExpertKey(la, e) for la in range(layer + 1, 3) for e in dice.some(range(5), 2)]
            resident = {
                k for la in range(3) for k in keys(la, *range(5)) if running.slot_of(k) is not None
            }
            could_go = resident - set(plan) - set(keys(layer, *experts))
            for load in running.prefetch(step, plan):
                if load.evicts is not None and could_go:
                    assert load.evicts in could_go
                    could_go.discard(load.evicts)
                running.loaded(step, load.key)
            running.release(step, layer)

"""Recall and precision of predictors, from what they say and from what was logged."""

import pytest
from expertflow.simulator.accuracy import logged_accuracy, taped_accuracy
from expertflow.simulator.engine import simulate
from expertflow.simulator.policy.checked import Dice, tiny_shape
from expertflow.simulator.policy.log import Entry
from expertflow.simulator.policy.spec import make_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import make_machine, make_steps


def log_of(*rows):
    """Rows of (kind, step, layer, expert)."""
    return [Entry(*row) for row in rows]


def test_an_event_is_held_against_all_that_was_said_of_its_layer_since_the_last():
    log = log_of(
        ("predict", 0, 1, 4),
        ("predict", 0, 1, 5),
        ("predict", 0, 1, 4),
        ("event", 0, 1, 4),
        ("event", 0, 1, 6),
        ("event", 1, 1, 5),
    )

    found = logged_accuracy(log)

    assert found is not None
    assert (found.recall, found.precision) == (1 / 3, 1 / 2)


def test_prefill_is_left_out():
    log = [Entry("predict", 0, 0, 1), Entry("event", 0, 0, 1, is_prefill=True)]

    assert logged_accuracy(log) is None


def test_without_predictions_there_is_no_accuracy():
    assert logged_accuracy(log_of(("event", 0, 0, 1))) is None


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**40), horizon=st.integers(1, 5))
def test_tape_and_log_tell_the_same(seed, horizon):
    pytest.importorskip("numba")
    from expertflow.simulator.compiled.tapes import tape_of

    dice = Dice(seed)
    layers, experts = 1 + dice.below(4), 2 + dice.below(6)
    steps = [
        [dice.some(range(experts), 1 + dice.below(experts)) for _ in range(layers)]
        for _ in range(2 + dice.below(6))
    ]
    params = {"recall": 0.7, "precision": 0.5, "horizon": horizon}
    spec = make_spec(slots=3, predictor="synthetic", predictor_params=params)
    workload, shape = make_steps(steps, experts=experts), tiny_shape(layers, experts)

    logged = logged_accuracy(simulate(workload, spec, shape, make_machine(copy=1.0)).log)
    tape = tape_of(workload, spec)

    assert taped_accuracy(workload, tape.ptr, tape.keys) == logged


def test_an_oracle_is_always_right_after_the_first_layer():
    pytest.importorskip("numba")
    from expertflow.simulator.compiled.tapes import tape_of

    workload = make_steps([[(0, 1), (2,)], [(3,), (1, 2)], [(0,), (5,)]])
    spec = make_spec(slots=3, predictor="oracle")
    tape = tape_of(workload, spec)

    found = taped_accuracy(workload, tape.ptr, tape.keys)

    assert found is not None
    assert (found.recall, found.precision) == (1.0, 1.0)

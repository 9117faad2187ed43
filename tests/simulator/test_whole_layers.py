"""Layer streaming: every layer crosses the link in every pass, and waits for all of it."""

import pytest
from expertflow.simulator.engine import simulate
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.policy.spec import make_spec

from tests.builders import make_machine, make_steps

STEPS = [[(0,), (1,)], [(0,), (2,)], [(0,), (2,)]]


def streamed(slots=8, **costs):
    shape = tiny_shape(2, 4)
    workload = make_steps(STEPS, experts=4)
    spec = make_spec(
        slots=slots,
        cache="fifo",
        allocation="global",
        predictor="whole_layer",
        popularity=workload.popularity(),
    )
    return simulate(workload, spec, shape, make_machine(**costs)), spec, workload, shape


def test_a_layer_waits_for_all_its_experts_whoever_chose_them():
    record, *_ = streamed(slots=8, copy=1.0)

    assert [entry.expert for entry in record.log if entry.kind == "event"][:4] == [0, 1, 2, 3]
    assert record.steps["distinct"][:2] == [4, 4]
    assert record.steps["stall_s"][0] == 4.0


def test_with_two_layers_of_slots_the_next_layer_comes_while_this_one_computes():
    record, *_ = streamed(slots=8, copy=1.0, experts=4.0)

    waits = [
        s
        for s, layer in zip(record.steps["stall_s"], record.steps["layer"], strict=True)
        if layer >= 0
    ]
    assert waits == [4.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_engines_agree_on_it():
    pytest.importorskip("numba")
    from expertflow.simulator.compiled.testing import require_equal

    _, spec, workload, shape = streamed(slots=5, copy=1.0)

    require_equal(workload, spec, shape, make_machine(copy=0.7, experts=0.4, mixer=0.1, chunks=3))

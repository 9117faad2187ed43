"""A policy's own time is found again in the rows of a run that was charged it."""

from dataclasses import replace

import numpy as np
import pytest
from expertflow.runtime.calibrate import has_own_costs
from expertflow.runtime.own_costs import own_costs
from expertflow.simulator.costs import CostModel, Linear
from expertflow.simulator.engine import simulate
from expertflow.simulator.own_costs import OwnCosts, PhaseOwnCosts
from expertflow.simulator.policy.checked import tiny_lessons, tiny_shape
from expertflow.simulator.policy.spec import PolicySpec, make_spec

from tests.builders import make_machine, make_steps

OWN = OwnCosts(
    prefill=PhaseOwnCosts(token_s=2e-4, pass_s=3e-3, decision_s=1e-4, beside_s=2e-3),
    decode=PhaseOwnCosts(event_s=5e-4, pass_s=4e-3, decision_s=3e-4, beside_s=-1e-3),
)
SHAPE = tiny_shape()


def machine() -> CostModel:
    """Every cost that depends on loads does so, so that what they explain has to be taken off."""
    found = make_machine(copy=0.01, mixer=0.02, experts=0.03, decision=0.001)
    phase = replace(
        found.decode,
        mixer=Linear((0.02, 0.0, 0.0, 0.001, 0.0005)),
        experts=Linear((0.03, 0.0, 0.001, 0.0, 0.002, 0.0)),
        decision=Linear((0.001, 1e-4, 2e-4)),
        lookahead=Linear((0.0, 0.0, 3e-4)),
    )
    return replace(found, prefill=phase, decode=phase, num_experts=SHAPE.num_experts)


def workload():
    draw = np.random.default_rng(3)
    width, layers = SHAPE.num_experts, SHAPE.num_moe_layers
    return make_steps(
        [
            [sorted(draw.choice(width, size=2, replace=False).tolist()) for _ in range(layers)]
            for _ in range(12)
        ],
        experts=width,
    )


def spec(predictor: str) -> PolicySpec:
    slots = SHAPE.num_moe_layers * 3
    return make_spec(slots=slots, predictor=predictor, **tiny_lessons(SHAPE))


def found_in(charged: CostModel, *, has_plain: bool) -> OwnCosts:
    costs = machine()
    record = simulate(workload(), spec("popular"), SHAPE, charged)
    plain = simulate(workload(), spec("none"), SHAPE, costs) if has_plain else None
    return own_costs(record, costs, plain)


def test_what_a_run_was_charged_is_found_in_its_rows():
    found = found_in(OWN.charged(machine()), has_plain=True)

    for phase in ("prefill", "decode"):
        wanted, got = getattr(OWN, phase), getattr(found, phase)
        for name in ("event_s", "token_s", "pass_s", "decision_s", "beside_s"):
            assert getattr(got, name) == pytest.approx(getattr(wanted, name), abs=1e-12), name


def test_without_a_plain_run_nothing_is_said_to_run_beside():
    found = found_in(OWN.charged(machine()), has_plain=False)

    assert found.prefill.beside_s == found.decode.beside_s == 0.0
    assert found.decode.event_s == pytest.approx(OWN.decode.event_s)


def test_a_policy_that_takes_no_time_of_its_own_is_charged_none():
    nothing = OwnCosts(prefill=PhaseOwnCosts(), decode=PhaseOwnCosts())

    found = found_in(nothing.charged(machine()), has_plain=True)

    for phase in (found.prefill, found.decode):
        assert [phase.event_s, phase.token_s, phase.pass_s] == pytest.approx([0, 0, 0], abs=1e-12)
        assert [phase.decision_s, phase.beside_s] == pytest.approx([0, 0], abs=1e-12)


def test_an_event_that_lost_its_core_does_not_count():
    charged = OWN.charged(machine())
    record = simulate(workload(), spec("popular"), SHAPE, charged)
    late = list(record.steps["lookahead_s"])
    late[-2] += 10.0
    record = replace(record, steps={**record.steps, "lookahead_s": late})

    found = own_costs(record, machine(), None)

    assert found.decode.event_s == pytest.approx(OWN.decode.event_s, rel=0.2)


@pytest.mark.parametrize(
    ("predictor", "params", "has_own"),
    [
        ("none", {}, False),
        ("gate_lookahead", {"depth": 1}, False),
        ("gate_lookahead", {"depth": 2}, True),
        ("previous_token", {}, True),
        ("path", {}, True),
        ("oracle", {}, False),
    ],
)
def test_only_predictors_that_calibration_does_not_know_are_run_for_their_time(
    predictor, params, has_own
):
    assert (
        has_own_costs(make_spec(slots=8, predictor=predictor, predictor_params=params)) == has_own
    )

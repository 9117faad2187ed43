"""Forecasts are charged what was measured of a policy's own code, whatever its size."""

from dataclasses import replace

import pytest
from expertflow.simulator.forecast import Forecaster
from expertflow.simulator.own_costs import OwnCosts, PhaseOwnCosts
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.policy.spec import make_spec
from expertflow.tracer.probe import provenance

from tests.builders import make_machine, make_steps

EVENT_S = 0.25
SPEC = make_spec(slots=8, predictor="previous_token")


def forecaster() -> Forecaster:
    return Forecaster(
        workload=make_steps([[[0], [1]]] * 4),
        costs=make_machine(experts=1.0),
        shape=replace(tiny_shape(), num_layers=2, moe_layers=(0, 1), num_experts=8),
        trace_id="tiny",
        device="none",
        link="none",
        link_origin="declared",
        submit_s=0.0,
        decision_is_measured=True,
        provenance=provenance(0, "own-generation"),
    )


def own(event_s: float) -> OwnCosts:
    phase = PhaseOwnCosts(event_s=event_s)
    return OwnCosts(prefill=phase, decode=phase)


def test_a_forecast_is_charged_the_measured_time_of_its_policy():
    ready = replace(forecaster(), own_costs={SPEC.code: own(EVENT_S)})

    found = ready.predict(SPEC, with_bounds=False)

    assert found.time.lookahead_s == pytest.approx(8 * EVENT_S)


def test_the_time_holds_at_every_size_of_the_policy():
    ready = replace(forecaster(), own_costs={SPEC.code: own(EVENT_S)})

    found = ready.predict(SPEC.with_slots(4), with_bounds=False)

    assert found.time.lookahead_s == pytest.approx(8 * EVENT_S)


def test_another_policy_is_not_charged_it():
    ready = replace(forecaster(), own_costs={SPEC.code: own(EVENT_S)})
    other = make_spec(slots=8)

    found = ready.predict(other, with_bounds=False)

    assert found.time.lookahead_s == 0.0
    assert found.tokens_per_s == forecaster().predict(other, with_bounds=False).tokens_per_s

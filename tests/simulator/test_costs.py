"""The time model: what is planted comes out, and nothing negative ever does."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from expertflow.simulator.costs import NO_TRAFFIC, CostModel, Linear, as_one_walk, fit_costs
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.tracer.quantities import LinkSpec
from expertflow.tracer.schema import WHOLE_STEP
from expertflow.tracer.types import LinkCurve, LinkProfile
from hypothesis import given, settings
from hypothesis import strategies as st

MIXER = (2e-4, 3e-6, 5e-8, 1e-5, 7e-6)
EXPERTS = (1e-4, 2e-6, 3e-5, 4e-6, 6e-6, 2e-4)
HEAD = (5e-4, 1e-4, 1e-6)
DECISION = (1e-5, 1e-6, 2e-6)
LOOKAHEAD = (2e-5, 1e-6, 3e-6)
READBACK = 2e-5


def dot(weights: Sequence[float], *features: float) -> float:
    return sum(w * x for w, x in zip(weights, features, strict=True))


def link(**more: Any) -> LinkProfile:
    curves = (
        LinkCurve(pinned=True, busy=False, points=((1 << 10, 1e-5), (1 << 20, 1e-3))),
        LinkCurve(pinned=True, busy=True, points=((1 << 10, 2e-5), (1 << 20, 2e-3))),
        LinkCurve(pinned=False, busy=False, points=((1 << 20, 4e-3),)),
    )
    return LinkProfile(name="link", origin="measured", curves=curves, wake_s=1e-5, **more)


Rows = tuple[dict[str, list[Any]], dict[tuple[int, int], int], dict[tuple[int, int], int]]


def planted(steps: int = 60, layers: int = 3, seed: int = 0, **fixed: int) -> Rows:
    """Rows of a machine whose costs are known; `fixed` holds a feature constant."""
    dice = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    demand: dict[tuple[int, int], int] = {}
    prefetch: dict[tuple[int, int], int] = {}
    before = (0, 0)
    for step in range(steps):
        batch = fixed.get("batch", int(dice.integers(1, 5)))
        tokens = fixed.get("tokens", int(dice.integers(1, 50)))
        context = fixed.get("context", int(dice.integers(10, 900)))
        common = {"step": step, "phase": "decode" if step else "prefill", "batch": batch}
        common |= {"tokens": tokens, "context": context, "start_s": 0.0, "stall_s": 0.0}
        inside = 0.0
        for layer in range(layers):
            distinct = fixed.get("distinct", int(dice.integers(2, 20)))
            loads = demand[step, layer] = fixed.get("loads", int(dice.integers(0, distinct + 1)))
            ahead = prefetch[step, layer] = fixed.get("prefetch", int(dice.integers(0, 6)))
            waves = fixed.get("waves", int(dice.integers(1, 4)))
            laps = {
                "mixer_s": dot(MIXER, 1, tokens, tokens * context, *before),
                "readback_s": READBACK,
                "decision_s": dot(DECISION, 1, distinct, loads),
                "lookahead_s": dot(LOOKAHEAD, 1, tokens, ahead),
                "experts_s": dot(EXPERTS, 1, tokens, distinct, loads, ahead, waves - 1),
            }
            total = sum(laps.values())
            inside += total
            rows.append(
                {**common, **laps, "layer": layer, "distinct": distinct, "waves": waves}
                | {"total_s": total}
            )
            before = (loads, ahead)
        whole = dict.fromkeys(laps, 0.0)
        rows.append(
            {**common, **whole, "layer": WHOLE_STEP, "distinct": 0, "waves": 1}
            | {"total_s": inside + dot(HEAD, 1, batch, tokens)}
        )
    return {name: [row[name] for row in rows] for name in rows[0]}, demand, prefetch


def fit(rows: Rows, **more: Any) -> CostModel:
    arguments: dict[str, Any] = {"link": link(), "shape": tiny_shape(), "pinned": True}
    return fit_costs(*rows, **(arguments | more))


def test_planted_costs_are_recovered():
    decode = fit(planted()).decode

    for found, weights in (
        (decode.mixer, MIXER),
        (decode.experts, EXPERTS),
        (decode.head, HEAD),
        (decode.decision, DECISION),
        (decode.lookahead, LOOKAHEAD),
    ):
        assert found.weights == pytest.approx(weights, rel=1e-6)
        assert found.residual == pytest.approx(0.0, abs=1e-9)
    assert decode.readback_s == pytest.approx(READBACK)


def test_planted_costs_are_recovered_through_noise():
    columns, demand, prefetch = planted(steps=400)
    dice = np.random.default_rng(1)
    for name in ("mixer_s", "experts_s"):
        columns[name] = [value * dice.normal(1.0, 0.03) for value in columns[name]]

    decode = fit((columns, demand, prefetch)).decode

    mixer = (1, 20, 20 * 500, 3, 2)
    assert decode.mixer(*mixer) == pytest.approx(dot(MIXER, *mixer), rel=0.02)
    asked = (1, 20, 10, 5, 2, 1)
    assert decode.experts(*asked) == pytest.approx(dot(EXPERTS, *asked), rel=0.02)
    assert 0.005 < decode.mixer.residual < 0.05


def test_traffic_of_the_pass_before_weighs_on_the_first_layer_too():
    # One layer: the loads before an event are always those of another pass.
    decode = fit(planted(layers=1)).decode

    assert decode.mixer.weights == pytest.approx(MIXER, rel=1e-6)


def test_features_that_never_vary_fold_into_the_first():
    decode = fit(planted(tokens=8, batch=8, waves=1, loads=0)).decode

    assert decode.experts.weights[1] == decode.experts.weights[3] == decode.experts.weights[5] == 0
    assert decode.experts.weights[0] == pytest.approx(EXPERTS[0] + 8 * EXPERTS[1])
    assert decode.experts.weights[2] == pytest.approx(EXPERTS[2])
    assert decode.head(1, 8, 8) == pytest.approx(dot(HEAD, 1, 8, 8))


def test_one_preemption_is_not_a_trend():
    clean = planted()
    columns, demand, prefetch = planted()
    columns["readback_s"][10] = 3.0
    columns["experts_s"][20] = 3.0

    decode = fit((columns, demand, prefetch)).decode

    assert decode.readback_s == pytest.approx(READBACK, rel=0.03)
    asked = (1, 20, 10, 5, 2, 1)
    assert decode.experts(*asked) == pytest.approx(fit(clean).decode.experts(*asked), rel=0.15)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 5.0))
def test_weights_are_never_negative(seed, noise):
    columns, demand, prefetch = planted(steps=8, seed=seed)
    dice = np.random.default_rng(seed)
    for name in ("mixer_s", "experts_s", "decision_s", "lookahead_s", "total_s"):
        values = np.asarray(columns[name]) * dice.exponential(1.0 + noise, len(columns[name]))
        columns[name] = (values * (dice.random(len(values)) > 0.2)).tolist()

    model = fit((columns, demand, prefetch))

    for phase in (model.prefill, model.decode):
        for linear in (phase.mixer, phase.experts, phase.head, phase.decision, phase.lookahead):
            assert all(weight >= 0 for weight in linear.weights)
            assert np.isfinite(linear.residual)


def test_a_cost_that_falls_with_its_feature_is_fitted_without_it():
    columns, demand, prefetch = planted()
    columns["decision_s"] = [1e-4 - 1e-6 * distinct for distinct in columns["distinct"]]

    found = fit((columns, demand, prefetch)).decode.decision

    assert found.weights[1] == 0.0
    assert found.weights[0] > 0


def test_phase_that_was_not_traced_costs_nothing():
    columns, demand, prefetch = planted()
    decode_only: Mapping[str, list[Any]] = {
        name: [v for v, phase in zip(values, columns["phase"], strict=True) if phase == "decode"]
        for name, values in columns.items()
    }

    model = fit_costs(decode_only, demand, prefetch, link=link(), shape=tiny_shape(), pinned=True)

    assert model.mixer_s("prefill", 100, 100, NO_TRAFFIC) == model.head_s("prefill", 1, 100) == 0.0
    assert model.mixer_s("decode", 1, 100, NO_TRAFFIC) > 0


def test_link_seconds_are_those_of_one_expert_under_the_runs_conditions():
    rows = planted(steps=4)

    pinned, pageable = fit(rows), fit(rows, pinned=False)

    assert (pinned.copy_s, pinned.busy_copy_s) == pytest.approx((1e-3, 2e-3))
    assert pageable.copy_s == pytest.approx(4e-3)
    assert pinned.wake_s == 1e-5
    assert pinned.chunk_bytes == link().chunk_bytes


def test_declared_link_replaces_the_measured_one():
    model = fit(planted(steps=4)).with_link(LinkSpec.parse("1GiB/s+1ms"))

    assert model.copy_s == model.busy_copy_s == pytest.approx(1e-3 + 1 / 1024)


def test_policy_time_is_charged_only_where_none_was_measured(machine):
    charged = machine().with_policy_costs(1e-5, 2e-6)
    measured = machine(decision=1e-3).with_policy_costs(1e-5, 2e-6)

    assert charged.decision_s("decode", 8, 3) == pytest.approx(1e-5 + 3 * 2e-6)
    assert measured.decision_s("decode", 8, 3) == 1e-3


def test_linear_refuses_features_it_was_not_fitted_to():
    with pytest.raises(ValueError, match="shorter"):
        Linear((1.0, 2.0))(1)


def test_copies_are_cut_into_whole_chunks(machine):
    model = replace(machine(), expert_bytes=10, chunk_bytes=4)

    assert model.chunks == 3
    assert replace(model, chunk_bytes=100).chunks == 1


def test_cpu_times_are_told_if_they_are_known(machine):
    assert machine(copy=2.0).cpu_times() is None
    assert machine(copy=2.0, cpu=(0.5, 0.25)).cpu_times() == {
        "copy_s": 2.0,
        "expert_s": 0.5,
        "token_s": 0.25,
    }


def test_rows_of_other_pool_sizes_are_brought_to_one_walk():
    steps = {
        "step": [0, 0, 0],
        "layer": [0, 1, -1],
        "waves": [1, 2, 0],
        "experts_s": [5.0, 9.0, 0.0],
        "total_s": [6.0, 10.0, 20.0],
    }

    walked = as_one_walk(steps, {0: 16, 1: 4}, group_s=0.25, num_experts=8)

    assert walked["experts_s"] == [3.0, 9.0, 0.0]
    assert walked["total_s"] == [4.0, 10.0, 18.0]


def test_a_larger_pool_costs_its_extra_slots_once_per_wave():
    model = fit(planted(), group_s=0.5)
    groups = model.num_experts

    one = model.experts_s("decode", 1, 2, NO_TRAFFIC, 1, groups)
    larger = model.experts_s("decode", 1, 2, NO_TRAFFIC, 1, groups + 10)

    assert larger == pytest.approx(one + 5.0)


def test_look_ahead_is_fitted_where_a_predictor_was_at_work():
    columns, demand, prefetch = planted()
    half = len(columns["lookahead_s"]) // 2
    columns["lookahead_s"][:half] = [float("nan")] * half

    model = fit((columns, demand, prefetch))

    assert model.decode.lookahead.weights == pytest.approx(LOOKAHEAD, rel=1e-6)

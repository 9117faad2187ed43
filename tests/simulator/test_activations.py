"""Peaks of working tensors: what they grow with, how waves are told apart, and what is recovered from points."""

from dataclasses import replace

import numpy as np
import pytest
from expertflow.simulator.activations import (
    ONE_CALL,
    Activations,
    ExpertBytes,
    fit_activations,
    wave_rows,
)
from expertflow.simulator.policy.log import Entry
from expertflow.tracer.types import MemoryPoint
from hypothesis import given
from hypothesis import strategies as st

TOP_K, STATE, LAYERS = 4, 64, 3
SIZES = {"partial": TOP_K * STATE, "state": STATE, "layer_kv": 16.0}

Waves = tuple[tuple[int, int], ...]
counts = st.integers(1, 400)


def point(batch: int, context: int, activation_bytes: float = 0, waves: Waves = ()) -> MemoryPoint:
    return MemoryPoint(
        phase="prefill",
        batch=batch,
        tokens=batch * context,
        context=context,
        activation_bytes=round(activation_bytes),
        waves=waves,
    )


def fitted(points, phase="prefill", **more):
    return fit_activations(tuple(points), phase, **(SIZES | more))


def peak(model: Activations, at: MemoryPoint) -> float:
    """What a model says of a pass of a point's size and waves."""
    waves = at.waves or ((0, ONE_CALL), (0, ONE_CALL), (at.tokens * TOP_K, ONE_CALL))
    held = model.experts.of_pass(at.tokens, waves, LAYERS)
    (found,) = model(*(np.array([n]) for n in (at.batch, at.tokens, at.context, held)))
    return found


def in_waves(tokens: int, shares: list[float]) -> Waves:
    """Each layer in two waves, the first with this share of its rows."""
    rows = tokens * TOP_K
    return tuple((round(share * rows), rows - round(share * rows)) for share in shares)


@st.composite
def machines(draw):
    """A model with parts of all kinds, and points that show them."""
    row = draw(st.floats(50, 500))
    experts = ExpertBytes(row=row, gathered_row=row + STATE, partial=256, weighted=256, layer_kv=16)
    pairs = draw(st.floats(0, 2))
    model = Activations((1000.0, draw(st.floats(100, 2000)), 0.0, pairs), experts)
    sizes = [(1, 10), (2, 30), (4, 64), (1, 100), (3, 150)]
    shares = st.lists(st.floats(0.1, 0.9), min_size=LAYERS, max_size=LAYERS)
    wanted = [point(b, c) for b, c in sizes]
    wanted += [point(b, c, waves=in_waves(b * c, draw(shares))) for b, c in sizes]
    return model, [replace(p, activation_bytes=round(peak(model, p))) for p in wanted]


@given(machines(), counts, st.integers(1, 8), st.floats(0.1, 0.9))
def test_a_machine_that_is_like_the_model_is_found_again(machine, context, batch, share):
    model, points = machine
    found = fitted(points)

    for waves in ((), in_waves(batch * context, [share] * LAYERS)):
        asked = point(batch, context, waves=waves)
        assert peak(found, asked) == pytest.approx(peak(model, asked), rel=0.02, abs=2000)


@given(counts, counts, counts)
def test_waves_after_the_first_hold_the_gathering_tensor_besides(tokens, first, later):
    held = ExpertBytes(row=100, gathered_row=164, partial=256, weighted=256)

    found = held.of_event(tokens, first, later, 0)

    assert found >= held.of_event(tokens, first, ONE_CALL, 0)
    assert found >= 164 * later + 256 * tokens
    assert found >= 2 * 256 * tokens
    assert found <= held.of_event(tokens, first + 1, later + 1, 0)


def test_an_earlier_layer_has_less_of_the_cache_beside_it():
    held = ExpertBytes(row=100, layer_kv=16)

    assert held.of_event(5, 20, ONE_CALL, 2) == 100 * 20 - 16 * 5 * 2
    assert held.of_pass(5, ((20, ONE_CALL), (20, ONE_CALL), (20, ONE_CALL)), LAYERS) == 100 * 20
    assert held.of_pass(5, ((90, ONE_CALL), (20, ONE_CALL), (20, ONE_CALL)), LAYERS) == 9000 - 160
    assert held.of_pass(5, (), LAYERS) == 0.0


def test_a_phase_nobody_measured_is_zero_but_for_the_gathering_tensor():
    found = fitted([point(1, 8, 5000)], phase="decode")

    assert peak(found, point(2, 8)) == 0.0
    assert peak(found, point(2, 8, waves=((1, 1),) * LAYERS)) == 16 * TOP_K * STATE


def test_a_single_point_is_met():
    found = fitted([point(2, 32, 4392)])

    assert peak(found, point(2, 32)) == pytest.approx(4392)


def test_waves_nobody_measured_add_the_gathering_tensor():
    found = fitted([point(2, 32, 4392)])

    waves = in_waves(64, [0.5] * LAYERS)
    assert peak(found, point(2, 32, waves=waves)) == pytest.approx(4392 + 64 * TOP_K * STATE)


def test_points_of_older_files_that_only_give_a_share_of_waves_are_left_out():
    whole = point(2, 32, 4392)
    older = replace(whole, activation_bytes=9999, largest_wave=0.5)

    assert fitted([whole, older]) == fitted([whole])
    assert fitted([older]) == fitted([])


def test_rows_are_counted_by_wave_and_those_on_the_cpu_are_not():
    def ran(layer: int, wave: int, tokens: int, step: int = 0) -> Entry:
        outcome = "miss" if wave >= 0 else "cpu"
        return Entry("event", step, layer, 0, 0, wave=wave, detail=outcome, tokens=tokens)

    log = [
        *(ran(0, 0, 3), ran(0, 0, 1), ran(0, 1, 2), ran(0, 2, 5)),
        *(ran(1, 0, 4), ran(1, -1, 9)),
        Entry("release", 0, 0, -1),
        ran(2, 0, 7, step=1),
    ]

    assert wave_rows(log, LAYERS) == {
        0: ((4, 5), (4, 0), (0, ONE_CALL)),
        1: ((0, ONE_CALL), (0, ONE_CALL), (7, ONE_CALL)),
    }

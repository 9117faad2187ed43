"""A synthetic trace is a valid trace with the routing it was asked for."""

import numpy as np
import pytest
from expertflow.tracer.check import check_trace
from expertflow.tracer.stats import routing_stats
from expertflow.tracer.store import NO_EXPERT
from expertflow.tracer.synthetic import synthetic_trace


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_every_variant_passes_the_check(tmp_path, stream, lookahead):
    trace = synthetic_trace(tmp_path / "t", stream=stream, lookahead=lookahead, sequences=3)

    report = check_trace(trace.path)

    assert report.steps == 2 * 16  # two batches, each a prefill and 15 decode steps
    assert ("transfers" in report.rows) == stream


def test_same_seed_gives_the_same_trace_id(tmp_path):
    first = synthetic_trace(tmp_path / "a", seed=7)
    second = synthetic_trace(tmp_path / "b", seed=7)
    other = synthetic_trace(tmp_path / "c", seed=8)

    assert first.manifest.trace_id == second.manifest.trace_id
    assert first.manifest.trace_id != other.manifest.trace_id


def test_stickier_routing_is_reused_more(tmp_path):
    loose = routing_stats(synthetic_trace(tmp_path / "a", stickiness=0.0, skew=0.0))
    sticky = routing_stats(synthetic_trace(tmp_path / "b", stickiness=0.8, skew=0.0))

    assert loose.decode.reuse == pytest.approx(loose.reuse_chance, abs=0.06)
    assert sticky.decode.reuse == pytest.approx(0.82, abs=0.06)


def test_lookahead_hits_as_often_as_asked_and_is_empty_past_the_last_layer(tmp_path):
    trace = synthetic_trace(tmp_path / "t", hit=0.8, lookahead=1, layers=4, sequences=16)
    arrays = trace.routing_arrays()
    guess = arrays.lookahead[1]

    assert (guess[arrays.layer == 3] == NO_EXPERT).all()
    hits = []
    for step in np.unique(arrays.step):
        here = (arrays.step == step) & (arrays.layer == 1)
        truth = arrays.experts[(arrays.step == step) & (arrays.layer == 2)]
        hits.append((guess[here][:, :, None] == truth[:, None, :]).any(axis=2).mean())
    assert np.mean(hits) == pytest.approx(0.8, abs=0.06)


def test_times_say_that_they_are_declared(tmp_path):
    manifest = synthetic_trace(tmp_path / "t").manifest

    assert manifest.hardware.origin == manifest.hardware.link.origin == "declared"
    assert any("Synthetic" in warning for warning in manifest.warnings)


def test_layer_times_of_a_step_add_up_to_less_than_the_whole(tmp_path):
    steps = synthetic_trace(tmp_path / "t", stream=True).table("steps").to_pandas()
    parts = ["mixer_s", "readback_s", "decision_s", "lookahead_s", "stall_s", "experts_s"]
    layers, whole = steps[steps.layer >= 0], steps[steps.layer == -1].set_index("step")

    assert np.allclose(layers[parts].sum(axis=1), layers.total_s)
    assert (layers.groupby("step").total_s.sum() < whole.total_s).all()

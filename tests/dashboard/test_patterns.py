"""How choices hang together, against the plainest way of counting."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from expertflow.dashboard import data, patterns
from expertflow.dashboard.figures import bins
from expertflow.dashboard.figures import patterns as figures
from expertflow.tracer.store import RoutingArrays
from hypothesis import given, settings
from hypothesis import strategies as st

LAYERS, EXPERTS, TOP_K = 2, 5, 2


def make_sample(chosen: np.ndarray, decode_from: int = 1) -> patterns.Sample:
    """Tokens of one sequence, one pass each, through two layers: chosen[token, layer, top_k]."""
    tokens = len(chosen)
    step = np.repeat(np.arange(tokens), LAYERS)
    return patterns.Sample(
        arrays=RoutingArrays(
            step=step.astype(np.int32),
            layer=np.tile(np.arange(LAYERS), tokens).astype(np.int16),
            sequence=(step % 2).astype(np.int32),
            position=(step // 2).astype(np.int32),
            phase_is_decode=step >= decode_from,
            token_id=np.full(len(step), -1, np.int32),
            is_pad=np.zeros(len(step), bool),
            experts=chosen.reshape(-1, TOP_K).astype(np.uint16),
        ),
        segment=np.zeros(len(step), np.int64),
        layers=LAYERS,
        experts=EXPERTS,
        rows=len(step),
        total_rows=len(step),
    )


pairs = st.permutations(range(EXPERTS)).map(lambda order: order[:TOP_K])
tokens = st.lists(st.tuples(pairs, pairs), min_size=1, max_size=40).map(np.array)


@given(tokens)
@settings(max_examples=40, deadline=None)
def test_reuse_distances_are_those_of_a_plain_count(chosen: np.ndarray) -> None:
    sample = make_sample(chosen, decode_from=0)
    wanted = np.zeros(len(patterns.BINS) + 1, int)
    for layer in range(LAYERS):
        last: dict[int, int] = {}
        for token, experts in enumerate(chosen[:, layer].tolist()):
            for expert in experts:
                if expert in last:
                    gap = token - last[expert]
                    wanted[next((n for n, top in enumerate(patterns.BINS) if gap <= top), -1)] += 1
            last.update(dict.fromkeys(experts, token))
    np.testing.assert_array_equal(patterns.reuse_distances(sample, "decode"), wanted)


@given(tokens)
@settings(max_examples=40, deadline=None)
def test_transitions_and_company_are_those_of_a_plain_count(chosen: np.ndarray) -> None:
    sample = make_sample(chosen)
    across, together = np.zeros((2, EXPERTS, EXPERTS), int)
    for first, second in chosen.tolist():
        for pair in itertools.product(first, second):
            across[pair] += 1
        for pair in itertools.product(first, first):
            together[pair] += 1
    np.testing.assert_array_equal(patterns.transitions(sample, 0), across)
    np.testing.assert_array_equal(patterns.company(sample, 0), together)


def test_gaps_between_sampled_files_count_as_no_reuse() -> None:
    chosen = np.broadcast_to([0, 1], (2, LAYERS, TOP_K))
    sample = make_sample(chosen, decode_from=0)
    whole = patterns.reuse_distances(sample, "decode")
    apart = patterns.Sample(
        arrays=sample.arrays,
        segment=np.repeat([0, 1], LAYERS),
        layers=LAYERS,
        experts=EXPERTS,
        rows=4,
        total_rows=400,
    )
    assert whole[0] == LAYERS * TOP_K
    assert patterns.reuse_distances(apart, "decode").sum() == 0
    assert not apart.is_whole


def test_a_layer_that_decides_the_next_is_foreseen_entirely() -> None:
    rng = np.random.default_rng(0)
    first = np.array([rng.permutation(EXPERTS)[:TOP_K] for _ in range(400)])
    chosen = np.stack([first, (first + 1) % EXPERTS], axis=1)
    known, popular = patterns.foresight(make_sample(chosen), 0) or (0.0, 1.0)
    assert known == pytest.approx(1.0)
    assert popular < 0.7


def test_lift_of_independent_choices_is_about_one() -> None:
    rng = np.random.default_rng(1)
    chosen = np.array([[rng.permutation(EXPERTS)[:TOP_K]] * LAYERS for _ in range(4000)])
    lift = patterns.lift(patterns.company(make_sample(chosen), 0))
    assert np.nanmean(lift) == pytest.approx(1.0, abs=0.05)
    assert np.isnan(np.diag(lift)).all()


def test_similar_experts_stand_together() -> None:
    groups = np.array([0, 1, 0, 1, 0, 1])
    matrix = 10.0 * (groups[:, None] == groups[None, :]) + 0.1
    ordered = groups[patterns.similar_order(matrix)]
    assert list(ordered) in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])


def test_drift_is_seen_and_noise_is_not() -> None:
    steady = np.tile([[10, 10, 0, 0]], (8, 1))
    moved = np.concatenate([steady[:4], np.roll(steady[4:], 2, axis=1)])
    assert "does not drift" in figures.drift_finding(steady, 3)[0]
    assert "Layer 3 drifts: halves differ by 1.00" in figures.drift_finding(moved, 3)[0]


def test_large_traces_are_sampled_evenly_and_say_so(tmp_path: Path) -> None:
    from expertflow.tracer.synthetic import synthetic_trace

    synthetic_trace(tmp_path / "t", sequences=4)
    (trace,) = data.discover(tmp_path).traces
    whole = patterns.sample_of(trace)
    assert isinstance(whole, patterns.Sample)
    assert whole.is_whole
    assert patterns._evenly(10, 0.3) == [0, 4, 9]
    assert patterns._evenly(10, 2.0) == list(range(10))
    assert patterns._evenly(3, 0.001) == [0]


def test_matrices_larger_than_a_screen_are_put_together() -> None:
    small, names = bins.binned(np.ones((450, 3)), 0)
    assert small.shape == (150, 3)
    assert small[0, 0] == 3
    assert names[:2] == ["0–2", "3–5"]
    assert bins.binned(np.ones((200, 3)), 0)[0].shape == (200, 3)
    wide = np.ones((512, 512), int)
    assert len(figures.transitions(wide, 0, None).data[0].z) <= bins.MAX_SIDE
    assert len(figures.company(wide * 100, 0).data[0].z) <= bins.MAX_SIDE

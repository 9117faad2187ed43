"""Gate scores: heard from real gates of every family, ranked, recorded and read back."""

import numpy as np
import pytest
import torch
from expertflow.tracer.console import progress
from expertflow.tracer.errors import UsageError
from expertflow.tracer.gates import GateTap, ranked
from expertflow.tracer.load import load_model
from expertflow.tracer.store import Trace
from expertflow.tracer.tracing import TraceRequest, trace_run
from hypothesis import given
from hypothesis import strategies as st

from tests.models import TEXTS, tiny, write_prompts

CPU = torch.device("cpu")
KNOWN = ("olmoe", "mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3")


def traced(folder, family, name="t", **changes):
    request = TraceRequest(
        out=folder / name,
        model=str(tiny(family)),
        prompts=write_prompts(folder / "p.jsonl", TEXTS[:4]),
        batch_size=4,
        max_new_tokens=3,
        device="cpu",
        threads=1,
        **{"residency": "resident", "scores": 4, **changes},
    )
    trace_run(request, progress=progress, say=lambda words: None)
    return Trace.open(request.out)


@pytest.mark.parametrize("family", KNOWN)
def test_weights_follow_from_the_recorded_scores(family, tmp_path):
    trace = traced(tmp_path, family)
    rows = trace.routing_arrays()
    top_k = rows.experts.shape[1]

    assert "scores_4" in trace.manifest.recorded
    assert rows.scores is not None
    assert rows.score_ids is not None
    assert rows.weights is not None
    assert rows.scores.shape == rows.score_ids.shape == (len(rows.step), 4)
    assert np.array_equal(np.sort(rows.score_ids[:, :top_k]), np.sort(rows.experts))
    for row in range(0, len(rows.step), 7):
        own = dict(zip(rows.score_ids[row].tolist(), rows.scores[row].tolist(), strict=True))
        shares = np.exp([own[expert] for expert in rows.experts[row].tolist()])
        weights = rows.weights[row].astype(float)
        assert shares / shares.sum() == pytest.approx(weights / weights.sum(), abs=0.01)


def test_scores_fall_within_the_chosen_and_within_the_others(tmp_path):
    rows = traced(tmp_path, "gpt_oss").routing_arrays()
    top_k = rows.experts.shape[1]

    assert rows.scores is not None
    for part in (rows.scores[:, :top_k], rows.scores[:, top_k:]):
        assert (np.diff(part.astype(float), axis=1) <= 0).all()
    assert np.ptp(rows.scores) > 1  # not all the same


def test_streamed_experts_record_the_same_scores(tmp_path):
    resident = traced(tmp_path, "olmoe").routing_arrays()
    streamed = traced(tmp_path, "olmoe", name="s", residency="stream").routing_arrays()

    assert np.array_equal(resident.score_ids, streamed.score_ids)
    assert np.array_equal(resident.scores, streamed.scores)


def test_nothing_is_recorded_unless_asked_for(tmp_path):
    trace = traced(tmp_path, "olmoe", scores=0)

    assert not [name for name in trace.manifest.recorded if "scores" in name]
    assert trace.routing_arrays().scores is None
    assert "scores" not in trace.schemas["routing"].names


def test_a_gate_with_weights_of_its_own_kind_is_refused(tmp_path):
    with pytest.raises(UsageError, match="weighs experts in a way that is not known"):
        traced(tmp_path, "phimoe")


@pytest.mark.parametrize("most", [1, 9])
def test_impossible_numbers_of_scores_are_refused(most, tmp_path):
    with pytest.raises(UsageError, match=f"2 and 8, got {most}"):
        traced(tmp_path, "olmoe", scores=most)


def test_hooks_are_gone_after_the_run():
    loaded = load_model(str(tiny("olmoe")), device=CPU, dtype="auto")
    gates = [layer.gate for layer in loaded.layers if layer.gate is not None]
    tap = GateTap(loaded.layers)
    assert all(gate._forward_hooks for gate in gates)

    tap.close()

    assert not any(gate._forward_hooks for gate in gates)


rows = st.integers(2, 7).flatmap(
    lambda experts: st.tuples(
        st.lists(
            st.lists(st.integers(-4, 4).map(float), min_size=experts, max_size=experts),
            min_size=1,
            max_size=4,
        ),
        st.integers(1, experts),
    )
)


@given(rows, st.randoms(use_true_random=False))
def test_ranking_is_by_score_with_the_chosen_first_and_ties_by_id(drawn, random):
    scores, top_k = drawn
    experts = range(len(scores[0]))
    chosen = [random.sample(list(experts), top_k) for _ in scores]

    found = ranked(np.array(scores), np.array(chosen), len(experts))

    for row, own, order in zip(scores, chosen, found.tolist(), strict=True):
        slow = sorted(experts, key=lambda expert: (expert not in own, -row[expert], expert))
        assert order == slow

"""Working tensors worked out by passes over shapes: what a real pass makes, at sizes nobody looked at."""

import pytest
import torch
from expertflow.tracer.dry_pass import dry_model
from expertflow.tracer.generate import Prompt
from expertflow.tracer.load import load_model
from expertflow.tracer.memory import peaks
from expertflow.tracer.pass_peaks import PassPeaks, _largest, _terms_of
from expertflow.tracer.unloaded import describe
from expertflow.tracer.widths import PassWidths
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import folder
from tests.models import tiny

CPU = torch.device("cpu")
KINDS = (
    "olmoe",  # fused attention
    "gpt_oss",  # scores are tensors
    "deepseek_v32",  # latent attention, an index over positions
    "qwen3_next",  # linear attention, in chunks
    "gemma4",  # text inside a model that sees
    "switch_transformers",  # an encoder before a decoder
)
SIZES = ((1, 130), (3, 60))
WIDTHS = PassWidths(
    hidden=16, layer=64, expert=40, top_k=2, attended=32, score_heads=0, vocab=50,
    keeps_logits=False, item_bytes=2,
)  # fmt: skip


def widths_of(family):
    return describe(str(folder(family)), dtype="float32").widths


@pytest.mark.parametrize("family", KINDS)
def test_what_real_passes_make_is_known_before(family):
    # All families and more sizes: scripts/plan_accuracy.py.
    loaded, widths = load_model(str(folder(family)), device=CPU), widths_of(family)
    for batch, width in SIZES:
        prompts = [
            Prompt(number, tuple(2 + place % 200 for place in range(width - 7 * number)))
            for number in range(batch)
        ]
        kept = (loaded.shape.kv_bytes_per_token, widths.kept_per_sequence)
        real = max(
            peak - batch * (kept[0] * info.context + kept[1])
            for info, peak in peaks(loaded, prompts, CPU)
        )
        told = widths.activation_bytes(batch=batch, tokens=batch * width, context=width + 2)
        assert 0.9 < told / real < 1.4


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_sizes_far_from_those_looked_at_are_told_as_a_pass_of_that_size_would(family):
    loaded, widths = load_model(str(folder(family)), device=CPU), widths_of(family)
    dry = dry_model(loaded.model, loaded.layers)

    for batch, width in ((1, 5000), (7, 2048)):
        stages = dry.run(batch, width)
        there = max(max(row) for row in [*stages.prefill.values(), *stages.behind.values()])
        told = widths.activation_bytes(batch=batch, tokens=batch * width, context=width + 1)
        assert told == pytest.approx(there, rel=0.01)


def test_parts_of_prompts_are_charged_for_what_is_cached_not_for_whole_prompts():
    widths = widths_of("olmoe")
    sizes = {"batch": 1, "tokens": 64, "context": 4096}

    parts = widths.activation_bytes(**sizes, in_parts=True)

    assert parts > widths.activation_bytes(batch=1, tokens=64, context=64)
    assert parts < widths.activation_bytes(batch=1, tokens=4096, context=4096, in_parts=True)


def test_a_mask_is_charged_to_sequences_that_share_a_pass_and_not_to_one_alone():
    widths = widths_of("olmoe")

    def pairs(batch: int) -> float:
        few, many = (
            widths.activation_bytes(batch=batch, tokens=batch * width, context=width)
            for width in (4096, 8192)
        )
        return many - 2 * few

    assert abs(pairs(1)) < 100
    assert pairs(2) > 4096 * 4096


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 32), prompt=st.integers(1, 4000), more=st.integers(0, 4000))
def test_more_of_anything_takes_no_less(batch, prompt, more):
    widths = KNOWN.setdefault("olmoe", widths_of("olmoe"))

    def at(batch: int, prompt: int, context: int) -> int:
        return widths.activation_bytes(batch=batch, tokens=batch * prompt, context=context)

    here = at(batch, prompt, prompt + more)
    assert here > 0
    assert at(batch + 1, prompt, prompt + more) >= here
    assert at(batch, prompt + 1, prompt + more + 1) >= here
    assert at(batch, prompt, prompt + more + 1) >= here


KNOWN: dict[str, object] = {}


def test_the_terms_of_operations_are_found_and_the_largest_is_the_peak():
    amounts = [(1.0, n, n, n * n, 1.0, n * n) for n in (64.0, 128.0, 192.0)]
    passes = [{"a": [int(1000 + 5 * n), int(3 * n * n)], "b": [7]} for n in (64.0, 128.0, 192.0)]

    terms = _terms_of(passes, amounts)

    assert _largest(terms, (1.0, 10.0, 10.0, 100.0, 1.0, 100.0)) == pytest.approx(1050, abs=1)
    assert _largest(terms, (1.0, 1e4, 1e4, 1e8, 1.0, 1e8)) == pytest.approx(3e8, rel=1e-6)


@given(st.lists(st.tuples(*[st.integers(0, 10**6)] * 3), min_size=3, max_size=3, unique=True))
def test_rows_that_fit_no_terms_are_never_told_below_what_was_seen(values):
    sizes = (64.0, 128.0, 192.0)
    amounts = [(1.0, n, n, n * n, 1.0, n * n) for n in sizes]
    passes = [{"stage": [int(v) for v in row]} for row in values]

    terms = _terms_of(passes, amounts)

    for amount, row in zip(amounts, values, strict=True):
        assert _largest(terms, amount) >= max(row) * (1 - 2e-3) - 1


def test_a_model_that_cannot_be_run_after_all_is_estimated_from_its_config():
    class Broken:
        def run(self, *size):
            raise ValueError("contents")

    peaks_of = PassPeaks(Broken(), 12, WIDTHS)  # type: ignore[arg-type]
    sizes = {"batch": 2, "tokens": 12, "context": 10}

    assert peaks_of.is_by_pass
    assert peaks_of.activation_bytes(**sizes) == WIDTHS.activation_bytes(**sizes)
    assert not peaks_of.is_by_pass
    assert (peaks_of.item_bytes, peaks_of.kept_per_sequence) == (2, 12)


def test_nothing_of_a_large_model_is_allocated(tmp_path):
    widths = describe(str(tiny("mixtral")), dtype="float32").widths

    # A pass whose mask alone would take 16 TiB.
    told = widths.activation_bytes(batch=2, tokens=2 * 2**22, context=2**22)

    assert told > 2 * 2**44

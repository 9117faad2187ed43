"""What a model keeps of a text, told by its modules alone, is what its cache really holds."""

import pytest
import torch
from expertflow.tracer import kept
from expertflow.tracer.dry_pass import BLOCK, DryModel
from expertflow.tracer.kept import KeptBytes, kept_bytes
from expertflow.tracer.load import load_model
from expertflow.tracer.types import ModelShape
from expertflow.tracer.unloaded import describe

from tests.families import SERVED, folder
from tests.models import tiny

CPU = torch.device("cpu")
OWN_LOOP = {"diffusion_gemma": "encoder", "nllb_moe": "decoder", "switch_transformers": "decoder"}
"""Families whose passes are not those of a causal model, and the part that fills their cache."""


def storages(value, seen, found) -> dict[int, int]:
    """Bytes of every storage that a cache reaches, by address."""
    if id(value) in seen:
        return found
    seen.append(id(value))
    if isinstance(value, torch.Tensor):
        if value.dim():
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            storages(part, seen, found)
    elif "Cache" in str(type(value).__mro__):
        storages(vars(value), seen, found)
    return found


def held(family, model, tokens) -> tuple[int, int]:
    """Positions in the cache after a real pass over so many tokens, and the bytes of it."""
    ids = torch.arange(tokens)[None] % 200 + 2
    part = OWN_LOOP.get(family, "")
    if part == "decoder":
        out = model(input_ids=ids, decoder_input_ids=ids[:, :1])
    else:
        whole = model.get_encoder() if part else model
        out = whole(input_ids=ids, use_cache=True)
    return tokens + (part == "decoder"), sum(storages(out.past_key_values, [], {}).values())


@pytest.mark.parametrize("family", SERVED)
def test_a_cache_holds_what_was_told_before(family):
    loaded = load_model(str(folder(family)), device=CPU)
    told = kept_bytes(loaded.model, loaded.layers)
    unloaded = describe(str(folder(family)), dtype="float32")

    assert unloaded.shape == loaded.shape
    assert unloaded.widths.is_by_pass
    assert told.is_asked
    assert loaded.shape.kv_bytes_per_token == told.per_token
    with torch.inference_mode():
        for tokens in (32, BLOCK):
            positions, really = held(family, loaded.model, tokens)
            planned = told.per_token * positions + told.per_sequence
            # Where a cache joins tokens, fractions of a byte and of a part count as one.
            slack = 0.002 * really if family == "deepseek_v4" else 0
            assert 0 <= planned - really <= slack


@pytest.mark.parametrize(
    ("family", "least"), [("deepseek_v32", 4 * 64), ("inkling", 0), ("mimo_v2_flash", 0)]
)
def test_keys_and_states_that_no_config_formula_knew_are_in_it(family, least):
    loaded = load_model(str(folder(family)), device=CPU)

    by_config = kept._by_config(loaded.model)

    assert not by_config.is_asked
    assert loaded.shape.kv_bytes_per_token > by_config.per_token + least - 1


def test_states_that_do_not_grow_are_told_apart():
    loaded = load_model(str(folder("qwen3_next")), device=CPU)
    told = kept_bytes(loaded.model, loaded.layers)

    # One layer in four attends: 2 x 2 heads x 8, in float32.
    assert told.per_token == 2 * 2 * 8 * 4
    assert told.per_sequence > 0


def test_layers_of_one_kind_count_as_often_as_there_are():
    for family in ("gpt_oss", "jamba", "deepseek_v4"):
        loaded = load_model(str(folder(family)), device=CPU)
        once = DryModel(loaded.model, loaded.layers, is_whole=True, echoes=True)
        each = DryModel(loaded.model, loaded.layers, is_whole=True, echoes=False)

        assert once.cache_bytes(2, BLOCK) == each.cache_bytes(2, BLOCK)


def test_asking_leaves_the_model_as_it_is():
    loaded = load_model(str(tiny("gpt_oss")), device=CPU)
    before = [(name, type(one), dict(vars(one))) for name, one in loaded.model.named_modules()]
    ids = torch.arange(2, 12)[None]
    with torch.inference_mode():
        expected = loaded.model(ids).logits

    dry = DryModel(loaded.model, loaded.layers, is_whole=True, echoes=True)
    dry.cache_bytes(1, BLOCK)
    dry.run(2, 8)

    after = [(name, type(one), dict(vars(one))) for name, one in loaded.model.named_modules()]
    assert before == after
    assert all(one.device == CPU for one in loaded.model.parameters())
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, expected)


def test_a_model_that_cannot_be_asked_is_read_from_its_config(monkeypatch):
    loaded = load_model(str(tiny("olmoe")), device=CPU)
    monkeypatch.setattr(kept, "dry_model", lambda model, layers: None)
    monkeypatch.setattr(kept, "_known", {})

    told = kept_bytes(loaded.model, loaded.layers)

    assert told == KeptBytes(3 * 2 * 2 * 8 * 4, 0, is_asked=False)
    assert isinstance(loaded.shape, ModelShape)
    assert told.per_token == loaded.shape.kv_bytes_per_token

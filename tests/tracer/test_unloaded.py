"""A model described from its config alone is the model that is loaded, and nothing of its size is ever allocated."""

import json

import pytest
import torch
from expertflow.tracer import kept
from expertflow.tracer.errors import ResourceError, UsageError
from expertflow.tracer.generate import Prompt
from expertflow.tracer.load import load_model
from expertflow.tracer.memory import peaks
from expertflow.tracer.unloaded import describe, tokenizer_of

from tests.families import REFUSED, config_of
from tests.models import tiny

MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 32_000,
    "hidden_size": 6144,
    "intermediate_size": 16_384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


def written(path, config) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_are_not_served_are_refused_before_any_download(family, tmp_path):
    config_of(family).save_pretrained(tmp_path)

    with pytest.raises(ResourceError):
        describe(str(tmp_path))


@pytest.fixture
def cannot_be_asked(monkeypatch):
    for module in (kept,):
        monkeypatch.setattr(module, "dry_model", lambda model, layers: None)
    monkeypatch.setattr(kept, "_known", {})


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_the_estimate_from_the_config_is_an_upper_one(family, cannot_be_asked):
    changes = {"hidden_size": 128} if family != "gpt_oss" else {"hidden_size": 128, "head_dim": 32}
    loaded = load_model(str(tiny(family, **changes)), device=torch.device("cpu"))
    widths = describe(str(tiny(family, **changes)), device=torch.device("cpu")).widths
    prompts = [Prompt(number, tuple(range(2, 200))) for number in range(2)]

    for info, peak in peaks(loaded, prompts, torch.device("cpu")):
        held = loaded.shape.kv_bytes_per_token * info.batch * info.context
        estimate = widths.activation_bytes(
            batch=info.batch, tokens=info.tokens, context=info.context
        )
        assert peak - held <= estimate
        if info.phase == "prefill":
            assert estimate < 12 * (peak - held)  # upper, not idle


@pytest.mark.parametrize("family", ["jamba", "kimi_linear", "deepseek_v32"])
def test_layers_that_are_not_plain_attention_make_it_an_estimate_only(
    family, tmp_path, cannot_be_asked
):
    config_of(family).save_pretrained(tmp_path)

    found = describe(str(tmp_path))

    assert not found.widths.is_upper
    assert not found.widths.is_by_pass
    assert any("KV cache per token is estimated" in note for note in found.notes)
    assert describe(str(tiny("mixtral"))).widths.is_upper


def test_a_model_far_larger_than_the_machine_is_described_at_once(tmp_path):
    found = describe(written(tmp_path, MIXTRAL))

    assert found.shape.expert_bytes == 3 * 6144 * 16_384 * 2
    assert found.shape.total_experts == 56 * 8
    assert found.shape.kv_bytes_per_token == 56 * 2 * 8 * 128 * 2
    assert found.widths.is_by_pass
    # At least the rows of the experts: each reads a state, and gives two of its width.
    rows = 8192 * 2 * (6144 + 2 * 16_384) * 2
    assert rows < found.widths.activation_bytes(batch=1, tokens=8192, context=8192) < 4 * rows
    assert found.shape.dtype == "bfloat16"
    assert (
        280e9
        < found.shape.total_experts * found.shape.expert_bytes + found.shape.non_expert_bytes
        < 283e9
    )
    assert found.notes == ()


def test_a_config_is_found_by_its_file_too(tmp_path):
    folder = written(tmp_path, MIXTRAL | {"num_hidden_layers": 2})

    by_file = describe(f"{folder}/config.json").shape

    assert by_file.num_moe_layers == 2


def test_the_number_format_is_the_configs_the_callers_or_the_largest(tmp_path):
    small = MIXTRAL | {"num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 32}
    none = {key: value for key, value in small.items() if key != "dtype"}
    packed = small | {"quantization_config": {"quant_method": "mxfp4"}}

    assert describe(written(tmp_path / "a", small), dtype="float32").shape.dtype == "float32"
    unnamed = describe(written(tmp_path / "b", none))
    assert unnamed.shape.dtype == "float32"
    assert "names no number format" in unnamed.notes[0]
    assert "stored as mxfp4" in describe(written(tmp_path / "c", packed)).notes[0]
    on_cpu = describe(written(tmp_path / "a", small), device=torch.device("cpu"))
    assert on_cpu.shape.dtype == "float32"  # what load_model takes there
    with pytest.raises(UsageError, match="int3"):
        describe(written(tmp_path / "a", small), dtype="int3")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "config"),
        ("{}", "config"),
        ('{"model_type": "no_such_family"}', "no_such_family"),
        ('{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32}', "no experts"),
        ('{"model_type": "mixtral", "num_hidden_layers": "two"}', "num_hidden_layers"),
    ],
)
def test_a_config_that_describes_no_moe_model_is_refused_in_a_sentence(tmp_path, config, words):
    (tmp_path / "config.json").write_text(config, encoding="utf-8")

    with pytest.raises(ResourceError, match=words):
        describe(str(tmp_path))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ResourceError, match="gone"):
        describe(str(tmp_path / "gone"))
    with pytest.raises(ResourceError, match="gone"):
        tokenizer_of(str(tmp_path / "gone"))


def test_the_embedded_model_needs_no_name():
    assert describe(None).shape.model_id == "embedded"
    assert describe("embedded").shape == describe(None).shape
    assert tokenizer_of("embedded")("a")["input_ids"]

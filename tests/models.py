"""Tiny random models on disk: real transformers classes, a byte tokenizer, seconds to make.

Weights are drawn wide, so that a wrong expert changes the text and not only the last digits. Every
folder is made once per test process and removed at its end. Importing this keeps torch on one thread:
with more, its barriers make passes crawl on a busy machine.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

torch.set_num_threads(1)

_COMMON: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
_MLA = {
    "num_key_value_heads": 4,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_FOUR = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("Olmoe", {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", _FOUR),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "intermediate_size": 32,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 32,
            "moe_intermediate_size": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 8,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "phimoe": ("Phimoe", _FOUR),
    "granitemoe": ("GraniteMoe", _FOUR),
    "deepseek_v2": ("DeepseekV2", {**_MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("DeepseekV3", {**_MLA, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}),
    "llama": ("Llama", {"intermediate_size": 32}),
}
DENSE = "llama"
FAMILIES = tuple(name for name in _CONFIGS if name != DENSE)


@functools.cache
def root() -> Path:
    """Where tiny models lie while the tests run."""
    root = Path(tempfile.mkdtemp(prefix="expertflow-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def tiny(family: str = "olmoe", **changes: int) -> Path:
    """Folder of a tiny model; `changes` override its config. Treat it as read-only."""
    kind, own = _CONFIGS[family]
    config = getattr(transformers, f"{kind}Config")(**{**_COMMON, **own, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    _widen_biases(model)
    name = "-".join([family, *(f"{key}{value}" for key, value in sorted(changes.items()))])
    folder = root() / name
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_prompts(path: Path, texts: Iterable[str]) -> Path:
    """A .jsonl file of prompts."""
    rows = ({"id": f"p{n}", "domain": "ab"[n % 2], "text": text} for n, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


TEXTS = (
    "The cat sat.",
    "def add(a, b): return a + b",
    "Zwei mal drei ist sechs",
    "x",
    "1, 2, 3, 5, 8,",
    "Once upon a time in the west",
)


def _widen_biases(model: torch.nn.Module) -> None:
    # Biases start at zero, where a lost one would not be seen.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte, <eos> 0 and <pad> 1 before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: place for place, token in enumerate(["<eos>", "<pad>", *alphabet])}
    inner = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>"
    )

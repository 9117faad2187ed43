"""Models by name whose size a replay can have: what their published config.json says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...tracer.errors import ResourceError, UsageError, unknown_name
from ...tracer.load import quiet_transformers

SHAPES: dict[str, dict[str, Any]] = {
    # https://huggingface.co/allenai/OLMoE-1B-7B-0924/blob/main/config.json
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
    },
    # https://huggingface.co/openai/gpt-oss-20b/blob/main/config.json
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201_088,
        "sliding_window": 128,
        "max_position_embeddings": 131_072,
    },
    # https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/config.json
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "head_dim": 128,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
    },
    # https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32_000,
        "max_position_embeddings": 32_768,
    },
}


def shape_config(name: str, **changes: Any) -> Any:
    """The config of a model by name, of a folder with config.json, or of such a file; `changes` override fields.

    Raises UsageError for an unknown name, ResourceError if a config cannot be read.
    """
    from transformers import AutoConfig

    path = Path(name)
    if name in SHAPES:
        fields = {**SHAPES[name], **changes}
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    if not path.exists():
        raise unknown_name("model shape (nor is it a folder with config.json)", name, SHAPES)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as cause:
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ResourceError(
            f"{name} holds no config that can be read: {first} Give a folder with config.json, or one of "
            f"{', '.join(SHAPES)}."
        ) from None
    for field, value in changes.items():
        if not hasattr(config, field):
            raise UsageError(f"{type(config).__name__} has no field {field!r}.")
        setattr(config, field, value)
    return config

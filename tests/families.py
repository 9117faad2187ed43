"""Every model family of the installed transformers that has experts, each as a tiny random model.

Families are found by walking the library's own folders, so that a new one shows up by itself. Tiny configs
are made by rule: a config class takes those of `_SMALL` that it knows, and what a family needs beyond that stands
in `_OWN`. Weights are random and wide, biases and the tables that steer routing are not zero: a gate that
is applied without its bias picks other experts.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from .models import byte_tokenizer, root
from .routers import routers

MODELS = Path(transformers.__file__).parent / "models"
LAYERS = 4

_AUTO = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_KEYPOINT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES",
)
_SMALL: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "sliding_window": 64,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "adapter_out_dim": 32,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "output_dim": 32,
    "image_size": 28,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "deepstack_visual_indexes": [0],
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "conv_chunksize": 8,
    "num_mel_bins": 16,
    "downsample_hidden_size": 8,
    "hidden_sizes": (8, 8, 8, 32),
    "depths": (1, 1, 1, 1),
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "projection_hidden_dim": 32,
}
_PIXELS = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
_FOUR_KINDS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
_DENSE_THEN_SPARSE = ["dense", "sparse", "sparse", "sparse"]
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
_OWN: dict[str, dict[str, Any]] = {
    "Aria": {
        "image_token_index": 9,
        "projector_patch_to_query_dict": {4: 4},
        "vision_config": {"model_type": "idefics3_vision", **_PIXELS},
    },
    "BailingHybrid": {"layer_types": _FOUR_KINDS},
    "Beam": {"mlp_layer_types": _DENSE_THEN_SPARSE},
    "Dbrx": {
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 16,
            "moe_num_experts": 8,
            "moe_top_k": 2,
        },
    },
    "DeepseekOcr2Text": {"mlp_layer_types": _DENSE_THEN_SPARSE, "num_key_value_heads": 4},
    "DiffusionGemma": {
        "vision_config": {"model_type": "gemma4_vision", **_PIXELS},
        "canvas_length": 8,
        "tie_word_embeddings": True,
    },
    "DiffusionGemmaText": {"tie_word_embeddings": True},
    "Doge": {"is_moe": True, "num_experts": 64},
    "Dots3NoteText": {
        "mlp_layer_types": _DENSE_THEN_SPARSE,
        "layer_types": ["indexed_attention"] * LAYERS,
    },
    "Dots3NoteVision": {
        "mlp_layer_types": _DENSE_THEN_SPARSE,
        "per_layer_config": {
            layer: {"num_local_experts": 4 * layer, "num_experts_per_tok": 2}
            for layer in range(1, LAYERS)
        },
    },
    "Ernie4_5_VLMoeText": {
        "moe_intermediate_size": [16, 8],
        "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]},
    },
    "Gemma4Text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 258,
    },
    "Glm4vMoeText": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
    "Glm5NextText": {
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "mlp_layer_types": _DENSE_THEN_SPARSE,
    },
    "GraniteMoeHybrid": {
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "layer_types": _FOUR_KINDS,
    },
    "InklingVision": {"patch_size": 40},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "JetMoe": {"kv_channels": 8, "num_key_value_heads": 2},
    "KimiLinear": {"layer_types": _FOUR_KINDS},
    "Lfm2Moe": {"layer_types": ["conv", "conv", "conv", "full_attention"]},
    "Llama4Text": {"num_experts_per_tok": 1},
    "LongcatFlash": {
        "num_layers": 2,
        "ffn_hidden_size": 24,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
    },
    "MistralLarge4": {"vision_config": {"model_type": "pixtral", **_PIXELS}},
    "MuseSparkText": {"moe_hidden_size": 16},
    "MuseSparkAudio": {"hidden_sizes": (8, 8, 8, 32), "num_hidden_layers": 4},
    "NemotronH": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
        "moe_latent_size": 16,
    },
    "NllbMoe": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "decoder_start_token_id": 0,
    },
    "Qwen4ExpText": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "layer_types": _FOUR_KINDS,
        "hc_lowrank": 8,
    },
    "Qwen3OmniMoeAudioEncoder": {"d_model": 32},
    "Qwen3OmniMoeThinker": {"vision_start_token_id": 151652},
    "Qwen3VLMoeText": {"rope_parameters": {**_MROPE, "mrope_interleaved": True}},
    "Step3p7Text": {"mlp_layer_types": _DENSE_THEN_SPARSE},
    "SwitchTransformers": {
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 1,
    },
    "VitPoseBackbone": {"part_features": 8, "image_size": 28, "patch_size": 14},
    "Zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def _sources(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("modeling_*.py"))]


@functools.cache
def families() -> tuple[str, ...]:
    """Folders of the library in which a class of experts is defined, whether dispatched by its registry or not."""
    return tuple(
        folder.name
        for folder in sorted(MODELS.iterdir())
        if folder.is_dir() and any(_defines_experts(source) for source in _sources(folder))
    )


def is_registered(family: str) -> bool:
    """Whether this version of the library dispatches the family's experts through its registry."""
    return any("use_experts_implementation" in source for source in _sources(MODELS / family))


_EXPERTS = re.compile(
    r"use_experts_implementation|^class \w*(Expert|MoE\b|Moe\b|MoeMLP)", re.MULTILINE
)


def _defines_experts(source: str) -> bool:
    return _EXPERTS.search(source) is not None


@functools.cache
def config_of(family: str) -> PretrainedConfig:
    """The family's own config, as large as a test can afford."""
    kind = _top_config(family)
    return kind(**_arguments(kind))


def _top_config(family: str) -> type[PretrainedConfig]:
    kinds = _configs(family)
    for mapping in _AUTO:
        names = getattr(modeling_auto, mapping, {})
        for kind in kinds:
            if kind.model_type in names:
                return kind
    return kinds[-1]


def _configs(family: str) -> list[type[PretrainedConfig]]:
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    return [
        kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and name.endswith("Config") and kind.__module__ == module.__name__
    ]


def _fields(kind: type[PretrainedConfig]) -> set[str]:
    known = set(inspect.signature(kind.__init__).parameters)
    return known.union(*(inspect.get_annotations(base) for base in kind.__mro__))


def _arguments(kind: type[PretrainedConfig]) -> dict[str, Any]:
    known = _fields(kind)
    name = kind.__name__.removesuffix("Config")
    small = dict(_SMALL)
    if any(word in name for word in ("Vision", "Audio", "Sam", "Code")):
        small |= _VISION
    if "kv_lora_rank" in known:
        small["num_key_value_heads"] = small["num_attention_heads"]
    arguments = {key: value for key, value in small.items() if key in known}
    for key, sub in kind.sub_configs.items():
        if sub is transformers.AutoConfig:
            sub = _sub_config(kind, key)
        if key in known and hasattr(sub, "model_type"):
            arguments[key] = {"model_type": sub.model_type, **_arguments(sub)}
    own = _OWN.get(name, {})
    return {**arguments, **own}


def _sub_config(kind: type[PretrainedConfig], key: str) -> type[PretrainedConfig] | None:
    """The family's own class for a part that may be of any family."""
    family = kind.__module__.rpartition(".")[2].removeprefix("configuration_")
    return next((one for one in _configs(family) if one.base_config_key == key), None)


def model_class(family: str) -> type[Any]:
    """The class a user of the family would load."""
    kind = _top_config(family)
    for mapping in _AUTO:
        name = getattr(modeling_auto, mapping, {}).get(kind.model_type)
        if name is not None:
            return getattr(transformers, name if isinstance(name, str) else name[0])
    raise LookupError(f"transformers has no auto class for {kind.__name__}")


def build(family: str) -> Any:
    """A tiny random model of the family, in float32 on the CPU."""
    torch.manual_seed(0)
    model = model_class(family)(config_of(family)).eval()
    stir(model)
    if family == "diffusion_gemma":
        model.generation_config.max_denoising_steps = 3
    return model


@functools.cache
def folder(family: str) -> Path:
    """Folder of the family's tiny model with a byte tokenizer. Treat it as read-only."""
    path = root() / f"family-{family}"
    build(family).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def stir(model: torch.nn.Module) -> None:
    """What starts at zero or one would hide that it was left out."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            last = name.rpartition(".")[2]
            if last == "tid2eid":
                experts = model.config.num_local_experts
                rows = [torch.randperm(experts)[: tensor.shape[1]] for _ in range(len(tensor))]
                tensor.copy_(torch.stack(rows))
            elif "bias" in last and tensor.is_floating_point():
                tensor.normal_(0.0, 0.3)
        for router in routers(model):
            for name, tensor in router.named_parameters():
                if tensor.dim() == 2 and "bias" not in name:
                    tensor.normal_(0.0, 1.0)  # or all tokens go to the experts of the bias


@functools.cache
def refusal(family: str) -> str | None:
    """Why the tool does not serve the family; None if it does."""
    from expertflow.tracer.errors import ResourceError
    from expertflow.tracer.load import load_model

    try:
        load_model(str(folder(family)), device=torch.device("cpu"))
    except ResourceError as refused:
        return str(refused)
    return None


REFUSED = (
    "doge",
    "jetmoe",
    "longcat_flash",
    "openai_privacy_filter",
    "vitpose_backbone",
    "zaya",
    # The oldest supported version has Aria's experts in a module of their own.
    *(() if is_registered("aria") else ("aria",)),
)
SERVED = tuple(family for family in families() if family not in REFUSED)

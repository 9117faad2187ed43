"""What a model will be once it is loaded, from its config alone: no weight is read or made.

The model is built on torch's meta device, where tensors have a shape and no memory; MoE layers are found in it as in a
loaded one (hooks.py, adapters), so whatever can be traced can be described. What it keeps of a text, and what a pass
makes, the model itself tells by passes over shapes (dry_pass.py).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import embedded
from .adapters import ADAPTERS, adapt
from .errors import ResourceError
from .hooks import ExpertLayer, expert_layers, model_shape
from .kept import NOT_ASKED, asked
from .load import EMBEDDED, choose_dtype, model_class, quiet_transformers
from .pass_peaks import PassPeaks
from .types import ModelShape
from .widths import PassWidths, WorkingTensors

_PLAIN = frozenset({"full_attention", "sliding_attention", "chunked_attention", "moe", "mlp"})
"""Kinds of layer whose working tensors are counted in full."""


@dataclass(frozen=True, slots=True)
class UnloadedModel:
    """A model's shape and working tensors, known from its config. `notes` are for whoever reads the numbers."""

    shape: ModelShape
    widths: WorkingTensors
    notes: tuple[str, ...] = ()
    is_adapted: bool = False
    """Its family keeps experts in its own way, so that they cannot be loaded one layer at a time."""


def describe(
    name: str | None,
    *,
    dtype: str = "auto",
    device: torch.device | None = None,
    revision: str | None = None,
) -> UnloadedModel:
    """Describe a Hub id (only its config is fetched), a folder with config.json, or the embedded model.

    `dtype` auto is what `load_model` would take on `device`; without a device, the checkpoint's own format.
    Raises ResourceError if there is no such config or its family is not served, UsageError for an unknown dtype.
    """
    source, is_embedded = _source(name)
    wanted = choose_dtype(dtype, device or torch.device("meta"))
    config = _read_config(source, revision)
    chosen, notes = _number_format(config, wanted)
    model = _on_meta(config, chosen, source)
    is_adapted = any(type(module).__name__ in ADAPTERS for module in model.modules())
    notes += adapt(model)
    layers = expert_layers(model)
    shape = model_shape(
        model, layers, model_id=EMBEDDED if is_embedded else source, revision=revision
    )
    widths = pass_widths(model, layers, shape)
    if not widths.is_by_pass:
        notes += (NOT_ASKED,)
    return UnloadedModel(shape, widths, notes, is_adapted)


def tokenizer_of(name: str | None) -> Any:
    """A model's tokenizer, without the model. Raises ResourceError if it cannot be had."""
    from transformers import AutoTokenizer

    source, _ = _source(name)
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as cause:
        raise ResourceError(
            f"The tokenizer of {source!r} could not be read: {_first_line(cause)} Give a folder with tokenizer.json, "
            "or a Hub id; offline, fetch it first with `hf download`."
        ) from None


def _source(name: str | None) -> tuple[str, bool]:
    """Where a model's files are, and whether it is the embedded one."""
    is_embedded = name in (None, EMBEDDED)
    return (str(embedded.MODEL_DIR) if is_embedded else str(name)), is_embedded


def _first_line(cause: Exception) -> str:
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _read_config(source: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    arguments: dict[str, Any] = {} if Path(source).exists() else {"revision": revision}
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(source, **arguments)
    except Exception as cause:  # families check their configs in ways of their own
        raise ResourceError(
            f"The config of {source!r} could not be read: {_first_line(cause)} Give a folder with config.json, or a "
            "Hub id; offline, fetch it first with `hf download MODEL config.json`."
        ) from None


def _number_format(config: Any, wanted: torch.dtype | str) -> tuple[torch.dtype, tuple[str, ...]]:
    """The format weights will have, and what should be said about it."""
    notes: tuple[str, ...] = ()
    packed = getattr(config, "quantization_config", None)
    if packed is not None:
        kind = packed.get("quant_method") if isinstance(packed, dict) else packed.quant_method
        notes = (
            f"The checkpoint is stored as {getattr(kind, 'value', kind)}; sizes here are of unpacked weights.",
        )
    if isinstance(wanted, torch.dtype):
        return wanted, notes
    told = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(told, str):
        told = getattr(torch, told, None)
    if isinstance(told, torch.dtype):
        return told, notes
    return torch.float32, (
        *notes,
        "The config names no number format; float32, the largest, is assumed. Name another with --dtype.",
    )


def _on_meta(config: Any, dtype: torch.dtype, source: str) -> Any:
    kind = model_class(config)
    # Auto classes and models call it by different names.
    make = getattr(kind, "from_config", None) or kind._from_config
    try:
        with quiet_transformers(), torch.device("meta"):
            return make(config, dtype=dtype).eval()
    except ResourceError:
        raise
    except Exception as cause:  # a config can be wrong in as many ways as there are families
        raise ResourceError(
            f"No model can be built from the config of {source!r}: {type(cause).__name__}: {_first_line(cause)} "
            "Check that config.json is complete and made for the installed transformers (`expertflow-trace doctor`)."
        ) from None


def pass_widths(model: Any, layers: list[ExpertLayer], shape: ModelShape) -> WorkingTensors:
    """What a model's passes make, whether it has weights or not: by passes over shapes, else by its config."""
    kept, dry = asked(model, layers)
    widths = _widths(model, layers, shape, kept.per_sequence)
    return widths if dry is None else PassPeaks(dry, kept.per_sequence, widths)


def _widths(
    model: Any, layers: list[ExpertLayer], shape: ModelShape, kept_per_sequence: int
) -> PassWidths:
    config = model.config.get_text_config(decoder=True)
    return PassWidths(
        hidden=shape.hidden_size,
        layer=_widest_layer(model, layers),
        expert=_expert_width(layers[0]),
        top_k=shape.top_k,
        attended=max(_attended(one) for one in _by_layer(config)),
        score_heads=_score_heads(config),
        vocab=shape.vocab_size,
        keeps_logits="logits_to_keep" not in inspect.signature(model.forward).parameters,
        item_bytes=model.dtype.itemsize,
        is_upper=_is_plain(config),
        kept_per_sequence=kept_per_sequence,
    )


def _widest_layer(model: nn.Module, layers: list[ExpertLayer]) -> int:
    """Results of all matrices of one layer, summed, in the layer where they are most."""
    experts = {layer.name for layer in layers}
    tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    sums: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        place = _layer_of(name)
        if not place or parameter.dim() < 2 or owner in experts or owner in tables:
            continue
        sums[place] = sums.get(place, 0) + parameter.shape[0]
    return max(sums.values(), default=0)


def _layer_of(name: str) -> str:
    """The path of the layer a parameter belongs to: up to its first number; empty outside layers."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def _expert_width(layer: ExpertLayer) -> int:
    """Elements of one token in one expert: what it reads, what its projections give, and what it writes."""
    module: Any = layer.module
    inner = module.down_proj.shape[1 if module.is_transposed else 2]
    return 2 * layer.input_size + (3 if module.has_gate else 2) * inner


def _is_plain(config: Any) -> bool:
    """Whether every layer attends to keys and values, and to nothing else."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return kinds <= _PLAIN and not getattr(config, "index_n_heads", None)


def _by_layer(config: Any) -> list[Any]:
    """A config for each layer, where they differ; else the config itself."""
    each = getattr(config, "per_layer_config", None)
    if not each:
        return [config]
    return [each[place] for place in range(config.num_hidden_layers)]


def _attended(config: Any) -> int:
    """Elements that one layer's attention makes of a cached position: keys and values for all heads.

    A compressed state is spread out to all heads, and joined with its rotated part.
    """
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", 1)
    own = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    parts = (getattr(config, name, None) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    size = max(
        own or config.hidden_size // heads, sum(parts), getattr(config, "v_head_dim", None) or 0
    )
    index = (getattr(config, "index_n_heads", None) or 0) * (
        getattr(config, "index_head_dim", None) or 0
    )
    return (6 if getattr(config, "kv_lora_rank", None) else 2) * heads * size + index


def _score_heads(config: Any) -> int:
    """Heads whose scores become a tensor: all without a fused kernel, and those of an index over the positions."""
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", 1)
    is_fused = getattr(config, "_attn_implementation", None) in ("sdpa", "flash_attention_2")
    return (0 if is_fused else heads) + (getattr(config, "index_n_heads", None) or 0)

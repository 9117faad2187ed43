"""What a model keeps of a text between passes: its KV cache and its states, in bytes.

The model itself is asked, by a pass over shapes (dry_pass.py). A family that cannot be asked is estimated from its
config, which knows keys and values, or one compressed state for both, and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .dry_pass import BLOCK, DryModel, dry_model

if TYPE_CHECKING:
    from .hooks import ExpertLayer

NOT_ASKED = (
    "KV cache per token is estimated from the config: what this model keeps could not be worked out by a pass over "
    "shapes. Index keys and states are not in it."
)


@dataclass(frozen=True, slots=True)
class KeptBytes:
    """Bytes of one sequence: what grows with each token, and what every sequence has whatever its length.

    As a pass over the whole text leaves it: layers with a sliding window still hold what lies before it then, and let
    go of it in the next pass. `is_asked`: the model told; else its config did.
    """

    per_token: int
    per_sequence: int
    is_asked: bool


_known: dict[str, tuple[KeptBytes, DryModel | None]] = {}


def kept_bytes(model: Any, layers: Sequence[ExpertLayer]) -> KeptBytes:
    """What a model keeps. It may have weights or none, and is left as it is."""
    return asked(model, layers)[0]


def asked(model: Any, layers: Sequence[ExpertLayer]) -> tuple[KeptBytes, DryModel | None]:
    """What a model keeps, and its dry copy if it has one. Models of one class and config are asked once."""
    told = {**model.config.to_dict(), "_name_or_path": ""}
    key = f"{type(model).__qualname__} {model.dtype} {json.dumps(told, default=str)}"
    if key not in _known:
        dry = dry_model(model, layers)
        _known[key] = (kept_by(dry) if dry is not None else _by_config(model), dry)
    return _known[key]


def kept_by(dry: DryModel) -> KeptBytes:
    """What a dry model keeps, by two passes of one sequence; fractions of a byte count as one."""
    (few, less), (many, more) = dry.cache_bytes(1, BLOCK), dry.cache_bytes(1, 2 * BLOCK)
    per_token = (more - less) / (many - few)
    return KeptBytes(math.ceil(per_token), max(0, round(less - per_token * few)), is_asked=True)


_NO_CACHE = frozenset({"linear_attention", "mamba", "conv", "moe", "mlp", "recurrent"})
"""Kinds of layer whose state does not grow with the text."""


def _by_config(model: Any) -> KeptBytes:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        number = getattr(config, "decoder_layers", None) or config.num_decoder_layers
        elements = number * _cached_elements(config)
        return KeptBytes(elements * model.dtype.itemsize, 0, is_asked=False)
    number = config.num_hidden_layers
    kinds = (getattr(config, "layer_types", None) or [])[:number] or [""] * number
    # Configs that differ from layer to layer can be asked for one layer only.
    each = getattr(config, "per_layer_config", None)
    layers = [each[place] if each else config for place in range(number)]
    caching = [layer for layer, kind in zip(layers, kinds, strict=False) if kind not in _NO_CACHE]
    elements = sum(_cached_elements(layer) for layer in caching)
    return KeptBytes(elements * model.dtype.itemsize, 0, is_asked=False)


def _cached_elements(config: Any) -> int:
    """Elements that one layer of attention keeps of one token."""
    latent = getattr(config, "kv_lora_rank", None)
    if latent:  # latent attention caches one compressed state and one rotated key for all heads
        return latent + config.qk_rope_head_dim
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return 2 * heads * (size or config.hidden_size // config.num_attention_heads)

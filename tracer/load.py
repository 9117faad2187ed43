"""Loads a transformers MoE model and says what it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import embedded
from .adapters import adapt
from .blocks import HostBlocks, Tier
from .errors import ResourceError, UsageError, is_out_of_memory
from .hooks import ExpertLayer, choose_implementation, expert_layers, model_shape
from .streamed import load_streamed
from .types import ModelShape

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEFAULT_IMPLEMENTATION = "grouped_mm"
EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on the host, ready to be placed, with its tokenizer and shape.

    `modalities` names the token ids that stand for something other than text. `notes` are sentences that whoever
    reads a trace of this model should know. `blocks` hold its experts if they were loaded straight into them.
    """

    model: Any
    tokenizer: Any
    layers: list[ExpertLayer]
    shape: ModelShape
    eos_ids: frozenset[int]
    pad_id: int
    implementation: str
    modalities: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    blocks: HostBlocks | None = None

    @property
    def max_lookahead(self) -> int:
        """How many layers ahead gates can be asked; 0 if no gate can be asked early."""
        return len(self.layers) - 1 if any(layer.gate for layer in self.layers) else 0

    def pack(self, *, tier: Tier = "ram", pin: bool = False) -> HostBlocks:
        """Its experts as blocks, which leaves the model without weights of its own. Raises ResourceError."""
        if self.blocks is None:
            return HostBlocks(self.layers, tier=tier, pin=pin)
        for layer in self.layers:
            self.blocks.take_over(layer)
        return self.blocks


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` to a device. Raises ResourceError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError(
            "No CUDA device is visible to torch. Use --device cpu, or check `expertflow-trace doctor`."
        )
    if not name.startswith(("cpu", "cuda")):
        raise UsageError(f"Unknown device {name!r}; allowed: auto, cpu, cuda, cuda:N.")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """`auto` is the checkpoint's own type, but float32 on the CPU, where half types are slow."""
    if name not in DTYPES:
        raise UsageError(f"Unknown dtype {name!r}; allowed: {', '.join(DTYPES)}.")
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else "auto"


def load_model(
    name: str | None,
    *,
    device: torch.device,
    dtype: str = "auto",
    implementation: str = DEFAULT_IMPLEMENTATION,
    revision: str | None = None,
    tier: Tier = "ram",
) -> LoadedModel:
    """Load a Hub id, a folder, or (None or "embedded") the model shipped with the package.

    The model stays on the host; the caller places it. With `tier` "disk" its experts are loaded straight into a file,
    a layer at a time. Raises ResourceError when it cannot be had.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer

    is_embedded = name in (None, EMBEDDED)
    source = str(embedded.MODEL_DIR) if is_embedded else str(name)
    arguments: dict[str, Any] = (
        {} if is_embedded or Path(source).is_dir() else {"revision": revision}
    )
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source, **arguments)
            tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
            arguments["dtype"] = choose_dtype(dtype, device)
            model, blocks = _weights(config, source, arguments, tier)
    except (MemoryError, RuntimeError) as cause:
        if not is_out_of_memory(cause):
            raise
        hint = (
            "choose a smaller one" if tier == "disk" else "keep its experts in a file (--tier disk)"
        )
        raise ResourceError(
            f"Model {source!r} does not fit in host memory: {hint}, or give it more."
        ) from None
    except (OSError, ValueError, SafetensorError) as cause:
        first = str(cause).strip().splitlines()[0]
        raise ResourceError(
            f"Model {source!r} could not be loaded: {first} Give a folder with config.json and "
            "safetensors, or a Hub id; offline, fetch it first with `hf download`."
        ) from None
    model.eval()
    notes = adapt(model)
    layers = expert_layers(model)
    choose_implementation(layers, implementation)
    shape = model_shape(
        model, layers, model_id=EMBEDDED if is_embedded else source, revision=revision
    )
    eos_ids = _eos_ids(model, tokenizer)
    pad_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos_ids, default=0)
    )
    return LoadedModel(
        model,
        tokenizer,
        layers,
        shape,
        eos_ids,
        pad_id,
        implementation,
        modalities=_modalities(model.config),
        notes=notes,
        blocks=blocks,
    )


def _weights(
    config: Any, source: str, arguments: Mapping[str, Any], tier: Tier
) -> tuple[Any, HostBlocks | None]:
    kind = model_class(config)
    if tier == "disk":
        return load_streamed(kind, config, source, arguments)
    return kind.from_pretrained(source, **arguments), None


_TOWERS = {"qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration"}
"""Checkpoints of several models, and the class of the one that reads and writes text."""


def model_class(config: Any) -> Any:
    """What loads a checkpoint of this config with its head that writes text.

    Raises ResourceError if it writes none.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    name = config.model_type
    if name in _TOWERS:
        return getattr(transformers, _TOWERS[name])
    if name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForSeq2SeqLM
    sees = hasattr(config, "vision_config")
    if name in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and sees:
        return transformers.AutoModelForImageTextToText
    if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    if name in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    raise ResourceError(
        f"A {type(config).__name__} ({name}) describes no model that writes text, which is what is traced. Allowed: "
        "causal, encoder-decoder and image-text models. See docs/families.md."
    )


def _modalities(config: Any) -> dict[int, str]:
    found: dict[int, str] = {}
    for label in ("image", "video", "audio"):
        for suffix in ("token_id", "token_index"):
            token = getattr(config, f"{label}_{suffix}", None)
            if isinstance(token, int):
                found[token] = label
    return found


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list) else [found])


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the library's progress bars and notices off the terminal: ours say what happens."""
    from transformers.utils import logging

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()

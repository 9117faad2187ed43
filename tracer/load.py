"""Loads a transformers MoE model and says what it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import embedded
from .errors import ResourceError, UsageError
from .hooks import ExpertLayer, expert_layers, model_shape
from .types import ModelShape

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEFAULT_IMPLEMENTATION = "grouped_mm"
EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on the host, ready to be placed, with its tokenizer and shape."""

    model: Any
    tokenizer: Any
    layers: list[ExpertLayer]
    shape: ModelShape
    eos_ids: frozenset[int]
    pad_id: int
    implementation: str


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
) -> LoadedModel:
    """Load a Hub id, a folder, or (None or "embedded") the model shipped with the package.

    The model stays on the host; the caller places it. Raises ResourceError when it cannot be had.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_embedded = name in (None, EMBEDDED)
    source = str(embedded.MODEL_DIR) if is_embedded else str(name)
    arguments: dict[str, Any] = (
        {} if is_embedded or Path(source).is_dir() else {"revision": revision}
    )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=choose_dtype(dtype, device), **arguments
            )
    except (OSError, ValueError, SafetensorError) as cause:
        first = str(cause).strip().splitlines()[0]
        raise ResourceError(
            f"Model {source!r} could not be loaded: {first} Give a folder with config.json and "
            "safetensors, or a Hub id; offline, fetch it first with `hf download`."
        ) from None
    model.eval()
    layers = expert_layers(model)
    model.set_experts_implementation(implementation)
    shape = model_shape(
        model, layers, model_id=EMBEDDED if is_embedded else source, revision=revision
    )
    eos_ids = _eos_ids(model, tokenizer)
    pad_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos_ids, default=0)
    )
    return LoadedModel(model, tokenizer, layers, shape, eos_ids, pad_id, implementation)


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

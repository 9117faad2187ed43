"""A predictor's folder: `card.json`, `predictor.safetensors` and `paths/`. The card is written last."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...simulator.paths import CARD, WEIGHTS, PredictorCard, read_card
from ...tracer.errors import InputError, UsageError
from ...tracer.records import from_json, write_json
from .model import PathModel, PathShape


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Raise UsageError if a predictor would be written over something that should stay."""
    if not folder.exists() or (overwrite and (folder / CARD).is_file()):
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    what = (
        "exists: pass --overwrite to replace it"
        if (folder / CARD).is_file()
        else "is not a predictor's folder: empty it"
    )
    raise UsageError(f"{folder} {what}, or choose another --out.")


def write_predictor(folder: Path, model: PathModel) -> str:
    """Write the weights into a fresh folder; returns their sha256. Old contents go."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    path = folder / WEIGHTS
    state = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(state, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_card(folder: Path, card: PredictorCard) -> None:
    """Write the card: from now on the folder is a predictor's."""
    write_json(folder / CARD, card)


def load_predictor(folder: Path, device: torch.device) -> tuple[PathModel, PredictorCard]:
    """Read a predictor, ready to predict on a device. Raises InputError for damaged or foreign files."""
    card = read_card(folder)
    shape = from_json(PathShape, card.predictor, f"{folder / CARD}: predictor")
    path = folder / WEIGHTS
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != card.weights_sha256:
            raise InputError(
                f"{path} was changed after the card was written; train the predictor again."
            )
        model = PathModel(shape)
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as cause:
        first = str(cause).splitlines()[0]
        raise InputError(f"{path} does not hold this predictor's weights: {first}") from None
    return model.to(device).eval(), card

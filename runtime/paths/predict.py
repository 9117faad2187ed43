"""What a predictor says of recorded tokens, all at once: for evaluation and for replays."""

from __future__ import annotations

import numpy as np
import torch

from ...simulator.paths import PathTable
from ...tracer.store import NO_EXPERT
from .data import Routed, path_batch
from .model import PathModel


def ranked_experts(
    model: PathModel, found: Routed, sequences: np.ndarray, most: int, batch_size: int = 16
) -> np.ndarray:
    """The `most` likeliest experts of every token of these sequences: uint16 [all tokens, layers, most].

    Likeliest first; NO_EXPERT for tokens of other sequences and for the start of prompts longer than the window.
    """
    device = next(model.parameters()).device
    ranked = np.full((len(found.token), found.num_layers, most), NO_EXPERT, np.uint16)
    was_training = model.training
    model.eval()
    order = sequences[np.argsort(np.diff(found.first)[sequences], kind="stable")]
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size].tolist()
            batch = path_batch(found, chosen, model.shape.window).to(device)
            both = model(batch.prompt, batch.is_real, batch.fed)
            for logits, place in zip(both, (batch.prompt_place, batch.fed_place), strict=True):
                ids = likeliest(logits, most)
                ranked[place[place >= 0]] = ids[place >= 0]
    model.train(was_training)
    return ranked


def likeliest(logits: torch.Tensor, most: int) -> np.ndarray:
    """Ids of the `most` largest logits, largest first: uint16 [..., most]."""
    return logits.topk(most, dim=-1).indices.to("cpu", torch.int32).numpy().astype(np.uint16)


def path_table(model: PathModel, found: Routed, sequences: np.ndarray, most: int) -> PathTable:
    """Predicted paths of these sequences, as the simulator reads them."""
    ranked = ranked_experts(model, found, sequences, most)
    tokens = np.flatnonzero(ranked[:, 0, 0] != NO_EXPERT)
    return PathTable(
        sequence=found.number[found.sequence_of()[tokens]].astype(np.int64),
        position=found.position[tokens].astype(np.int64),
        experts=ranked[tokens],
    )

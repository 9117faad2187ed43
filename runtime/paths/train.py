"""Training: masked cross-entropy per expert, AdamW, warm-up and cosine, until validation recall no longer rises."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ...tracer.console import Reporter
from ...tracer.errors import UsageError
from ...tracer.store import NO_EXPERT
from .data import PathBatch, Routed, Split, path_batch, shuffled, targets
from .evaluate import decode_tokens, recall_at
from .model import PathModel, PathShape
from .predict import ranked_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Settings of a training; `patience` epochs without a better validation recall end it."""

    epochs: int = 25
    batch_size: int = 8
    learning_rate: float = 1e-2
    weight_decay: float = 0.01
    warm_up: float = 0.1
    clip_norm: float = 1.0
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        is_rate = 0 < self.learning_rate < math.inf
        if self.epochs < 1 or self.batch_size < 1 or self.patience < 1 or not is_rate:
            raise UsageError(
                f"--epochs {self.epochs}, --batch-size {self.batch_size} and --patience {self.patience} must be at "
                f"least 1, --lr {self.learning_rate} a number above 0."
            )


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the training prompts: mean loss, and recall at k on the validation prompts."""

    number: int
    loss: float
    recall: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Trained:
    """The best model seen, and the course of the training. `stopped` says why it ended."""

    model: PathModel
    best: int
    course: tuple[Epoch, ...]
    stopped: str


def train(
    found: Routed,
    split: Split,
    shape: PathShape,
    settings: Training,
    device: torch.device,
    report: Reporter,
) -> Trained:
    """Train a predictor. Ctrl-C after the first epoch ends the training and keeps the best so far.

    On the CPU the same seed and number of threads give the same weights.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        model = PathModel(shape).to(device)
        return _train(model, found, split, settings, device, report)


def _train(
    model: PathModel,
    found: Routed,
    split: Split,
    settings: Training,
    device: torch.device,
    report: Reporter,
) -> Trained:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    per_epoch = steps_per_epoch(split, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _schedule(per_epoch * settings.epochs, settings.warm_up)
    )
    draw = np.random.default_rng(settings.seed)
    course: list[Epoch] = []
    best, kept, stopped = -1, copy.deepcopy(model.state_dict()), "epochs"
    try:
        for number in range(settings.epochs):
            began = time.perf_counter()
            losses: list[float] = []
            model.train()
            for sequences in shuffled(found, split.sequences["train"], settings.batch_size, draw):
                batch = path_batch(found, sequences, model.shape.window).to(device)
                losses.append(_step(model, found, batch, optimizer, settings.clip_norm))
                schedule.step()
                report.advance()
            recall = _validation_recall(model, found, split, settings.batch_size)
            seconds = time.perf_counter() - began
            course.append(Epoch(number, float(np.mean(losses)), recall, seconds))
            if best < 0 or recall > course[best].recall:
                best, kept = number, copy.deepcopy(model.state_dict())
            report.phase(f"validation recall {recall:.3f}, best {course[best].recall:.3f}")
            if number - best >= settings.patience:
                stopped = "patience"
                break
    except KeyboardInterrupt:
        if best < 0:
            raise
        stopped = "interrupted"
    model.load_state_dict(kept)
    return Trained(model.eval(), best, tuple(course), stopped)


def steps_per_epoch(split: Split, settings: Training) -> int:
    """Optimizer steps of one pass over the training prompts."""
    return -(-len(split.sequences["train"]) // settings.batch_size)


def masked_bce(logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Sum over the known (token, layer) pairs of the cross-entropy averaged over experts, and their number: [2].

    `logits` [..., layers, experts], `experts` [..., layers, top_k] with NO_EXPERT where nothing is known.
    """
    is_known = (experts != NO_EXPERT).all(dim=-1)
    chosen, logits = experts[is_known], logits[is_known]
    truth = torch.zeros_like(logits).scatter_(-1, chosen, 1.0)
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(dim=-1)
    return torch.stack((loss.sum(), is_known.sum().to(loss.dtype)))


def _step(
    model: PathModel,
    found: Routed,
    batch: PathBatch,
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
) -> float:
    device = batch.prompt.device
    prompt, fed = model(batch.prompt, batch.is_real, batch.fed)
    total = masked_bce(prompt, targets(found, batch.prompt_place).to(device))
    total = total + masked_bce(fed, targets(found, batch.fed_place).to(device))
    loss = total[0] / total[1].clamp(min=1.0)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return float(loss.detach())


def _schedule(steps: int, warm_up: float) -> Callable[[int], float]:
    rising = max(1, int(steps * warm_up))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


def _validation_recall(model: PathModel, found: Routed, split: Split, batch_size: int) -> float:
    sequences = split.sequences["validation"]
    ranked = ranked_experts(model, found, sequences, found.top_k, batch_size)
    tokens = decode_tokens(found, sequences)
    if not len(tokens):  # every one ended with its first token
        tokens = found.tokens_of(sequences)
    return float(np.nanmean(recall_at(ranked[tokens], found.experts[tokens], found.top_k)))

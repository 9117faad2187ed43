"""How long a path predictor takes by itself: reading prompts, and one decode step, from token ids to expert ids."""

from __future__ import annotations

import time
from statistics import median

import torch

from ...simulator.paths import PathLatency
from ...tracer.generate import StepTokens
from .live import PathFollower
from .model import PathModel

BATCHES = (1, 8)
_WARM_UP = 5
_PROMPTS = 10
_STEPS = 100


def measure_latency(
    model: PathModel, device_name: str, *, prompt_tokens: int, most: int
) -> PathLatency:
    """Medians on the device the model is on, with nothing beside it."""
    points = [(batch, *_seconds(model, batch, prompt_tokens, most)) for batch in BATCHES]
    return PathLatency(device=device_name, prompt_tokens=prompt_tokens, points=tuple(points))


def _seconds(model: PathModel, batch: int, prompt_tokens: int, most: int) -> tuple[float, float]:
    follower = PathFollower(model, most)
    draw = torch.Generator().manual_seed(0)
    prompt = [
        _timed(follower, batch, range(prompt_tokens), model, draw)
        for _ in range(_WARM_UP + _PROMPTS)
    ]
    steps = [
        _timed(follower, batch, range(prompt_tokens + n, prompt_tokens + n + 1), model, draw)
        for n in range(_WARM_UP + _STEPS)
    ]
    return median(prompt[_WARM_UP:]), median(steps[_WARM_UP:])


def _timed(
    follower: PathFollower, batch: int, places: range, model: PathModel, draw: torch.Generator
) -> float:
    ids = torch.randint(0, model.shape.vocab_size, (batch * len(places),), generator=draw)
    tokens = StepTokens(
        sequence=[row for row in range(batch) for _ in places],
        position=list(places) * batch,
        token_id=ids.tolist(),
    )
    began = time.perf_counter()
    follower.step(tokens, batch)
    return time.perf_counter() - began

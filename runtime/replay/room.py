"""The check of room (runtime/room.py) for a replay: weights are drawn where they stay, and nothing is loaded."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...tracer.blocks import Tier
from ...tracer.load import LoadedModel
from ...tracer.unloaded import UnloadedModel, pass_widths
from ..deploy import RunRequest
from ..room import Room, room_of
from ..run_size import largest
from .plan import ReplayPlan


def replay_room(
    loaded: LoadedModel,
    plan: ReplayPlan,
    device: torch.device,
    *,
    batch_size: int = 1,
    tier: Tier = "ram",
    memory: str | None = None,
) -> Room:
    """What replays of a plan need on an unfilled model, and what may be used."""
    found = UnloadedModel(loaded.shape, pass_widths(loaded.model, loaded.layers, loaded.shape))
    size = largest(plan.prompts, batch_size, plan.new_tokens)
    room = room_of(found, size, RunRequest(device=str(device), tier=tier, memory=memory))
    return replace(room, needs=replace(room.needs, is_drawn=True))

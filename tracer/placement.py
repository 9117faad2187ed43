"""Decides where a model lives: resident on the device, or streamed through it."""

from __future__ import annotations

import os
from typing import Literal

import torch

from .blocks import TIERS, Tier
from .errors import ResourceError, UsageError
from .host_memory import available_host_bytes
from .probe import host_bytes
from .quantities import format_bytes
from .types import HardwareProfile, LinkProfile, ModelShape

Residency = Literal["auto", "resident", "stream"]
_HEADROOM = 0.85
"""Share of free device memory that weights may take; the rest is for KV cache and working tensors."""


def choose_residency(
    wanted: str, shape: ModelShape, device: torch.device
) -> Literal["resident", "stream"]:
    """Resident if the whole model fits, else stream. Raises ResourceError, UsageError."""
    if wanted not in ("auto", "resident", "stream"):
        raise UsageError(f"Unknown residency {wanted!r}; allowed: auto, resident, stream.")
    total = shape.non_expert_bytes + shape.total_experts * shape.expert_bytes
    free = free_bytes(device)
    fits = total <= _HEADROOM * free
    if wanted == "resident" and not fits:
        raise ResourceError(
            f"The model takes {format_bytes(total)}, {device} has {format_bytes(free)} free. "
            "Use --residency stream."
        )
    if wanted == "auto":
        return "resident" if fits else "stream"
    return "resident" if wanted == "resident" else "stream"


def choose_tier(name: str) -> Tier:
    """`ram` or `disk`. Raises UsageError."""
    if name not in TIERS:
        raise UsageError(f"Unknown tier {name!r}; allowed: {', '.join(TIERS)}.")
    return name


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now: on the host within its container's limit.

    On CUDA with what torch has taken of the device and holds no tensor: earlier models of this process leave that.
    """
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    return available_host_bytes()


def total_bytes(device: torch.device) -> int:
    """Memory the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_bytes()


def use_threads(threads: int | None, device: torch.device) -> int:
    """Set torch's CPU threads; by default one core is left to the copy thread.

    With as many compute threads as cores, the copy thread pushes one of them aside and every parallel
    region waits for it: passes were seen to take 80 times as long.
    """
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = max(1, (cores or 2) - 1) if device.type == "cpu" else torch.get_num_threads()
    if threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}.")
    torch.set_num_threads(threads)
    return threads


def hardware_profile(
    device: torch.device, link: LinkProfile, threads: int, name: str, group_s: float = 0.0
) -> HardwareProfile:
    """This machine, as the time model sees it."""
    return HardwareProfile(
        name=name,
        device=str(device),
        device_bytes=total_bytes(device),
        host_bytes=host_bytes(),
        threads=threads,
        link=link,
        origin="measured",
        group_s=group_s,
    )

"""Measures a machine: copies through the runtime's own engine, and one layer of a real model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from ..blocks import BlockLayout
from ..copies import CHUNK_BYTES, copy_engine
from ..kernels import measure_group_s
from ..link import CopyTimes, busy_device, copy_sizes, link_name, pinning, time_copies
from ..load import LoadedModel
from ..probe import machine_name, provenance
from ..quantities import LinkSpec
from .compute import measure_experts, measure_launch_s, measure_readback
from .document import CopyLine, CopyPoint, ProfileFile
from .fit import NOISY, POOR_FIT, drift, fit_copies, fit_experts, fit_line, sample

CONCURRENT = (1, 4)
"""Copies asked for at once: one, and as many as an event's misses."""
SOURCE_BYTES = 32 * 2**20
"""Blocks copied from take turns over this much memory: experts that are fetched are seldom in a cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRequest:
    """What to measure. `expert_bytes` None: the model's own block."""

    name: str
    device: torch.device
    threads: int
    link: LinkSpec | None = None
    expert_bytes: int | None = None
    repeats: int = 15


@dataclass(frozen=True, slots=True)
class _Copies:
    points: tuple[CopyPoint, ...]
    lines: tuple[CopyLine, ...]
    wake_s: float
    submit_s: float
    drift: float


def stages(device: torch.device) -> int:
    """How often `measure_profile` will report progress."""
    return len(pinning(device)) * 2 * len(CONCURRENT) + 3


def measure_profile(
    request: ProfileRequest, loaded: LoadedModel, advance: Callable[[int], None]
) -> ProfileFile:
    """Measure everything and draw the lines. Raises UsageError for an emulated link on CUDA."""
    device, shape = request.device, loaded.shape
    block = request.expert_bytes or shape.expert_bytes
    copies = _measure_copies(request, block, advance)
    layer = loaded.layers[0]
    layer.module.to(device)
    experts = measure_experts(layer, shape, device, loaded.implementation, request.repeats)
    advance(1)
    readback = measure_readback(shape.top_k, device, request.repeats)
    launch_s = measure_launch_s(device, request.repeats)
    advance(1)
    layout = BlockLayout.of(layer)
    group_s = measure_group_s(layer, layout, shape, device, loaded.implementation)
    advance(1)
    experts_line = fit_experts(experts)
    spreads = [p.time.spread for p in (*copies.points, *experts) if not getattr(p, "busy", False)]
    return ProfileFile(
        name=request.name,
        device=str(device),
        machine=machine_name(str(device)),
        threads=request.threads,
        link=request.link.text if request.link else link_name(device),
        link_origin="emulated" if request.link else "measured",
        model_id=shape.model_id,
        expert_bytes=block,
        chunk_bytes=CHUNK_BYTES,
        copies=copies.points,
        copy_lines=copies.lines,
        experts=experts,
        experts_line=experts_line,
        readback=readback,
        readback_line=fit_line(
            ("1", "tokens"),
            [(1.0, float(point.tokens)) for point in readback],
            [point.time.seconds for point in readback],
        ),
        launch_s=launch_s,
        wake_s=copies.wake_s,
        submit_s=copies.submit_s,
        group_s=group_s,
        repeat_spread=copies.drift,
        provenance=provenance(0, "own-generation"),
        warnings=warnings_of(
            copies.lines, experts_line.residual, float(np.median(spreads)), copies.drift
        ),
    )


def warnings_of(
    lines: Sequence[CopyLine], experts_residual: float, spread: float, drifted: float
) -> tuple[str, ...]:
    """What makes a profile hard to trust, in words."""
    found: list[str] = []
    if spread > NOISY or drifted > NOISY:
        found.append(
            f"The machine is busy: timings scatter by {spread:.0%} and drifted by {drifted:.0%} within the "
            "measurement. Measure again when it is quiet."
        )
    poor = [one for one in lines if one.line.residual > POOR_FIT]
    if poor:
        worst = max(poor, key=lambda one: one.line.residual)
        found.append(
            f"{len(poor)} of {len(lines)} lines through the copies fit poorly (median error up to "
            f"{worst.line.residual:.0%}): trust the points near the block size, not sizes far from it."
        )
    if experts_residual > POOR_FIT:
        found.append(
            f"The line through the experts' times fits poorly (median error {experts_residual:.0%})."
        )
    return tuple(found)


def _measure_copies(request: ProfileRequest, block: int, advance: Callable[[int], None]) -> _Copies:
    device, sizes = request.device, copy_sizes(block)
    points: list[CopyPoint] = []
    lines: list[CopyLine] = []
    singles: list[CopyTimes] = []
    for pinned, busy, concurrent in product(pinning(device), (False, True), CONCURRENT):
        engine = copy_engine(device, time.perf_counter, pinned=pinned, link=request.link)
        own: list[CopyPoint] = []
        try:
            with busy_device(device, busy):
                for size in sizes:
                    times = time_copies(
                        engine, device, time.perf_counter, size, request.repeats,
                        pinned=pinned, concurrent=concurrent, source_bytes=SOURCE_BYTES,
                    )  # fmt: skip
                    own.append(
                        CopyPoint(
                            num_bytes=size,
                            pinned=pinned,
                            busy=busy,
                            concurrent=concurrent,
                            time=sample(times.seconds),
                        )
                    )
                    if not busy and concurrent == 1:
                        singles.append(times)
        finally:
            engine.close()
        points += own
        lines.append(
            CopyLine(pinned=pinned, busy=busy, concurrent=concurrent, line=fit_copies(own))
        )
        advance(1)
    return _Copies(
        tuple(points),
        tuple(lines),
        wake_s=float(np.median([times.wake_s for times in singles])),
        submit_s=float(np.median([times.submit_s for times in singles])),
        drift=float(np.median([drift(times.seconds) for times in singles])),
    )

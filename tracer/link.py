"""Measures the link where it is used: same engine, same kind of memory, same block sizes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from .copies import CHUNK_BYTES, Copy, CopyEngine, copy_engine
from .quantities import LinkSpec
from .types import ExpertKey, LinkCurve, LinkProfile, Origin


@dataclass(frozen=True, slots=True)
class CopyTimes:
    """Repeated copies of one size: seconds of each, and the medians of what a wait and a request cost on top."""

    seconds: list[float]
    wake_s: float
    submit_s: float


def measure_link(
    device: torch.device,
    now: Callable[[], float],
    *,
    block_bytes: int,
    link: LinkSpec | None = None,
    repeats: int = 15,
) -> LinkProfile:
    """Time copies of the block size and sizes around it, idle and under compute, pinned or not.

    Each curve point is the median over `repeats` single copies. `wake_s` is what a wait costs on top of
    the copy itself.
    """
    sizes = copy_sizes(block_bytes)
    curves: list[LinkCurve] = []
    waits: list[tuple[float, float]] = []
    for pinned in pinning(device):
        for busy in (False, True):
            curve, *wait = _curve(device, now, sizes, link, repeats, pinned=pinned, busy=busy)
            curves.append(curve)
            waits.append((wait[0], wait[1]))
    origin: Origin = "emulated" if link else "measured"
    return LinkProfile(
        name=link.text if link else link_name(device),
        origin=origin,
        curves=tuple(curves),
        wake_s=waits[0][0],
        submit_s=waits[0][1],
        chunk_bytes=CHUNK_BYTES,
    )


def _curve(
    device: torch.device,
    now: Callable[[], float],
    sizes: Sequence[int],
    link: LinkSpec | None,
    repeats: int,
    *,
    pinned: bool,
    busy: bool,
) -> tuple[LinkCurve, float, float]:
    points: list[tuple[int, float]] = []
    spreads: list[float] = []
    wakes: list[float] = []
    submits: list[float] = []
    engine = copy_engine(device, now, pinned=pinned, link=link)
    try:
        with busy_device(device, busy):
            for size in sizes:
                times = time_copies(engine, device, now, size, repeats, pinned=pinned)
                low, middle, high = np.quantile(times.seconds, [0.25, 0.5, 0.75])
                points.append((size, float(middle)))
                spreads.append(float((high - low) / middle))
                wakes.append(times.wake_s)
                submits.append(times.submit_s)
    finally:
        engine.close()
    spread = float(np.median(spreads))
    curve = LinkCurve(pinned=pinned, busy=busy, points=tuple(points), spread=spread)
    return curve, float(np.median(wakes)), float(np.median(submits))


def copy_sizes(block_bytes: int) -> list[int]:
    """The block's own size and some around it."""
    return sorted({max(4096, block_bytes // 4), block_bytes, 2 * block_bytes, 4 * block_bytes})


def pinning(device: torch.device) -> tuple[bool, ...]:
    """Kinds of host memory there are: page-locked or not, which only CUDA tells apart."""
    return (True, False) if device.type == "cuda" else (False,)


def time_copies(
    engine: CopyEngine,
    device: torch.device,
    now: Callable[[], float],
    size: int,
    repeats: int,
    *,
    pinned: bool,
    concurrent: int = 1,
    source_bytes: int = 0,
) -> CopyTimes:
    """Time copies of `size` bytes, `concurrent` of them asked for at once: seconds are per copy.

    Blocks take turns so that `source_bytes` lie between two copies of the same one: a cache shows them colder.
    """
    blocks = max(concurrent, -(-source_bytes // size))
    sources = [torch.ones(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(blocks)]
    targets = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(concurrent)]
    seconds: list[float] = []
    wakes: list[float] = []
    submits: list[float] = []
    for repeat in range(repeats + 2):
        first = repeat * concurrent
        copies = [
            Copy(ExpertKey(0, place), sources[(first + place) % blocks], target, "demand", repeat)
            for place, target in enumerate(targets)
        ]
        asked = now()
        engine.submit(copies)
        submitted = now()
        engine.wait(copies)
        back = now()
        engine.take_records()
        if repeat >= 2:  # the first copies fault pages in
            took = max(c.end_s for c in copies) - min(c.start_s for c in copies)
            submits.append((submitted - asked) / concurrent)
            seconds.append(took / concurrent)
            wakes.append(max(0.0, back - submitted - took))
    return CopyTimes(seconds, float(np.median(wakes)), float(np.median(submits)))


@contextmanager
def busy_device(device: torch.device, busy: bool) -> Iterator[None]:
    """Keep the device computing while copies are timed, if `busy`."""
    if not busy:
        yield
        return
    stop = threading.Event()
    matrix = torch.rand(512, 512, device=device)

    def work() -> None:
        while not stop.is_set():
            torch.mm(matrix, matrix)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        yield
    finally:
        stop.set()
        worker.join()


def link_name(device: torch.device) -> str:
    """What the real link of a device is called."""
    return "host to device" if device.type == "cuda" else "host memory to host memory"

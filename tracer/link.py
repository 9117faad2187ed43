"""Measures the link where it is used: same engine, same kind of memory, same block sizes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from .copies import CHUNK_BYTES, Copy, CopyEngine, copy_engine
from .quantities import LinkSpec
from .types import ExpertKey, LinkCurve, LinkProfile, Origin


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
    sizes = sorted({max(4096, block_bytes // 4), block_bytes, 2 * block_bytes, 4 * block_bytes})
    curves: list[LinkCurve] = []
    waits: list[tuple[float, float]] = []
    for pinned in (True, False) if device.type == "cuda" else (False,):
        for busy in (False, True):
            curve, *wait = _curve(device, now, sizes, link, repeats, pinned=pinned, busy=busy)
            curves.append(curve)
            waits.append((wait[0], wait[1]))
    origin: Origin = "emulated" if link else "measured"
    return LinkProfile(
        name=link.text if link else _link_name(device),
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
        with _load(device, busy):
            for size in sizes:
                seconds, wake, submit = _time_copies(
                    engine, device, now, size, repeats, pinned=pinned
                )
                low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
                points.append((size, float(middle)))
                spreads.append(float((high - low) / middle))
                wakes.append(wake)
                submits.append(submit)
    finally:
        engine.close()
    spread = float(np.median(spreads))
    curve = LinkCurve(pinned=pinned, busy=busy, points=tuple(points), spread=spread)
    return curve, float(np.median(wakes)), float(np.median(submits))


def _time_copies(
    engine: CopyEngine,
    device: torch.device,
    now: Callable[[], float],
    size: int,
    repeats: int,
    *,
    pinned: bool,
) -> tuple[list[float], float, float]:
    source = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    target = torch.zeros(size, dtype=torch.uint8, device=device)
    seconds: list[float] = []
    wakes: list[float] = []
    submits: list[float] = []
    for repeat in range(repeats + 2):
        asked = now()
        copy = Copy(ExpertKey(0, 0), source, target, "demand", repeat)
        engine.submit([copy])
        submitted = now()
        engine.wait([copy])
        back = now()
        engine.take_records()
        if repeat >= 2:  # the first copies fault pages in
            submits.append(submitted - asked)
            seconds.append(copy.end_s - copy.start_s)
            wakes.append(max(0.0, back - submitted - seconds[-1]))
    return seconds, float(np.median(wakes)), float(np.median(submits))


@contextmanager
def _load(device: torch.device, busy: bool) -> Iterator[None]:
    """Keep the device computing while copies are timed."""
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


def _link_name(device: torch.device) -> str:
    return "host to device" if device.type == "cuda" else "host memory to host memory"

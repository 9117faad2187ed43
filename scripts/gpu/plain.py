"""Cells of baselines that run without a policy: stock transformers, and Accelerate's device map."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from expertflow.runtime.accelerated import accelerated_runs
from expertflow.runtime.stock import PlainRuns, stock_runs
from expertflow.tracer.errors import ResourceError
from expertflow.tracer.placement import choose_residency
from expertflow.tracer.records import to_json

from .cells import Cell
from .evidence import CellRecord
from .settings import Settings
from .subjects import PlainModel, Subject


def plain_cell(
    subject: Subject, cell: Cell, batch: int, settings: Settings, key: str
) -> CellRecord:
    """Build the model anew, run it, and let it go. Raises ResourceError if it cannot be run here."""
    began = time.monotonic()
    # A whole layer crosses the bus in every pass, one after the other: a few passes tell its speed.
    is_slow = cell.kind == "accelerate"
    repeats = 1 if is_slow else settings.repeats
    measured: list[Any] = []
    samples: list[dict[str, Any]] = []
    try:
        with subject.plain(cell.kind, batch) as model, _runs(model, cell, batch, settings) as runs:
            for _ in range(repeats):
                result, outputs = model.run(runs)
                measured.append(to_json(result))
                samples.append({"token_s": [[round(s, 7) for s in o.token_s] for o in outputs]})
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return CellRecord(
        key=key,
        subject=subject.name,
        kind=cell.kind,
        batch=batch,
        share=cell.share,
        settings=settings.fingerprint(),
        predicted=None,
        measured=measured,
        samples=samples,
        seconds=round(time.monotonic() - began, 1),
        notes=[*measured[0]["warnings"]],
    )


@contextmanager
def _runs(model: PlainModel, cell: Cell, batch: int, settings: Settings) -> Iterator[PlainRuns]:
    shape, device = model.prepared.loaded.shape, model.prepared.device
    if cell.kind == "stock":
        if choose_residency("auto", shape, device) == "stream":
            raise ResourceError(f"{shape.model_id} does not fit {device} as a whole.")
        yield stock_runs(model.prepared, batch_size=batch, max_new_tokens=settings.new_tokens)
        return
    slots = max(1, round(cell.share * shape.total_experts))
    with accelerated_runs(
        model.prepared, slots=slots, batch_size=1, max_new_tokens=settings.plain_tokens
    ) as runs:
        yield runs

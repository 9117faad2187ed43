"""The goals that the project sets itself on a GPU, each computed from the cells: met, missed, or not measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from expertflow.tracer.types import LinkCurve

from .cells import HALF
from .evidence import CellRecord

STOCK, ACCELERATE, WRITE_BACK, BUS, MEMORY, SPEED = 0.9, 5.0, 1.3, 0.9, 0.02, 0.10
Bus = Sequence[tuple[int, float]]
"""Seconds of one copy out of page-locked memory by its bytes, ascending; empty where there is no bus."""
_BASELINES = frozenset({"stock", "accelerate", "lru_write_back", "resident", "whole_layer"})


@dataclass(frozen=True, slots=True)
class Bar:
    """One goal and what was found. `value` is None where the cells it needs were not measured."""

    name: str
    subject: str
    goal: str
    value: float | None
    shown: str
    is_met: bool

    @property
    def verdict(self) -> Literal["met", "missed", "not measured"]:
        """In a word or two."""
        if self.value is None:
            return "not measured"
        return "met" if self.is_met else "missed"


def bars(cells: Sequence[CellRecord], bus: Bus) -> list[Bar]:
    """All goals: those of speed by model, those of forecasts over all cells."""
    subjects = list(dict.fromkeys(cell.subject for cell in cells))
    found = [bar for subject in subjects for bar in _of_subject(subject, cells, bus)]
    return [*found, _memory(cells), _speed(cells), _same(cells)]


def _of_subject(subject: str, cells: Sequence[CellRecord], bus: Bus) -> list[Bar]:
    own = [cell for cell in cells if cell.subject == subject]
    return [
        *(_resident(subject, own, batch) for batch in sorted({cell.batch for cell in own})),
        _accelerate(subject, own),
        _write_back(subject, own),
        _bus(subject, own, bus),
    ]


def _resident(subject: str, cells: Sequence[CellRecord], batch: int) -> Bar:
    ours, stock = _cell(cells, "resident", batch), _cell(cells, "stock", batch)
    value = _ratio(ours, stock, "tokens_per_s")
    name = f"all resident against stock transformers, batch {batch}"
    return _at_least(name, subject, STOCK, value)


def _accelerate(subject: str, cells: Sequence[CellRecord]) -> Bar:
    others = _cell(cells, "accelerate", 1)
    value = _ratio(_best(cells), others, "decode", "tokens_per_s")
    name = "best policy against Accelerate at half of the experts, batch 1, decode"
    return _at_least(name, subject, ACCELERATE, value)


def _write_back(subject: str, cells: Sequence[CellRecord]) -> Bar:
    value = _ratio(_best(cells), _cell(cells, "lru_write_back", 1), "tokens_per_s")
    name = "best policy against LRU with write-back at half of the experts, batch 1"
    return _at_least(name, subject, WRITE_BACK, value)


def _bus(subject: str, cells: Sequence[CellRecord], bus: Bus) -> Bar:
    copies = [
        (sample["copy_bytes"], seconds)
        for cell in cells
        if cell.kind in ("lru", "on_demand")
        for sample in cell.samples
        for seconds in sample.get("copy_s", ())
        if seconds > 0
    ]
    value = None
    if copies and bus:
        best = LinkCurve(pinned=True, busy=False, points=tuple((size, s) for size, s in bus))
        value = statistics.median(best.copy_s(size) / seconds for size, seconds in copies)
    name = "demand copies against the bus's measured peak at the block size"
    return _at_least(name, subject, BUS, value)


def _memory(cells: Sequence[CellRecord]) -> Bar:
    gaps = [abs(gap) for cell in cells if (gap := gap_of(cell, "peak_device_bytes")) is not None]
    return _at_most("peak memory against the forecast, worst cell", MEMORY, max(gaps, default=None))


def _speed(cells: Sequence[CellRecord]) -> Bar:
    gaps = [abs(gap) for cell in cells if (gap := gap_of(cell, "tokens_per_s")) is not None]
    value = statistics.median(gaps) if gaps else None
    return _at_most(f"throughput against the forecast, median of {len(gaps)} cells", SPEED, value)


def _same(cells: Sequence[CellRecord]) -> Bar:
    """Lossless policies give one text, and their logs replay."""
    results = [result for cell in cells if cell.predicted is not None for result in cell.measured]
    wrong = sum(
        result["same_tokens"] is False or result["log_replays"] is False for result in results
    )
    return Bar(
        "same text, and logs that replay",
        "all",
        "every run",
        float(wrong) if results else None,
        f"{len(results) - wrong} of {len(results)} runs",
        not wrong,
    )


def gap_of(cell: CellRecord, *path: str) -> float | None:
    """Predicted over measured, less one; None if there is no prediction."""
    predicted = cell.foretold(*path)
    measured = cell.median(*path)
    return None if predicted is None or not measured else predicted / measured - 1


def _cell(cells: Sequence[CellRecord], kind: str, batch: int) -> CellRecord | None:
    return next((c for c in cells if (c.kind, c.batch) == (kind, batch)), None)


def _best(cells: Sequence[CellRecord]) -> CellRecord | None:
    """The fastest policy at half of the experts, batch 1, baselines aside."""
    ours = [c for c in cells if c.batch == 1 and c.share == HALF and c.kind not in _BASELINES]
    return max(ours, key=lambda cell: cell.median("tokens_per_s"), default=None)


def _ratio(one: CellRecord | None, other: CellRecord | None, *path: str) -> float | None:
    if one is None or other is None or not other.median(*path):
        return None
    return one.median(*path) / other.median(*path)


def _at_least(name: str, subject: str, goal: float, value: float | None) -> Bar:
    return _bar(name, subject, f"at least {goal:g}×", value, "{:.2f}×", lambda found: found >= goal)


def _at_most(name: str, goal: float, value: float | None) -> Bar:
    return _bar(name, "all", f"at most {goal:.0%}", value, "{:.1%}", lambda found: found <= goal)


def _bar(
    name: str,
    subject: str,
    goal: str,
    value: float | None,
    form: str,
    holds: Callable[[float], bool],
) -> Bar:
    if value is None:
        return Bar(name, subject, goal, None, "–", False)
    return Bar(name, subject, goal, value, form.format(value), holds(value))

"""The folder of a sweep: rows in parts as they come, one table at the end, and sweep.json beside it.

A part is written under another name and renamed, so a kill loses the rows of the last seconds and nothing
else.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..tracer.errors import InputError, UsageError
from ..tracer.probe import DISTRIBUTION
from ..tracer.records import from_json, read_json, write_json
from ..tracer.types import Provenance
from .sweep_row import Row, rows_of, table_of

SWEEP_FORMAT = "expertflow.sweep/1"
DOCUMENT = "sweep.json"
RESULTS = "results.parquet"
PARTS = "parts"
_PART_ROWS = 20
_PART_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineNote:
    """The machine of a sweep. `links` are those tried; `hash` covers the costs."""

    hash: str
    device: str
    links: tuple[str, ...]
    is_calibrated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOf:
    """The best deployable row and the best bound at one budget behind one link, by the first objective."""

    budget: str
    slots: int
    link: str
    best: str
    bound: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFile:
    """`sweep.json`. `pareto` and `best` name rows of results.parquet by their keys.

    `status` is running, interrupted or finished. `counts`: planned, resumed, predicted, failed, bounds.
    """

    trace_id: str
    model_id: str
    machine: MachineNote
    space: Mapping[str, Any]
    search: Mapping[str, Any]
    seed: int
    status: str
    provenance: Provenance
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    pareto: tuple[str, ...] = ()
    best: tuple[BestOf, ...] = ()
    warnings: tuple[str, ...] = ()
    format: str = SWEEP_FORMAT


class SweepFolder:
    """Rows on disk, by key. `clock` is for tests."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        self.damaged: list[Path] = []
        self._clock = clock
        self._fresh: list[Row] = []
        self._last_s = clock()

    def open(self, document: SweepFile, *, fresh: bool) -> SweepFile | None:
        """Take up what is there if it belongs to the same trace and machine; returns its sweep.json.

        `fresh` throws it away. Raises UsageError for a folder of another sweep, or of something else.
        """
        before = self._document()
        if before is None and self.path.exists() and any(self.path.iterdir()):
            raise UsageError(
                f"{self.path} holds files but no {DOCUMENT}: it is not the folder of a sweep. Choose "
                "another --out."
            )
        if before is not None and fresh:
            self._clear()
            before = None
        if before is not None:
            self._require_same(before, document)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / PARTS).mkdir(exist_ok=True)
        self._read()
        write_json(self.path / DOCUMENT, document)
        return before

    def add(self, row: Row) -> None:
        """Keep a row; it is on disk a few seconds later."""
        self.rows[row.key] = row
        self._fresh.append(row)
        if len(self._fresh) >= _PART_ROWS or self._clock() - self._last_s >= _PART_S:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet."""
        self._last_s = self._clock()
        if not self._fresh:
            return
        numbers = [int(p.stem.rpartition("-")[2]) for p in self._parts()]
        name = f"part-{max(numbers, default=-1) + 1:05d}.parquet"
        _write(self.path / PARTS / name, table_of(self._fresh))
        self._fresh = []

    def finish(self, document: SweepFile, order: list[str]) -> None:
        """Merge the parts into one table, rows of `order` first, and write the final sweep.json."""
        self.flush()
        keys = dict.fromkeys((*order, *self.rows))
        _write(self.path / RESULTS, table_of(self.rows[key] for key in keys))
        write_json(self.path / DOCUMENT, document)
        shutil.rmtree(self.path / PARTS)

    def stop(self, document: SweepFile) -> None:
        """Leave the parts as they are, to be continued."""
        self.flush()
        write_json(self.path / DOCUMENT, document)

    def _parts(self) -> list[Path]:
        return sorted((self.path / PARTS).glob("part-*.parquet"))

    def _read(self) -> None:
        for path in (self.path / RESULTS, *self._parts()):
            if not path.exists():
                continue
            try:
                rows = rows_of(pq.ParquetFile(path).read())
            except (OSError, pa.ArrowException, ValueError, TypeError):
                self.damaged.append(path)
                continue
            self.rows |= {row.key: row for row in rows}

    def _document(self) -> SweepFile | None:
        path = self.path / DOCUMENT
        if not path.exists():
            return None
        try:
            return read_sweep(path)
        except InputError as error:
            raise InputError(f"{error} Choose another --out, or remove {self.path}.") from None

    def _clear(self) -> None:
        for name in (RESULTS, DOCUMENT):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / PARTS, ignore_errors=True)

    def _require_same(self, before: SweepFile, now: SweepFile) -> None:
        pairs = (
            ("trace", before.trace_id, now.trace_id),
            ("machine", before.machine.hash, now.machine.hash),
        )
        for what, old, new in pairs:
            if old != new:
                raise UsageError(
                    f"{self.path} holds a sweep of another {what} ({old}, now {new}). Pass --fresh to "
                    "throw it away, or choose another --out."
                )


def toolkit(document: SweepFile) -> str:
    """The version of the toolkit that began a sweep."""
    return document.provenance.versions.get(DISTRIBUTION, "")


def read_sweep(path: Path) -> SweepFile:
    """Read and check `sweep.json`. Raises InputError."""
    document = read_json(path)
    found = document.get("format") if isinstance(document, dict) else None
    if found != SWEEP_FORMAT:
        raise InputError(f"{path} is not a sweep: format is {found!r}, expected {SWEEP_FORMAT!r}.")
    return from_json(SweepFile, document, path.name)


def _write(path: Path, table: pa.Table) -> None:
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)

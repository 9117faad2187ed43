"""A run as bars in time, of a simulation or of a recording: what computed, what was copied, what was waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..simulator.account import RunRecord
from ..tracer.errors import TraceError
from ..tracer.schema import WHOLE_STEP, Manifest, table_schemas
from ..tracer.store import read_part
from .data import BAD_INPUT, FileKey, Found, Problem, manifest_of, reason_of, trace_key
from .frames import Frame

MOST_BARS: Final = 4_000
COLUMNS: Final = ("lane", "cause", "start_s", "end_s", "step", "layer", "expert", "bytes")
COMPUTE, COPY, WAIT = "compute", "copies", "waiting"
_PARTS: Final = (
    ("mixer_s", COMPUTE, "attention, norms, router"),
    ("readback_s", COMPUTE, "host: read-back, policy, look-ahead"),
    ("decision_s", COMPUTE, "host: read-back, policy, look-ahead"),
    ("lookahead_s", COMPUTE, "host: read-back, policy, look-ahead"),
    ("stall_s", WAIT, "for loads"),
    ("experts_s", COMPUTE, "experts"),
    ("cpu_s", WAIT, "for experts on the CPU"),
)
"""Parts of a layer's row in the order they are run, with their lane and cause."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """Bars of some passes, one row each (COLUMNS); `passes` has one row per pass of the whole run or part.

    `passes`: step, phase, start_s, total_s, stall_s, loads. `is_recorded` tells a real run from a simulated one.
    """

    bars: Frame
    passes: Frame
    is_recorded: bool
    left_out: int = 0


def passes_of(columns: Mapping[str, Sequence[Any] | np.ndarray]) -> Frame:
    """One row per pass from the columns of a steps table."""
    number = np.asarray(columns["step"], dtype=np.int64)
    layer = np.asarray(columns["layer"], dtype=np.int64)
    stall = np.asarray(columns["stall_s"], dtype=np.float64)
    is_whole = layer == WHOLE_STEP
    whole = number[is_whole]
    order = np.argsort(whole, kind="stable")
    place = np.searchsorted(whole[order], number[~is_whole]).clip(max=max(len(whole) - 1, 0))
    waited = np.bincount(order[place], stall[~is_whole], len(whole)) if len(whole) else stall[:0]
    return pd.DataFrame(
        {
            "step": whole,
            "phase": np.asarray(columns["phase"], dtype=object)[is_whole],
            "tokens": np.asarray(columns["tokens"])[is_whole],
            "start_s": np.asarray(columns["start_s"], dtype=np.float64)[is_whole],
            "total_s": np.asarray(columns["total_s"], dtype=np.float64)[is_whole],
            "stall_s": waited,
        }
    ).sort_values("step", ignore_index=True)


def bars_of(columns: Mapping[str, Sequence[Any]], first: int, last: int) -> Frame:
    """Compute and waits of passes `first` to `last` (both included), part after part within a layer's row.

    A layer that ran in several waves is drawn as one wait and one computation.
    """
    frame: Frame = pd.DataFrame({n: columns[n] for n in ("step", "layer", "start_s")})
    keep = frame["step"].between(first, last) & (frame["layer"] != WHOLE_STEP)
    rows = frame[keep]
    at = rows["start_s"].to_numpy(dtype=np.float64)
    pieces: list[Frame] = []
    for name, lane, cause in _PARTS:
        if name not in columns:
            continue
        seconds = np.asarray(columns[name], dtype=np.float64)[keep.to_numpy()]
        seconds = np.nan_to_num(seconds)
        piece = pd.DataFrame(
            {
                "lane": lane,
                "cause": cause,
                "start_s": at,
                "end_s": at + seconds,
                "step": rows["step"].to_numpy(),
                "layer": rows["layer"].to_numpy(),
                "expert": -1,
                "bytes": 0,
            }
        )
        pieces.append(piece[seconds > 0])
        at = at + seconds
    return pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame(columns=list(COLUMNS))


def copies_of_record(record: RunRecord, first: int, last: int) -> Frame:
    """Copies that passes asked for, by why they were made; a late prefetch is one that was waited for."""
    rows = [
        {
            "lane": COPY,
            "cause": cause_of(copy.why, copy.needed_s, copy.end_s),
            "start_s": copy.start_s,
            "end_s": copy.end_s,
            "step": copy.step,
            "layer": copy.key.layer,
            "expert": copy.key.expert,
            "bytes": copy.num_bytes,
        }
        for copy in record.copies
        if first <= copy.step <= last and copy.start_s >= 0
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def cause_of(why: str, needed_s: float | None, end_s: float) -> str:
    """The cause of a copy as the timeline names it."""
    if why != "prefetch":
        return why
    is_late = needed_s is not None and not np.isnan(needed_s) and end_s > needed_s
    return "late prefetch" if is_late else "prefetch"


def simulated(record: RunRecord, first: int, last: int) -> Timeline:
    """The window of a simulated run."""
    pieces = [bars_of(record.steps, first, last), copies_of_record(record, first, last)]
    return _cut(
        pd.concat([p for p in pieces if len(p)] or pieces[:1]), passes_of(record.steps), False
    )


def recorded_passes(trace: Found[Manifest]) -> Frame | Problem:
    """One row per recorded pass, or what kept the table from being read."""
    try:
        return _recorded_passes(trace_key(trace))
    except BAD_INPUT as error:
        return Problem(f"{trace.name}: steps", reason_of(error, trace.path, trace.path))


def recorded(trace: Found[Manifest], first: int, last: int) -> Timeline | Problem:
    """The window of the recorded run: only its rows are read."""
    try:
        key = trace_key(trace)
        columns = _rows(key, "steps", first, last)
        pieces = [bars_of(columns, first, last), _recorded_copies(key, first, last)]
        passes = _recorded_passes(key)
    except BAD_INPUT as error:
        return Problem(f"{trace.name}: steps", reason_of(error, trace.path, trace.path))
    return _cut(pd.concat([p for p in pieces if len(p)] or pieces[:1]), passes, True)


@lru_cache(maxsize=8)
def _recorded_passes(key: FileKey) -> Frame:
    folder, manifest = manifest_of(key)
    schema = table_schemas(manifest.shape, manifest.recorded)["steps"]
    names = ["step", "layer", "phase", "tokens", "start_s", "total_s", "stall_s"]
    pieces = [
        passes_of(_columns(read_part(folder / file.path, schema, names)))
        for file in manifest.tables.get("steps", ())
    ]
    if not pieces:
        raise TraceError("the trace holds no times.")
    return pd.concat(pieces, ignore_index=True)


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    """Columns as arrays; labels as text."""
    return {
        name: table[name].cast(pa.string()).to_numpy()
        if pa.types.is_dictionary(table[name].type)
        else table[name].to_numpy()
        for name in table.column_names
    }


def _rows(key: FileKey, table: str, first: int, last: int) -> dict[str, list[Any]]:
    folder, manifest = manifest_of(key)
    schema = table_schemas(manifest.shape, manifest.recorded)[table]
    window = (pc.field("step") >= first) & (pc.field("step") <= last)
    found: dict[str, list[Any]] = {name: [] for name in schema.names}
    for file in manifest.tables.get(table, ()):
        rows = read_part(folder / file.path, schema, None, window).to_pydict()
        for name, values in rows.items():
            found[name] += values
    return found


def _recorded_copies(key: FileKey, first: int, last: int) -> Frame:
    columns = _rows(key, "transfers", first, last)
    causes = [
        cause_of(why, needed, end)
        for why, needed, end in zip(
            columns["why"], columns["needed_s"], columns["end_s"], strict=True
        )
    ]
    return pd.DataFrame(
        {
            "lane": COPY,
            "cause": causes,
            **{
                name: columns[name]
                for name in ("start_s", "end_s", "step", "layer", "expert", "bytes")
            },
        },
        columns=list(COLUMNS),
    )


def _cut(bars: Frame, passes: Frame, is_recorded: bool) -> Timeline:
    """At most MOST_BARS bars: the first passes of the window, the others counted."""
    bars = bars.sort_values(["step", "start_s"], ignore_index=True)
    left_out = 0
    if len(bars) > MOST_BARS:
        end = int(bars["step"].iloc[MOST_BARS])
        kept = bars[bars["step"] < end]
        kept = kept if len(kept) else bars.head(MOST_BARS)
        left_out = int(bars["step"].nunique() - kept["step"].nunique())
        bars = kept
    return Timeline(bars=bars, passes=passes, is_recorded=is_recorded, left_out=left_out)

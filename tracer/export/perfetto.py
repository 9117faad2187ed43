"""A trace's own run as a timeline for Perfetto."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from ..errors import InputError, UsageError
from ..store import Trace
from .file import written_text
from .timeline import CopyColumns, Timeline, build_timeline, event_lines


def trace_timeline(trace: Trace, window: range | None = None) -> Timeline:
    """Lay out what a trace measured. Raises InputError if it has no times, UsageError for an empty window."""
    if not trace.has_times:
        raise InputError(
            f"{trace.path} holds no times, so there is no timeline; its routing was imported. Simulate it on a "
            "declared machine: expertflow-trace simulate … --timeline FILE."
        )
    steps = _columns(trace.table("steps"))
    if window is not None and not set(window) & set(np.unique(steps["step"]).tolist()):
        last = int(np.max(steps["step"]))
        raise UsageError(
            f"No step lies in {window.start}:{window.stop}; the trace has 0 to {last}."
        )
    transfers = trace.table("transfers")
    link = trace.hardware.link.origin
    title = f"measured: {trace.shape.model_id} on {trace.hardware.name}"
    title += "" if link == "measured" else f" ({link} link)"
    return build_timeline(title, steps, _copies(transfers), window)


def parse_window(option: str, text: str) -> range:
    """Steps written as FIRST:END. Raises UsageError naming the option."""
    first, colon, last = text.partition(":")
    if not colon or not (first or "0").isdecimal() or not last.isdecimal():
        raise UsageError(f"{option} {text!r} is not understood; write FIRST:END, such as 100:200.")
    window = range(int(first or 0), int(last))
    if not window:
        raise UsageError(f"{option} {text} holds no step; END must be larger than FIRST.")
    return window


def write_timeline(path: Path, timeline: Timeline, *, overwrite: bool = False) -> int:
    """Write a timeline as JSON, packed if `path` ends in .gz; returns the bytes written.

    Raises UsageError if the file exists, ResourceError if it cannot be written.
    """
    return written_text(path, event_lines(timeline), overwrite=overwrite)


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(table[name].to_pylist())
        if pa.types.is_dictionary(table[name].type)
        else table[name].to_numpy()
        for name in table.column_names
    }


def _copies(table: pa.Table) -> CopyColumns | None:
    if not table.num_rows:
        return None
    names = ("step", "layer", "expert", "bytes", "queued_s", "start_s", "end_s")
    return CopyColumns(
        **{name: table[name].to_numpy() for name in names},
        needed_s=table["needed_s"].to_numpy(zero_copy_only=False).astype(np.float64),
        why=table["why"].to_pylist(),
        stream=table["stream"].to_pylist(),
    )

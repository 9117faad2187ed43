"""`expertflow-trace export`: a trace for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import bytes_text, print_json, print_rows, say
from .options import Json, TraceDir

EXPORT_FORMAT = "expertflow.export/1"
FORMATS = ("perfetto", "csv", "npz")
_LOST = {
    "perfetto": "routing, weights and look-ahead are not in it",
    "csv": "the manifest (shape, machine, provenance) is not in it",
    "npz": "batches, times, token ids and look-ahead are not in it",
}


def export(
    trace: TraceDir,
    to: Annotated[str, typer.Option(help="perfetto (.json or .json.gz), csv (folder) or npz.")],
    out: Annotated[Path, typer.Option(help="File to write; for csv a folder.")],
    steps: Annotated[
        str | None, typer.Option(help="Forward passes to draw, as 100:200 (perfetto only).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a trace for Perfetto, spreadsheets or numpy.

    A simulated run is drawn by `simulate --timeline`.

    Example: expertflow-trace export traces/demo/trace --to perfetto --steps 0:50 --out demo.json.gz
    """
    from ..errors import UsageError, unknown_name
    from ..store import Trace

    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    if steps is not None and to != "perfetto":
        raise UsageError(f"--steps says nothing about {to}; leave it out.")
    opened = Trace.open(trace)
    held = _perfetto(opened, out, steps, overwrite) if to == "perfetto" else {}
    if to == "csv":
        from ..export.tables import write_csv

        held = {"rows": write_csv(opened, out, overwrite=overwrite)}
    if to == "npz":
        from ..export.arrays import write_npz

        held = dict(write_npz(opened, out, overwrite=overwrite))
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    size = sum(file.stat().st_size for file in files)
    if as_json:
        document = {"trace_id": opened.manifest.trace_id, "to": to, "out": str(out), "bytes": size}
        print_json({"format": EXPORT_FORMAT, **document, **held, "lost": _LOST[to]})
        return
    rows = [(name, _text(value)) for name, value in held.items()]
    print_rows(f"Wrote {out}", [*rows, ("size", bytes_text(size)), ("left out", _LOST[to])])
    if to == "perfetto":
        say(f"Next: open {out} in https://ui.perfetto.dev")


def _perfetto(opened: Any, out: Path, steps: str | None, overwrite: bool) -> dict[str, Any]:
    from ..export.perfetto import parse_window, trace_timeline, write_timeline

    timeline = trace_timeline(opened, None if steps is None else parse_window("--steps", steps))
    write_timeline(out, timeline, overwrite=overwrite)
    return {
        "slices": len(timeline.slices),
        "arrows": len(timeline.arrows),
        "tracks": timeline.tracks,
        "run_s": timeline.total / 1e9,
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{rows:,} {table}" for table, rows in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:.3f} s" if isinstance(value, float) else f"{value:,}"

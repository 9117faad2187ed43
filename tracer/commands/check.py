"""`expertflow-trace check`: verify a trace, or rescue what a killed run left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..check import check_trace
from ..console import bytes_text, print_json, print_rows, warn
from ..salvage import salvage

CHECK_FORMAT = "expertflow.check/1"


def check(
    trace: Annotated[Path, typer.Argument(help="Trace folder.", metavar="DIR")],
    salvage_to: Annotated[
        Path | None,
        typer.Option("--salvage", help="Rebuild a killed run's folder here.", metavar="OUT"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Verify every file of a trace, or salvage one that was never finished.

    Ends with code 3 and names the file if something is damaged.

    Example: expertflow-trace check traces/mine.partial --salvage traces/mine
    """
    lost = salvage(trace, salvage_to) if salvage_to is not None else []
    for words in lost:
        warn(words)
    path = trace if salvage_to is None else salvage_to
    report = check_trace(path)
    if as_json:
        print_json({"format": CHECK_FORMAT, "path": str(path), "lost": lost, "report": report})
        return
    tables = ", ".join(f"{rows:,} {table}" for table, rows in report.rows.items())
    rows = [
        ("id", report.trace_id),
        ("files", f"{report.files} files, {bytes_text(report.bytes)}, every hash right"),
        ("rows", tables),
        ("steps", f"{report.steps:,}, all whole"),
    ]
    print_rows(f"{path}: sound" + (" (salvaged)" if report.salvaged else ""), rows)
    for words in report.warnings:
        if salvage_to is None:
            warn(words)

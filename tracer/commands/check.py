"""`expertflow-trace check`: verify a trace, or rescue what a killed run left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..check import check_trace
from ..console import bytes_text, print_json, print_rows, warn
from ..errors import TraceError
from ..salvage import salvage
from ..unfinished import look, unfinished_folder

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

    Ends with code 3 and names the file if something is damaged. Of a run that was cut off it says how far it
    came, and ends with code 3 too.

    Example: expertflow-trace check traces/mine.partial --salvage traces/mine
    """
    left = unfinished_folder(trace) if salvage_to is None else None
    if left is not None:
        _tell_unfinished(left, as_json)
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


def _tell_unfinished(partial: Path, as_json: bool) -> None:
    """Say what is there; never returns."""
    found = look(partial)
    rows = {table: found.rows(table) for table in found.files}
    if as_json:
        document = {"format": CHECK_FORMAT, "path": str(partial), "lost": found.lost}
        counts = {"parts": found.parts, "rows": rows, "steps": found.steps}
        print_json({**document, "unfinished": {**counts, "batches": found.batches}})
    else:
        print_rows(
            f"{partial}: unfinished",
            [
                ("begun by", found.header.provenance.command),
                ("parts", f"{found.parts:,}, every hash right"),
                ("rows", ", ".join(f"{count:,} {table}" for table, count in rows.items())),
                ("steps", f"{found.steps:,} whole"),
                ("batches", f"{found.batches:,} whole, in {found.batch_steps:,} steps"),
            ],
        )
    for words in found.lost:
        warn(words)
    out = partial.with_suffix("")
    raise TraceError(
        f"{partial} was never finished: the run was cut off or is still going. Complete it by repeating its "
        "command with --resume, or keep what is whole with "
        f"`expertflow-trace check {partial} --salvage {out}`."
    )

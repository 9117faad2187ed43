"""`expertflow-trace info`: what a trace holds and what its routing allows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import bytes_text, print_json, print_rows
from ..records import to_json
from ..stats import RoutingStats, routing_stats
from ..store import Trace
from .info_rows import statistics_sections

INFO_FORMAT = "expertflow.info/1"


def info(
    trace: Annotated[Path, typer.Argument(help="Trace folder, or its URL.", metavar="DIR")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show what a trace holds: model, machine, sizes, and how its routing behaves.

    docs/statistics.md says what each figure means. A URL such as s3://bucket/trace is read through fsspec.

    Example: expertflow-trace info traces/demo/trace
    """
    opened = Trace.open(trace)
    stats = routing_stats(opened)
    if as_json:
        print_json(_document(opened, stats))
        return
    print_rows(f"Trace {opened.path}", _trace_rows(opened))
    print_rows("Model and machine", _model_rows(opened))
    for title, rows in statistics_sections(stats):
        print_rows(title, rows)
    notes = [("warning", text) for text in opened.manifest.warnings]
    if notes:
        print_rows("Notes", notes)


def _document(trace: Trace, stats: RoutingStats) -> dict[str, Any]:
    manifest = trace.manifest
    sizes = {
        name: {"rows": manifest.rows(name), "bytes": sum(file.bytes for file in files)}
        for name, files in manifest.tables.items()
    }
    fields = ("trace_id", "shape", "hardware", "run", "provenance", "recorded", "salvaged")
    return {
        "format": INFO_FORMAT,
        **{name: to_json(getattr(manifest, name)) for name in fields},
        "tables": sizes,
        "stats": to_json(stats),
        "warnings": list(manifest.warnings),
    }


def _trace_rows(trace: Trace) -> list[tuple[str, str]]:
    manifest = trace.manifest
    run = manifest.run
    rows = [
        ("id", manifest.trace_id + (" (salvaged)" if manifest.salvaged else "")),
        ("made", f"{manifest.provenance.created} by {manifest.provenance.command}"),
        ("text", manifest.provenance.text),
        (
            "run",
            f"batch {run.batch_size}, up to {run.max_new_tokens} new tokens, experts "
            f"{run.residency}",
        ),
        ("recorded", ", ".join(manifest.recorded)),
    ]
    for name, files in manifest.tables.items():
        size = sum(file.bytes for file in files)
        rows.append((name, f"{manifest.rows(name):,} rows, {bytes_text(size)}"))
    return rows


def _model_rows(trace: Trace) -> list[tuple[str, str]]:
    shape, hardware, link = trace.shape, trace.hardware, trace.hardware.link
    all_bytes = shape.total_experts * shape.expert_bytes
    rows = [
        ("model", f"{shape.model_id}" + (f" at {shape.revision}" if shape.revision else "")),
        (
            "experts",
            f"{shape.num_moe_layers} layers of {shape.num_experts}, top {shape.top_k}, "
            f"{bytes_text(shape.expert_bytes)} each, {bytes_text(all_bytes)} in all",
        ),
        ("other weights", bytes_text(shape.non_expert_bytes)),
        ("device", f"{hardware.name}, {hardware.device}, {bytes_text(hardware.device_bytes)}"),
    ]
    if link.curves:
        seconds = link.curve(pinned=True, busy=False).copy_s(shape.expert_bytes)
        rate = shape.expert_bytes / seconds / 1e9 if seconds > 0 else 0.0
        speed = f": one expert in {seconds * 1e3:.3f} ms ({rate:.1f} GB/s)"
    else:
        speed = ""
    rows.append(("link", f"{link.name} ({link.origin}){speed}"))
    return rows

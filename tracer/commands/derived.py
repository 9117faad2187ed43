"""What the commands that make traces of traces share: options, and how they tell what was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from ..console import bytes_text, print_json, print_rows, warn
from ..schema import Manifest

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace traces that exist.")]
Seed = Annotated[int, typer.Option(help="Seed of the draw.")]
WholeBatches = Annotated[
    bool,
    typer.Option(
        "--whole-batches", help="Keep sequences that ran together together, and their times."
    ),
]


def tell(format_name: str, written: Mapping[str, Manifest], as_json: bool) -> None:
    """Say what was written, by folder; warnings go to stderr once each."""
    for text in dict.fromkeys(text for made in written.values() for text in made.warnings):
        warn(text)
    if as_json:
        print_json({"format": format_name, "traces": [_facts(*item) for item in written.items()]})
        return
    for out, made in written.items():
        size = sum(file.bytes for files in made.tables.values() for file in files)
        rows = [(name, f"{made.rows(name):,} rows") for name in made.tables]
        times = "kept" if "steps" in made.recorded else "none"
        print_rows(f"Trace {out}", [*rows, ("times", times), ("size", bytes_text(size))])


def _facts(out: str, made: Manifest) -> dict[str, object]:
    return {
        "trace": out,
        "trace_id": made.trace_id,
        "rows": {name: made.rows(name) for name in made.tables},
        "recorded": made.recorded,
        "notes": made.provenance.notes,
        "warnings": made.warnings,
    }

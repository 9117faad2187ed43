"""The evidence for people and for programs: `bench.md` and `bench.json`, made anew from all cells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bars import Bar, bars, gap_of
from .evidence import CellRecord

FORMAT = "expertflow.gpu-bench/1"


def write_summary(out: Path, cells: Sequence[CellRecord], about: Mapping[str, Any]) -> list[Bar]:
    """Write both files; returns the goals. `about` tells the machine, the settings, and the bus."""
    found = bars(cells, about.get("bus", ()))
    document = {
        "format": FORMAT,
        "about": dict(about),
        "bars": [
            {
                "name": bar.name,
                "subject": bar.subject,
                "goal": bar.goal,
                "value": bar.value,
                "verdict": bar.verdict,
            }
            for bar in found
        ],
        "cells": [_row(cell) for cell in cells],
    }
    (out / "bench.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (out / "bench.md").write_text(_page(cells, found, about), encoding="utf-8")
    return found


def _row(cell: CellRecord) -> dict[str, Any]:
    return {
        "key": cell.key,
        "predicted_tokens_per_s": cell.foretold("tokens_per_s"),
        "tokens_per_s": cell.median("tokens_per_s"),
        "decode_tokens_per_s": cell.median("decode", "tokens_per_s"),
        "gap": gap_of(cell, "tokens_per_s"),
        "hit_rate": cell.median("decode", "hit_rate"),
        "bytes_per_token": cell.median("bytes_per_token"),
        "peak_device_bytes": cell.median("peak_device_bytes"),
        "memory_gap": gap_of(cell, "peak_device_bytes"),
        "repeats": len(cell.measured),
        "label": cell.measured[0]["label"],
        "notes": list(cell.notes),
    }


def _page(cells: Sequence[CellRecord], found: Sequence[Bar], about: Mapping[str, Any]) -> str:
    lines = [
        f"# Bench: {about['device']}",
        "",
        f"{about['words']}. Made by `{about['command']}`; raw samples are in `cells.jsonl`.",
        "",
        "| goal | model | wanted | found | |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {bar.name} | {bar.subject} | {bar.goal} | {bar.shown} | {bar.verdict} |"
            for bar in found
        ),
        "",
    ]
    for subject in dict.fromkeys(cell.subject for cell in cells):
        own = [cell for cell in cells if cell.subject == subject]
        lines += [f"## {own[0].measured[0]['model_id']}", "", *_HEAD, *map(_line, own), ""]
        notes = dict.fromkeys(note for cell in own for note in cell.notes)
        lines += [f"- {note}" for note in notes]
        lines += [""] if notes else []
    return "\n".join(lines).rstrip() + "\n"


_HEAD = (
    "| batch | held | policy | predicted tok/s | measured tok/s | gap | decode tok/s | hits | MB/token | peak gap |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def _line(cell: CellRecord) -> str:
    predicted = cell.foretold("tokens_per_s")
    columns = [
        str(cell.batch),
        f"{cell.share:.0%}",
        cell.kind.replace("_", " "),
        "–" if predicted is None else f"{predicted:.1f}",
        f"{cell.median('tokens_per_s'):.1f}",
        _signed(gap_of(cell, "tokens_per_s")),
        f"{cell.median('decode', 'tokens_per_s'):.1f}",
        f"{cell.median('decode', 'hit_rate'):.1%}",
        f"{cell.median('bytes_per_token') / 1e6:.1f}",
        _signed(gap_of(cell, "peak_device_bytes")),
    ]
    return f"| {' | '.join(columns)} |"


def _signed(gap: float | None) -> str:
    return "–" if gap is None else f"{gap:+.1%}"

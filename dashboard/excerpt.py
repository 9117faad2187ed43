"""The beginning of a trace, so that predictions from a long recording answer at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import pyarrow as pa

from ..tracer.schema import FileInfo, Manifest
from ..tracer.store import Filters, Trace, read_part

BEFORE_ALL: Final = -1
"""The step of copies that were made before the first pass."""
EXCERPT_ROWS: Final = 400_000
"""Routing rows that predictions replay at most: an answer then takes a tenth of a second or so."""


class Excerpt(Trace):
    """The passes before `end` of a trace on disk; to its readers it is a trace."""

    def __init__(self, path: Path, manifest: Manifest, end: int) -> None:
        super().__init__(path, manifest)
        self.end = end

    def table(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        filters: Filters | None = None,
        *,
        steps: tuple[int, int] | None = None,
        layers: Sequence[int] | None = None,
    ) -> pa.Table:
        """Read a table as `Trace.table` does, without what later passes did."""
        if name in ("steps", "transfers"):
            first, end = steps or (BEFORE_ALL, self.end)
            steps = (first, min(end, self.end))
        return super().table(name, columns, filters, steps=steps, layers=layers)


def beginning(trace: Trace, limit: int = EXCERPT_ROWS) -> Trace:
    """The trace itself if it is small, else its first files with about `limit` rows of routing."""
    files = trace.manifest.tables.get("routing", ())
    kept: list[FileInfo] = []
    for file in files:
        if kept and sum(known.rows for known in kept) + file.rows > limit:
            break
        kept.append(file)
    if len(kept) == len(files):
        return trace
    manifest = replace(trace.manifest, tables={**trace.manifest.tables, "routing": tuple(kept)})
    # The last pass of the last file may go on in the next one.
    return Excerpt(trace.path, manifest, _last_step(trace, kept[-1]))


def _last_step(trace: Trace, file: FileInfo) -> int:
    steps = read_part(trace.path / file.path, trace.schemas["routing"], ["step"]).column("step")
    return int(steps.to_numpy().max())

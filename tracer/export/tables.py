"""A trace's tables as CSV, one file each, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from ..store import Trace
from .file import whole_folder

_ROWS_PER_PIECE = 1 << 20


def write_csv(trace: Trace, out: Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write `out`/TABLE.csv for every table of the trace; returns their rows.

    Lists of experts and weights become columns (`experts_0`, …), lists of tokens a text of numbers. Raises TraceError
    if a file is damaged, UsageError if `out` exists, ResourceError if it cannot be written.
    """
    rows: dict[str, int] = {}
    with whole_folder(out, overwrite=overwrite) as folder:
        for name in trace.manifest.tables:
            flat = _flat(trace.schemas[name].empty_table()).schema
            with csv.CSVWriter(folder / f"{name}.csv", flat) as writer:
                for piece in _pieces(trace, name):
                    writer.write_table(_flat(piece))
            rows[name] = trace.manifest.rows(name)
    return rows


def _pieces(trace: Trace, name: str) -> Iterator[pa.Table]:
    """A table, in pieces that fit in memory where it is large."""
    count = trace.manifest.rows(name)
    if name != "routing" or count <= _ROWS_PER_PIECE:
        yield trace.table(name)
        return
    steps = 1 + int(trace.table(name, ["step"])["step"].to_numpy().max())
    size = max(1, steps * _ROWS_PER_PIECE // count)
    for first in range(0, steps, size):
        yield trace.table(name, steps=(first, first + size))


def _flat(table: pa.Table) -> pa.Table:
    """The table with a column for every number; nulls stay empty."""
    columns: dict[str, pa.ChunkedArray] = {}
    for name in table.column_names:
        column, kind = table[name], table[name].type
        if pa.types.is_fixed_size_list(kind):
            for place in range(kind.list_size):
                columns[f"{name}_{place}"] = _number(
                    pc.call_function("list_element", [column, place])
                )
        elif pa.types.is_list(kind):
            columns[name] = _text(column)
        elif pa.types.is_dictionary(kind):
            columns[name] = column.cast(kind.value_type)
        else:
            columns[name] = column
    return pa.table(columns)


def _number(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.float32()) if pa.types.is_float16(column.type) else column


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    words = [None if ids is None else " ".join(map(str, ids)) for ids in column.to_pylist()]
    return pa.chunked_array([pa.array(words, pa.string())])

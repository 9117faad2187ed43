"""How rows of a trace become one Parquet part: the columns they must have and their encoding."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import TraceError
from .schema import FORMAT

ROW_GROUP_ROWS = 65_536
_DELTA_COLUMNS = ("step", "sequence", "position", "transfer")
"""Integers that climb slowly: differences are far smaller than values."""


def fit_rows(table: str, rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return `rows` with exactly the columns of `schema`; raises TraceError if they do not fit."""
    missing = [name for name in schema.names if name not in rows.column_names]
    unknown = [name for name in rows.column_names if name not in schema.names]
    if missing or unknown:
        problem = f"lacks column {missing[0]!r}" if missing else f"has no column {unknown[0]!r}"
        raise TraceError(f"{table}: {problem}; expected: {', '.join(schema.names)}.")
    for field in schema:
        if not field.nullable and rows.column(field.name).null_count:
            raise TraceError(f"{table}: column {field.name!r} holds nulls.")
    try:
        return rows.select(schema.names).cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise TraceError(f"{table}: rows do not fit the format: {error}.") from error


def parquet_bytes(rows: pa.Table, table: str, number: int) -> bytes:
    """Encode one part in memory, so that its hash is of what was meant, not of what a disk kept."""
    footer = {
        "expertflow.format": FORMAT,
        "expertflow.table": table,
        "expertflow.part": str(number),
    }
    rows = rows.replace_schema_metadata(footer).unify_dictionaries()
    delta = [name for name in _DELTA_COLUMNS if name in rows.column_names]
    floats = [f.name for f in rows.schema if pa.types.is_floating(f.type)]
    plain = {*delta, *floats}
    dictionary = [leaf for f in rows.schema if f.name not in plain for leaf in _leaf(f)]
    with pa.BufferOutputStream() as sink:
        pq.write_table(
            rows,
            sink,
            compression="zstd",
            row_group_size=ROW_GROUP_ROWS,
            use_dictionary=dictionary,  # pyright: ignore[reportArgumentType]
            column_encoding=dict.fromkeys(delta, "DELTA_BINARY_PACKED")
            | dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
            write_page_checksum=True,
        )
        return sink.getvalue().to_pybytes()


def _leaf(field: pa.Field) -> list[str]:
    if not pa.types.is_nested(field.type):
        return [field.name]
    is_weights = pa.types.is_float16(field.type.value_type)
    return [] if is_weights else [f"{field.name}.list.element"]

"""Reading one Parquet part of a trace, whole or only the row groups that a question needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import TraceError
from .remote import Location, RemotePath

Filters = pc.Expression | list[tuple[str, str, Any]]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A part that was fetched from elsewhere and verified: its address and its bytes."""

    name: str
    body: bytes

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Bounds:
    """Steps from `steps[0]` up to but not including `steps[1]`, and `layers`; None: all of them."""

    steps: tuple[int, int] | None = None
    layers: tuple[int, ...] | None = None

    def expression(self) -> pc.Expression:
        """The same as a filter of rows."""
        kept = pc.scalar(True)
        if self.steps is not None:
            first, end = self.steps
            kept = kept & (pc.field("step") >= first) & (pc.field("step") < end)
        if self.layers is not None:
            kept = kept & pc.field("layer").isin(list(self.layers))
        return kept

    def may_be_in(self, group: pq.RowGroupMetaData, place: dict[str, int]) -> bool:
        """Whether a row group may hold such rows, going by the least and greatest values it tells of."""
        if self.steps is not None:
            least, greatest = _range_of(group, place["step"])
            if greatest < self.steps[0] or least >= self.steps[1]:
                return False
        if self.layers is not None:
            least, greatest = _range_of(group, place["layer"])
            return any(least <= layer <= greatest for layer in self.layers)
        return True


def read_part(
    path: Location | Fetched,
    schema: pa.Schema,
    columns: Sequence[str] | None = None,
    filters: Filters | None = None,
    bounds: Bounds | None = None,
) -> pa.Table:
    """Read one Parquet file that must have exactly `schema`; raises TraceError naming it."""
    wanted = list(schema.names) if columns is None else list(columns)
    with _parquet(path) as file:
        if not file.schema_arrow.equals(schema):
            raise TraceError(
                f"{path} does not have the columns of a trace of this shape: it is damaged or "
                "belongs elsewhere. Restore it from a copy, or record the trace again."
            )
        if filters is None and bounds is None:
            return file.read(columns=wanted).select(wanted)
        if filters is None and bounds is not None:
            return _bounded(file, wanted, bounds)
        return _filtered(path, wanted, filters, bounds)


def matching_groups(path: Location, bounds: Bounds | None) -> list[int]:
    """Row groups of a part that may hold rows within `bounds`, going by its footer alone."""
    with _parquet(path) as file:
        return _groups(file.metadata, bounds or Bounds())


def _groups(metadata: pq.FileMetaData, bounds: Bounds) -> list[int]:
    place = {metadata.schema.column(n).path: n for n in range(metadata.num_columns)}
    numbers = range(metadata.num_row_groups)
    return [n for n in numbers if bounds.may_be_in(metadata.row_group(n), place)]


def _bounded(file: pq.ParquetFile, wanted: list[str], bounds: Bounds) -> pa.Table:
    judged = [
        name
        for name, bound in (("step", bounds.steps), ("layer", bounds.layers))
        if bound is not None
    ]
    read = file.read_row_groups(
        _groups(file.metadata, bounds), columns=list(dict.fromkeys([*wanted, *judged]))
    )
    return read.filter(bounds.expression()).select(wanted)


def _filtered(
    path: Location | Fetched, wanted: list[str], filters: Filters | None, bounds: Bounds | None
) -> pa.Table:
    kept = pc.scalar(True) if filters is None else pq.filters_to_expression(filters)
    if bounds is not None:
        kept = kept & bounds.expression()
    return pq.read_table(
        _source(path),
        columns=wanted,
        filters=kept,
        partitioning=None,  # pyright: ignore[reportArgumentType]
        page_checksum_verification=True,
    )


@contextmanager
def _parquet(path: Location | Fetched) -> Iterator[pq.ParquetFile]:
    """The part, open; what Arrow makes of a damaged one becomes a TraceError."""
    try:
        with pq.ParquetFile(_source(path), page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        raise TraceError(
            f"{path} cannot be read as Parquet ({_first_line(error)}). It is damaged: restore it "
            "from a copy, or record the trace again."
        ) from error


def _source(path: Location | Fetched) -> Any:
    if isinstance(path, Fetched):
        return pa.BufferReader(path.body)
    return path.open() if isinstance(path, RemotePath) else path


def _range_of(group: pq.RowGroupMetaData, column: int) -> tuple[float, float]:
    statistics = group.column(column).statistics
    if statistics is None or not statistics.has_min_max:
        return -np.inf, np.inf
    return statistics.min, statistics.max


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

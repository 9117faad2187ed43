"""Reading a trace folder: the manifest, whole tables, and the routing as numpy arrays.

Opening is cheap: it looks at the manifest and at the files' sizes. A file is verified against its
hash when it is first read, so damage never passes as data; `check.py` verifies everything at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import InputError, TraceError, unknown_name
from .records import from_json, read_json
from .schema import FORMAT, TABLES, FileInfo, Manifest, table_schemas
from .types import HardwareProfile, ModelShape
from .writer import CHECKSUMS, HEADER, MANIFEST, PARTS, content_id, partial_path

NO_EXPERT = 65_535
"""Stands for null in arrays of expert ids: no prediction was recorded for that row."""

Filters = pc.Expression | list[tuple[str, str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingArrays:
    """The routing table as numpy arrays, one entry per row, in recorded order.

    `experts` is uint16 [rows, top_k] in router order; `weights` float16 [rows, top_k] or None;
    `lookahead[d]` uint16 [rows, top_k], filled with NO_EXPERT where nothing was predicted.
    """

    step: np.ndarray
    layer: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    phase_is_decode: np.ndarray
    token_id: np.ndarray
    is_pad: np.ndarray
    experts: np.ndarray
    weights: np.ndarray | None = None
    lookahead: dict[int, np.ndarray] = field(default_factory=dict)


class Trace:
    """One complete trace on disk. Make it with `Trace.open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._verified: set[str] = set()

    @classmethod
    def open(cls, path: Path | str) -> Trace:
        """Open the folder at `path`.

        Raises TraceError, naming the file and what to do, if the trace is missing, unfinished,
        of another format version, or lacks a file the manifest lists.
        """
        folder = Path(path)
        _require_finished(folder)
        manifest = read_manifest(folder)
        for file in _files(manifest):
            _require_size(folder, file)
        return cls(folder, manifest)

    @property
    def shape(self) -> ModelShape:
        """The traced model."""
        return self.manifest.shape

    @property
    def hardware(self) -> HardwareProfile:
        """The machine the trace was made on."""
        return self.manifest.hardware

    @property
    def has_times(self) -> bool:
        """Whether the run's times were taken. If not, `steps` holds sizes only and its times are NaN."""
        return "steps" in self.manifest.recorded

    @property
    def schemas(self) -> dict[str, pa.Schema]:
        """The schema of every table of this trace."""
        return table_schemas(self.manifest.shape, self.manifest.recorded)

    def table(
        self, name: str, columns: Sequence[str] | None = None, filters: Filters | None = None
    ) -> pa.Table:
        """Read a table, or some `columns` of the rows that pass `filters` (pyarrow's notation).

        A table that was not recorded is empty. Raises UsageError for unknown names and TraceError
        naming the file that cannot be read.
        """
        if name not in TABLES:
            raise unknown_name("table", name, TABLES)
        schema = self.schemas[name]
        wanted = list(columns) if columns is not None else list(schema.names)
        named = [item[0] for item in filters] if isinstance(filters, list) else []
        for column in [*wanted, *named]:
            if column not in schema.names:
                raise unknown_name(f"column of {name}", column, schema.names)
        kept = pa.schema([schema.field(column) for column in wanted])
        files = self.manifest.tables.get(name, ())
        for file in files:
            if file.path not in self._verified:
                require_hash(self.path / file.path, file)
                self._verified.add(file.path)
        pieces = [read_part(self.path / file.path, schema, wanted, filters) for file in files]
        return pa.concat_tables([kept.empty_table(), *pieces])

    def routing_arrays(self) -> RoutingArrays:
        """Read the whole routing table into numpy arrays."""
        return routing_arrays(self.table("routing"))


def read_manifest(folder: Path) -> Manifest:
    """Read and verify `manifest.json` alone; raises TraceError naming it."""
    path = folder / MANIFEST
    try:
        document = read_json(path, TraceError)
        found = document.get("format") if isinstance(document, dict) else None
        if found != FORMAT:
            raise TraceError(
                f"{path}: its format is {found!r}; this version of expertflow-trace reads "
                f"{FORMAT!r}. Upgrade expertflow-trace, or record the trace again."
            )
        manifest = from_json(Manifest, document, str(path))
    except RecursionError:
        raise TraceError(f"{path} is not readable JSON: nested too deep.") from None
    except TraceError:
        raise
    except InputError as error:
        raise TraceError(
            f"{error} The manifest is damaged, or a newer expertflow-trace wrote it: "
            "restore it from a copy, or upgrade."
        ) from None
    _require_sound(path, manifest)
    is_same = content_id(document["shape"], _files(manifest)) == manifest.trace_id
    if not is_same or not _matches_sums(path):
        raise TraceError(
            f"{path} was changed after the trace was written: its hash does not fit. "
            "Restore it from a copy, or record the trace again."
        )
    return manifest


def read_part(
    path: Path,
    schema: pa.Schema,
    columns: Sequence[str] | None = None,
    filters: Filters | None = None,
) -> pa.Table:
    """Read one Parquet file that must have exactly `schema`; raises TraceError naming it."""
    try:
        if not pq.read_schema(path).equals(schema):
            raise TraceError(
                f"{path} does not have the columns of a trace of this shape: it is damaged or "
                "belongs elsewhere. Restore it from a copy, or record the trace again."
            )
        return pq.read_table(
            path,
            columns=None if columns is None else list(columns),
            filters=filters,
            partitioning=None,  # pyright: ignore[reportArgumentType]
            page_checksum_verification=True,
        )
    except (pa.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        raise TraceError(
            f"{path} cannot be read as Parquet ({_first_line(error)}). It is damaged: restore it "
            "from a copy, or record the trace again."
        ) from error


def require_hash(path: Path, file: FileInfo) -> None:
    """Raise TraceError naming `path` unless its bytes are those the manifest tells of."""
    try:
        with path.open("rb") as body:
            digest = hashlib.file_digest(body, "sha256").hexdigest()
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}.") from error
    if digest != file.sha256:
        raise TraceError(
            f"{path} was changed after the trace was written: its sha256 is not the one in "
            f"{MANIFEST}. Restore it from a copy, or record the trace again."
        )


def routing_arrays(rows: pa.Table) -> RoutingArrays:
    """Turn rows of the routing table into numpy arrays."""
    names = rows.column_names
    depths = [int(name.removeprefix("lookahead_")) for name in names if "lookahead_" in name]
    return RoutingArrays(
        step=rows.column("step").to_numpy(),
        layer=rows.column("layer").to_numpy(),
        sequence=rows.column("sequence").to_numpy(),
        position=rows.column("position").to_numpy(),
        phase_is_decode=_has_label(rows.column("phase"), "decode"),
        token_id=rows.column("token_id").to_numpy(),
        is_pad=_has_label(rows.column("modality"), "pad"),
        experts=_matrix(rows.column("experts")),
        weights=_matrix(rows.column("weights")) if "weights" in names else None,
        lookahead={depth: _matrix(rows.column(f"lookahead_{depth}")) for depth in depths},
    )


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    width = column.type.list_size
    pieces = [np.empty((0, width), dtype=column.type.value_type.to_pandas_dtype())]
    for chunk in column.chunks:
        # `values` ignores the chunk's own window, and what lies under a null is arbitrary.
        flat = chunk.values.slice(chunk.offset * width, len(chunk) * width)
        if flat.null_count:
            flat = pc.fill_null(flat, NO_EXPERT)
        piece = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
        if chunk.null_count:
            piece = piece.copy()
            piece[chunk.is_null().to_numpy(zero_copy_only=False)] = NO_EXPERT
        pieces.append(piece)
    return np.concatenate(pieces)


def _has_label(column: pa.ChunkedArray, label: str) -> np.ndarray:
    pieces = [np.empty(0, dtype=bool)]
    for chunk in column.chunks:
        is_label = np.array([item == label for item in chunk.dictionary.to_pylist()], dtype=bool)
        pieces.append(is_label[chunk.indices.to_numpy()])
    return np.concatenate(pieces)


def _require_finished(folder: Path) -> None:
    partial = partial_path(folder) if folder.name else folder / ".partial"
    if (folder / MANIFEST).is_file() and folder.suffix != ".partial":
        return
    if (folder / HEADER).exists() or (folder / PARTS).exists() or folder.suffix == ".partial":
        partial = folder
    if partial.is_dir() and not (folder / MANIFEST).is_file():
        out = partial.with_suffix("")
        raise TraceError(
            f"{partial} is a trace that was never finished: the run was killed or is still going. "
            f"Keep what is whole with `expertflow-trace check {partial} --salvage {out}`."
        )
    if partial.is_dir() and partial == folder:
        raise TraceError(
            f"{folder} is complete but was not moved into place. "
            f"Run `expertflow-trace check {folder} --salvage {folder.with_suffix('')}`."
        )
    if folder.is_dir():
        raise TraceError(f"{folder} has no {MANIFEST}, so it is not a trace folder.")
    what = "is a file; a trace is a folder" if folder.exists() else "does not exist"
    raise TraceError(f"{folder} {what}. Record one with `expertflow-trace run --out {folder}`.")


def _require_sound(path: Path, manifest: Manifest) -> None:
    shape = manifest.shape
    if not (shape.moe_layers and 1 <= shape.top_k <= shape.num_experts <= NO_EXPERT):
        raise TraceError(
            f"{path}: impossible shape: {shape.num_moe_layers} MoE layers, top {shape.top_k} of "
            f"{shape.num_experts} experts. The manifest is damaged; restore it from a copy."
        )
    for file in _files(manifest):
        parts = PurePosixPath(file.path)
        if parts.is_absolute() or ".." in parts.parts or file.rows < 0:
            raise TraceError(f"{path}: {file.path!r} is not the path of a file in this folder.")
    for table in ("routing", "sequences"):
        if table not in manifest.tables:
            raise TraceError(f"{path}: it lists no {table} table, which every trace has.")
    for table in manifest.tables:
        if table not in TABLES:
            raise TraceError(f"{path}: unknown table {table!r}; known: {', '.join(TABLES)}.")


def _matches_sums(path: Path) -> bool:
    sums = path.with_name(CHECKSUMS)
    if not sums.is_file():
        return True
    line = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {MANIFEST}"
    return line in sums.read_text(encoding="utf-8", errors="replace").splitlines()


def _require_size(folder: Path, file: FileInfo) -> None:
    path = folder / file.path
    advice = "Restore it from a copy, or record the trace again."
    if not path.is_file():
        raise TraceError(f"{path} is missing, though the manifest lists it. {advice}")
    size = path.stat().st_size
    if size != file.bytes:
        raise TraceError(f"{path} has {size:,} bytes instead of {file.bytes:,}. {advice}")


def _files(manifest: Manifest) -> list[FileInfo]:
    return [file for files in manifest.tables.values() for file in files]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

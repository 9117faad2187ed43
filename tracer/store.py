"""Reading a trace folder: the manifest, whole tables, and the routing as numpy arrays.

Opening is cheap: it looks at the manifest and at the files' sizes. A file is verified against its
hash when it is first read, so damage never passes as data; `check.py` verifies everything at once.
A trace may lie behind a URL that fsspec understands; each file is then fetched when it is read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar, cast

import pyarrow as pa

from .arrays import NO_EXPERT, RoutingArrays, is_held, joined_arrays, routing_arrays
from .errors import InputError, TraceError, UsageError, unknown_name
from .partread import Bounds, Fetched, Filters, matching_groups, read_part
from .records import from_json, read_json
from .remote import Location, RemotePath, location_of
from .schema import FORMAT, TABLES, FileInfo, Manifest, table_schemas
from .types import HardwareProfile, ModelShape
from .writer import CHECKSUMS, HEADER, MANIFEST, PARTS, content_id, partial_path

__all__ = [
    "NO_EXPERT",
    "Filters",
    "RoutingArrays",
    "Trace",
    "read_manifest",
    "read_part",
    "require_hash",
    "routing_arrays",
]

_READERS = 4
"""Parts that are decoded at a time; beyond a few, memory is what limits."""

_T = TypeVar("_T")
_R = TypeVar("_R")


class Trace:
    """One complete trace, on disk or behind a URL. Make it with `Trace.open`."""

    def __init__(self, path: Location, manifest: Manifest) -> None:
        self.path = cast(Path, path)
        """The folder. That of a remote trace is a RemotePath, which is read as a Path is."""
        self.manifest = manifest
        self._verified: set[str] = set()

    @classmethod
    def open(cls, path: Location | str) -> Trace:
        """Open the folder at `path`, which may be a URL such as `s3://bucket/trace`.

        Raises TraceError, naming the file and what to do, if the trace is missing, unfinished,
        of another format version, or lacks a file the manifest lists; ResourceError if the URL needs a
        package that is not installed.
        """
        folder = location_of(path)
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
        self,
        name: str,
        columns: Sequence[str] | None = None,
        filters: Filters | None = None,
        *,
        steps: tuple[int, int] | None = None,
        layers: Sequence[int] | None = None,
    ) -> pa.Table:
        """Read a table, or some `columns` of the rows that pass `filters` (pyarrow's notation).

        `steps` (first, end) and `layers` narrow it as well, and row groups that hold none of them are not
        decoded; a part that holds none is neither fetched nor verified. A table that was not recorded is
        empty. Raises UsageError for unknown names and TraceError naming the file that cannot be read.
        """
        schema, bounds = self._schema(name), _bounds(name, steps, layers)
        wanted = list(columns) if columns is not None else list(schema.names)
        named = [item[0] for item in filters] if isinstance(filters, list) else []
        for column in [*wanted, *named]:
            if column not in schema.names:
                raise unknown_name(f"column of {name}", column, schema.names)
        kept = pa.schema([schema.field(column) for column in wanted])
        pieces = [
            read_part(self._source(file), schema, wanted, filters, bounds)
            for file in self._files_with(name, bounds)
        ]
        return pa.concat_tables([kept.empty_table(), *pieces])

    def row_groups(
        self,
        name: str,
        *,
        steps: tuple[int, int] | None = None,
        layers: Sequence[int] | None = None,
    ) -> list[tuple[str, int]]:
        """(file, row group) of what `table` would decode with these bounds: what a question costs."""
        self._schema(name)
        bounds = _bounds(name, steps, layers)
        files = self.manifest.tables.get(name, ())
        return [
            (file.path, group)
            for file in files
            for group in matching_groups(self.path / file.path, bounds)
        ]

    def routing_arrays(
        self, *, steps: tuple[int, int] | None = None, layers: Sequence[int] | None = None
    ) -> RoutingArrays:
        """Read the routing table, or some steps (first, end) and layers of it, into numpy arrays."""
        schema, bounds = self._schema("routing"), _bounds("routing", steps, layers)
        held = pa.schema([field for field in schema if is_held(field.name)])

        def read(file: FileInfo) -> pa.Table:
            return read_part(self._source(file), schema, held.names, None, bounds)

        with ThreadPoolExecutor(_READERS) as pool:
            parts = _taken(pool, read, self._files_with("routing", bounds))
            arrays = joined_arrays(parts, held, lambda fill, items: _taken(pool, fill, items))
        _require_known(self, arrays)
        return arrays

    def _schema(self, name: str) -> pa.Schema:
        if name not in TABLES:
            raise unknown_name("table", name, TABLES)
        return self.schemas[name]

    def _files_with(self, name: str, bounds: Bounds | None) -> list[FileInfo]:
        files = self.manifest.tables.get(name, ())
        if bounds is None:
            return list(files)
        return [file for file in files if matching_groups(self.path / file.path, bounds)]

    def _source(self, file: FileInfo) -> Path | Fetched:
        """What to read a part from, verified: its path, or its bytes if it had to be fetched."""
        path: Location = self.path / file.path
        if isinstance(path, RemotePath):
            return _fetched(path, file)
        if file.path not in self._verified:
            require_hash(path, file)
            self._verified.add(file.path)
        return path


def read_manifest(folder: Location) -> Manifest:
    """Read and verify `manifest.json` alone; raises TraceError naming it."""
    path = folder / MANIFEST
    try:
        document = read_json(cast(Path, path), TraceError)
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


def require_hash(path: Path, file: FileInfo) -> None:
    """Raise TraceError naming `path` unless its bytes are those the manifest tells of."""
    try:
        with path.open("rb") as body:
            digest = hashlib.file_digest(body, "sha256").hexdigest()
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}.") from error
    if digest != file.sha256:
        raise TraceError(_changed(path))


def _fetched(path: RemotePath, file: FileInfo) -> Fetched:
    try:
        body = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or error}.") from error
    if hashlib.sha256(body).hexdigest() != file.sha256:
        raise TraceError(_changed(path))
    return Fetched(str(path), body)


def _changed(path: Location) -> str:
    return (
        f"{path} was changed after the trace was written: its sha256 is not the one in "
        f"{MANIFEST}. Restore it from a copy, or record the trace again."
    )


def _bounds(
    name: str, steps: tuple[int, int] | None, layers: Sequence[int] | None
) -> Bounds | None:
    if steps is None and layers is None:
        return None
    if name == "sequences":
        raise UsageError("The sequences table has neither steps nor layers; use filters instead.")
    return Bounds(steps, None if layers is None else tuple(layers))


def _taken(pool: ThreadPoolExecutor, work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Do `work` on all items, several at a time; the first error is raised."""
    if len(items) < 2:
        return [work(item) for item in items]
    return list(pool.map(work, items))


def _require_finished(folder: Location) -> None:
    if (folder / MANIFEST).is_file() and folder.suffix != ".partial":
        return
    if isinstance(folder, RemotePath):
        what = f"has no {MANIFEST}" if folder.exists() else "does not exist"
        raise TraceError(f"{folder} {what}, so it is not a trace folder.")
    partial = partial_path(folder) if folder.name else folder / ".partial"
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


def _require_sound(path: Location, manifest: Manifest) -> None:
    shape = manifest.shape
    if not (shape.moe_layers and 1 <= shape.top_k <= shape.num_experts <= NO_EXPERT):
        raise TraceError(
            f"{path}: impossible shape: {shape.num_moe_layers} MoE layers, top {shape.top_k} of "
            f"{shape.num_experts} experts. The manifest is damaged; restore it from a copy."
        )
    _require_possible(path, manifest)
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


def _require_possible(path: Location, manifest: Manifest) -> None:
    """Sizes that count something, and a link whose curves are numbers. Raises TraceError."""
    for name in ("expert_bytes", "non_expert_bytes", "kv_bytes_per_token", "hidden_size"):
        if getattr(manifest.shape, name) < 0:
            raise TraceError(f"{path}: {name} is negative. Restore the manifest from a copy.")
    link = manifest.hardware.link
    curves = link.curves
    has_points = all(curve.points for curve in curves) and (curves or link.origin == "declared")
    if not has_points or not all(
        size > 0 and 0 <= second < math.inf for curve in curves for size, second in curve.points
    ):
        raise TraceError(
            f"{path}: the curves of its link are not all sizes above 0 with seconds. Restore the manifest from a copy, "
            "or record the trace again."
        )


def _require_known(trace: Trace, arrays: RoutingArrays) -> None:
    """Refuse routing to layers and experts that the model does not have. Raises TraceError."""
    shape, folder = trace.shape, trace.path / "routing"
    if not arrays.layer.size:
        return
    if arrays.layer.min() < 0 or arrays.layer.max() >= shape.num_moe_layers:
        what = f"a layer outside 0 to {shape.num_moe_layers - 1}"
    elif arrays.experts.max() >= shape.num_experts:
        what = f"expert {arrays.experts.max()} of a model that has 0 to {shape.num_experts - 1}"
    else:
        return
    raise TraceError(
        f"{folder} names {what}. Find out more with `expertflow-trace check {trace.path}`, or record the trace again."
    )


def _matches_sums(path: Location) -> bool:
    sums = path.with_name(CHECKSUMS)
    if not sums.is_file():
        return True
    line = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {MANIFEST}"
    return line in sums.read_text(encoding="utf-8", errors="replace").splitlines()


def _require_size(folder: Location, file: FileInfo) -> None:
    path = folder / file.path
    advice = "Restore it from a copy, or record the trace again."
    if not path.is_file():
        raise TraceError(f"{path} is missing, though the manifest lists it. {advice}")
    size = path.size if isinstance(path, RemotePath) else path.stat().st_size
    if size != file.bytes:
        raise TraceError(f"{path} has {size:,} bytes instead of {file.bytes:,}. {advice}")


def _files(manifest: Manifest) -> list[FileInfo]:
    return [file for files in manifest.tables.values() for file in files]

"""Writing a trace folder part by part, so that a kill costs at most one part.

Rows gather in memory and leave it as Parquet parts under `<out>.partial/`; each finished part is
renamed into place and listed, with its hash, in `parts.jsonl`. `close` adds the dataset card,
the checksums and, last, the manifest, and renames the folder. `salvage.py` mends what a kill left.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from .card import dataset_card
from .errors import ResourceError, TraceError, UsageError, unknown_name
from .parts import fit_rows, parquet_bytes
from .records import to_json
from .schema import FORMAT, TABLES, FileInfo, Manifest, table_schemas
from .types import HardwareProfile, MemoryPoint, ModelShape, Provenance, RunSettings

HEADER = "header.json"
PARTS = "parts.jsonl"
MANIFEST = "manifest.json"
CHECKSUMS = "SHA256SUMS"
CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """`header.json` of a `.partial` folder: what a manifest needs and only the run knows."""

    shape: ModelShape
    hardware: HardwareProfile
    run: RunSettings
    provenance: Provenance
    recorded: tuple[str, ...]
    format: str = FORMAT


def partial_path(out: Path) -> Path:
    """Return the folder a trace is built in before it is complete."""
    return out.with_name(out.name + ".partial")


def content_id(shape: Mapping[str, Any], files: Sequence[FileInfo]) -> str:
    """Return the trace id: 16 hex digits over the shape and every table file's path and hash.

    `shape` is the JSON that stands in the manifest, so that fields which later versions add to
    ModelShape leave the ids of old traces alone.
    """
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for file in sorted(files, key=lambda file: file.path):
        digest.update(f"\n{file.path} {file.sha256}".encode())
    return digest.hexdigest()[:16]


class TraceWriter:
    """Builds one trace folder; use it as a context manager.

    Leaving the block normally closes the trace. Leaving it by an exception writes out what is in
    memory and keeps `<out>.partial`, from which `salvage` makes a valid trace. Memory is bounded
    by `part_rows` rows per table; `flush` may be called at any time to bound what a kill costs.

    Raises UsageError if `out` exists and `overwrite` is false; ResourceError if the disk is full or
    not writable. With `overwrite`, the old trace goes only after the new one is complete. `kept` are parts that
    are in the `.partial` folder already, in order: the writer goes on behind them (see resume.py).
    """

    def __init__(
        self,
        out: Path,
        *,
        shape: ModelShape,
        hardware: HardwareProfile,
        run: RunSettings,
        provenance: Provenance,
        recorded: Sequence[str],
        overwrite: bool = False,
        part_rows: int = 65_536,
        partial: Path | None = None,
        kept: Mapping[str, Sequence[FileInfo]] | None = None,
    ) -> None:
        self.out = Path(out) if Path(out).name not in ("", "..") else Path(out).resolve()
        self.partial = partial or partial_path(self.out)
        self.header = Header(
            shape=shape, hardware=hardware, run=run, provenance=provenance, recorded=tuple(recorded)
        )
        self._schemas = table_schemas(shape, recorded)
        self._part_rows = part_rows
        self._buffers: dict[str, list[pa.Table]] = {table: [] for table in TABLES}
        self._buffered: dict[str, int] = dict.fromkeys(TABLES, 0)
        self._files: dict[str, list[FileInfo]] = {
            table: list((kept or {}).get(table, ())) for table in TABLES
        }
        self._is_closed = False
        self._refuse_existing(overwrite, is_resumed=kept is not None)
        with self._disk_errors():
            if kept is None and self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True, exist_ok=kept is not None)
            write_durably(self.partial / HEADER, _json_bytes(self.header))

    def append(self, table: str, batch: pa.Table | pa.RecordBatch) -> None:
        """Add rows to `table`, in the order they are to be read back.

        Columns are found by name. Raises TraceError if one is missing, of a type that does not fit,
        or holds nulls where the format has none.
        """
        if table not in self._schemas:
            raise unknown_name("table", table, TABLES)
        rows = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        self._buffers[table].append(fit_rows(table, rows, self._schemas[table]))
        self._buffered[table] += rows.num_rows
        if self._buffered[table] >= self._part_rows:
            self.flush()

    def flush(self) -> None:
        """Write everything in memory to disk, as one part per table that has rows."""
        # A step is only whole once its rows in the other tables are on disk, and a batch has only ended
        # once all its steps are.
        for table in ("transfers", "routing", "steps", "sequences"):
            buffered, self._buffers[table] = self._buffers[table], []
            self._buffered[table] = 0
            rows = sum(piece.num_rows for piece in buffered)
            if rows:
                self._write_part(table, pa.concat_tables(buffered))

    def close(
        self,
        *,
        memory: Sequence[MemoryPoint] = (),
        warnings: Sequence[str] = (),
        salvaged: bool = False,
    ) -> Manifest:
        """Complete the trace, move it to its final place and return its manifest.

        Raises TraceError if no routing was recorded.
        """
        self.flush()
        if not self._files["routing"]:
            raise TraceError(
                f"No routing was recorded, so {self.out} would be no trace. Remove {self.partial}."
            )
        with self._disk_errors():
            tables = {name: tuple(files) for name, files in self._files.items() if files}
            tables["sequences"] = (self._merge_sequences(),)
            header = self.header
            manifest = Manifest(
                trace_id=content_id(
                    to_json(header.shape), [f for fs in tables.values() for f in fs]
                ),
                shape=header.shape,
                hardware=header.hardware,
                run=header.run,
                provenance=header.provenance,
                recorded=header.recorded,
                tables=tables,
                memory=tuple(memory),
                salvaged=salvaged,
                warnings=tuple(warnings),
            )
            self._finish(manifest)
        self._is_closed = True
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_closed:
            return
        if error is None:
            self.close()
            return
        with suppress(ResourceError, TraceError):  # the first error is the one to report
            self.flush()

    def _finish(self, manifest: Manifest) -> None:
        body = _json_bytes(manifest)
        files = [file for files in manifest.tables.values() for file in files]
        lines = [f"{file.sha256}  {file.path}\n" for file in files]
        lines.append(f"{hashlib.sha256(body).hexdigest()}  {MANIFEST}\n")
        write_durably(self.partial / CARD, dataset_card(manifest, self._schemas).encode())
        write_durably(self.partial / CHECKSUMS, "".join(lines).encode())
        write_durably(self.partial / MANIFEST, body)
        publish(self.partial, self.out)

    def _write_part(self, table: str, rows: pa.Table) -> None:
        number = next_number(self._files[table])
        path = f"{table}/part-{number:05d}.parquet"
        with self._disk_errors():
            info = self._write_file(path, table, rows, number)
            with (self.partial / PARTS).open("a", encoding="utf-8") as parts:
                parts.write(json.dumps({"table": table, **asdict(info)}) + "\n")
                parts.flush()
                os.fsync(parts.fileno())
        self._files[table].append(info)

    def _merge_sequences(self) -> FileInfo:
        parts = [pq.read_table(self.partial / f.path) for f in self._files["sequences"]]
        empty = self._schemas["sequences"].empty_table()
        rows = pa.concat_tables([empty, *parts]).sort_by("sequence")
        return self._write_file("sequences.parquet", "sequences", rows, 0)

    def _write_file(self, path: str, table: str, rows: pa.Table, number: int) -> FileInfo:
        body = parquet_bytes(rows, table, number)
        (self.partial / path).parent.mkdir(exist_ok=True)
        write_durably(self.partial / path, body)
        digest = hashlib.sha256(body).hexdigest()
        return FileInfo(path=path, rows=rows.num_rows, bytes=len(body), sha256=digest)

    def _refuse_existing(self, overwrite: bool, is_resumed: bool) -> None:
        if self.out.exists() and not overwrite:
            raise UsageError(f"{self.out} exists. Choose another name, or pass --overwrite.")
        if self.out.exists() and not _is_ours(self.out, MANIFEST):
            raise UsageError(
                f"{self.out} exists and is not a trace, so it is not overwritten. "
                "Choose another name, or remove it yourself."
            )
        if is_resumed:
            return
        if self.partial.exists() and not (overwrite and _is_ours(self.partial, HEADER, MANIFEST)):
            raise UsageError(
                f"{self.partial} is left from a run that was killed or is still going. "
                "Go on with --resume, keep it with "
                f"`expertflow-trace check {self.partial} --salvage OTHER`, remove it, "
                "or pass --overwrite."
            )

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(
                f"Cannot write {self.partial}: {error.strerror or error}. Free some space or "
                "choose another folder; what was written before can be kept with "
                f"`expertflow-trace check {self.partial} --salvage OTHER`."
            ) from error


def next_number(files: Sequence[FileInfo]) -> int:
    """Number of the part to come after `files`: names sort in the order of their rows."""
    return 1 + max((int(Path(file.path).stem.rpartition("-")[2]) for file in files), default=-1)


def publish(partial: Path, out: Path) -> None:
    """Move a folder that has its manifest to `out`; an old `out` goes only once that worked."""
    for name in (PARTS, HEADER):
        (partial / name).unlink(missing_ok=True)
    shutil.rmtree(partial / "sequences", ignore_errors=True)
    for stray in partial.glob("**/*.tmp"):
        stray.unlink()
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    _sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_ours(folder: Path, *marks: str) -> bool:
    if not folder.is_dir():
        return False
    return any((folder / mark).is_file() for mark in marks) or not any(folder.iterdir())


def _json_bytes(record: Any) -> bytes:
    return (json.dumps(to_json(record), indent=2) + "\n").encode()


def write_durably(path: Path, body: bytes) -> None:
    """Replace a file at once, and only after its new bytes are on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

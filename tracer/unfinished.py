"""What a run that was cut off left in its `.partial` folder: its parts, its whole steps, its whole batches.

Looks only. `salvage.py` makes a trace of it, `resume.py` goes on from it, `check` tells of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .errors import InputError, TraceError
from .records import from_json, read_json
from .schema import TABLES, WHOLE_STEP, FileInfo, table_schemas
from .store import read_manifest, read_part, require_hash
from .writer import HEADER, MANIFEST, PARTS, Header, partial_path

SLIM = ("step", "layer", "sequence", "position")
"""Columns of the routing table that tell what is whole."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts whose bytes are as they were written, by table, and words on the others.

    `trusted` are those listed before the first that is damaged: what a kill at that moment would have left.
    """

    files: dict[str, list[FileInfo]]
    trusted: dict[str, list[FileInfo]]
    lost: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """How far a run came. Batches and steps are counted from the first on, without a gap.

    `batches` are those recorded to their end, `batch_steps` the steps they took; `steps` are whole in every
    table, those of a batch that was cut off included.
    """

    header: Header
    files: dict[str, list[FileInfo]]
    steps: int
    batches: int
    batch_steps: int
    lost: tuple[str, ...]

    @property
    def parts(self) -> int:
        """Sound parts on disk."""
        return sum(len(files) for files in self.files.values())

    def rows(self, table: str) -> int:
        """Rows of one table in sound parts."""
        return sum(file.rows for file in self.files[table])


def is_complete(partial: Path) -> bool:
    """Tell whether the run ended and only the renaming was cut off."""
    if not (partial / MANIFEST).is_file():
        return False
    try:
        for files in read_manifest(partial).tables.values():
            for file in files:
                require_hash(partial / file.path, file)
    except TraceError:
        if not (partial / HEADER).is_file():
            raise
        return False
    return True


def unfinished_folder(path: Path) -> Path | None:
    """The `.partial` folder of a run that did not end, if `path` is one or the trace it was to become."""
    for folder in (path, partial_path(path) if path.name else path):
        if (path / MANIFEST).is_file() and folder != path:
            return None
        if (folder / HEADER).is_file() and not (folder / MANIFEST).is_file():
            return folder
    return None


def read_header(partial: Path) -> Header:
    """Read what the run said of itself when it began. Raises TraceError."""
    path = partial / HEADER
    try:
        return from_json(Header, read_json(path, TraceError), str(path))
    except InputError as error:
        raise TraceError(
            f"{error} Without it nothing in {partial} can be salvaged; record the trace again."
        ) from None


def look(partial: Path) -> Unfinished:
    """Say how far the run in `partial` came. Raises TraceError if its header is unreadable."""
    header = read_header(partial)
    parts = intact_parts(partial)
    schemas = table_schemas(header.shape, header.recorded)
    tables = small_tables(partial, parts.trusted, schemas)
    routing = slim_routing(partial, parts.trusted["routing"], schemas["routing"])
    steps = whole_steps(routing, tables["steps"], header)
    batches, batch_steps = whole_batches(tables["sequences"], routing, steps)
    return Unfinished(
        header=header,
        files=parts.trusted,
        steps=steps,
        batches=batches,
        batch_steps=batch_steps,
        lost=tuple(parts.lost),
    )


def intact_parts(partial: Path) -> Parts:
    """Hash every listed part; those that do not fit are left out and named."""
    parts = Parts({table: [] for table in TABLES}, {table: [] for table in TABLES}, [])
    for line in _lines(partial / PARTS):
        try:
            record = json.loads(line)
            table = record.pop("table")
            file = from_json(FileInfo, record)
            files = parts.files[table]
        except (ValueError, KeyError, AttributeError, TypeError, InputError):
            parts.lost.append(f"{PARTS} ends in a torn line; parts listed after it were dropped.")
            break
        if not _is_intact(partial / file.path, file):
            parts.lost.append(f"{file.path} is damaged or missing and was dropped.")
            continue
        files.append(file)
        if not parts.lost:
            parts.trusted[table].append(file)
    return parts


def small_tables(
    partial: Path, files: dict[str, list[FileInfo]], schemas: dict[str, pa.Schema]
) -> dict[str, pa.Table]:
    """Every table but the routing, in memory."""
    return {
        table: pa.concat_tables(
            [schemas[table].empty_table()]
            + [read_part(partial / file.path, schemas[table]) for file in listed]
        )
        for table, listed in files.items()
        if table != "routing"
    }


def slim_routing(partial: Path, files: list[FileInfo], schema: pa.Schema) -> pa.Table:
    """The columns of the routing table that tell what is whole."""
    names = list(SLIM)
    empty = pa.schema([schema.field(name) for name in names]).empty_table()
    return pa.concat_tables(
        [empty] + [read_part(partial / file.path, schema, names) for file in files]
    )


def whole_steps(routing: pa.Table, steps: pa.Table, header: Header) -> int:
    """Steps from 0 on, without a gap, that have all layers of a stack with all tokens in every table."""
    layers = header.shape.num_moe_layers
    keys = routing["step"].to_numpy().astype(np.int64) * layers + routing["layer"].to_numpy()
    found = np.bincount(keys) if keys.size else np.zeros(0, dtype=np.int64)
    found = np.pad(found, (0, -len(found) % layers)).reshape(-1, layers)
    is_whole = np.zeros(len(found), dtype=np.bool_)
    for stack in header.shape.stacks:
        own = found[:, stack.start : stack.stop]
        is_alone = own.sum(axis=1) == found.sum(axis=1)
        is_whole |= (own > 0).all(axis=1) & (own == own[:, :1]).all(axis=1) & is_alone
    if "steps" in header.recorded:
        is_whole &= _agreed(found, steps)
    gaps = np.flatnonzero(~is_whole)
    return int(gaps[0]) if gaps.size else len(is_whole)


def whole_batches(sequences: pa.Table, routing: pa.Table, steps: int) -> tuple[int, int]:
    """Batches from 0 on that ended within the first `steps` steps, and the steps they took.

    A batch has ended if its sequences are on disk: the writer puts them behind all its steps.
    """
    sequence, step = routing["sequence"].to_numpy(), routing["step"].to_numpy()
    last = np.full(int(sequence.max(initial=-1)) + 1, -1, dtype=np.int64)
    np.maximum.at(last, sequence, step)
    ends: dict[int, int] = {}
    for number, batch in zip(
        sequences["sequence"].to_pylist(), sequences["batch"].to_pylist(), strict=True
    ):
        end = int(last[number]) if number < len(last) else steps
        ends[batch] = max(end, ends.get(batch, -1))
    ended, taken = 0, 0
    while ended in ends and taken <= ends[ended] < steps:
        taken = ends[ended] + 1
        ended += 1
    return ended, taken


def _agreed(found: np.ndarray, steps: pa.Table) -> np.ndarray:
    step, layer = steps["step"].to_numpy(), steps["layer"].to_numpy()
    is_in = step < len(found)
    told = np.zeros_like(found)
    is_layer = is_in & (layer != WHOLE_STEP)
    told[step[is_layer], layer[is_layer]] = steps["tokens"].to_numpy()[is_layer]
    has_whole = np.zeros(len(found), dtype=bool)
    has_whole[step[is_in & (layer == WHOLE_STEP)]] = True
    return has_whole & (told == found).all(axis=1)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _is_intact(path: Path, file: FileInfo) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
    except OSError:
        return False

"""Turning what a killed run left behind into a valid trace of the steps that were finished."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import InputError, TraceError, UsageError
from .records import from_json, read_json
from .schema import TABLES, WHOLE_STEP, FileInfo, table_schemas
from .store import read_manifest, read_part, require_hash
from .writer import HEADER, MANIFEST, PARTS, Header, TraceWriter, publish


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts whose bytes are as they were written, by table, and words on the others."""

    files: dict[str, list[FileInfo]]
    lost: list[str]


def salvage(partial: Path, out: Path) -> list[str]:
    """Make the trace `out` from the `.partial` folder of a run that was killed.

    Kept are the steps that are whole in every table, from the first on without a gap. Returns what
    was lost or rebuilt, in words (empty if nothing was); the new manifest says `salvaged` and holds
    the same words. `partial` is left as it is, unless the run was complete and only had to be
    renamed. Raises TraceError if no whole step is left, UsageError if `out` exists.
    """
    partial, out = Path(partial), Path(out)
    if not partial.is_dir():
        raise TraceError(f"{partial} is not a folder, so there is nothing to salvage.")
    if out.exists():
        raise UsageError(f"{out} exists. Choose another name for the salvaged trace.")
    if _is_complete(partial):
        publish(partial, out)
        return []
    header = _read_header(partial)
    parts = _intact_parts(partial)
    return _rebuild(partial, out, header, parts)


def _is_complete(partial: Path) -> bool:
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


def _read_header(partial: Path) -> Header:
    path = partial / HEADER
    try:
        return from_json(Header, read_json(path, TraceError), str(path))
    except InputError as error:
        raise TraceError(
            f"{error} Without it nothing in {partial} can be salvaged; record the trace again."
        ) from None


def _intact_parts(partial: Path) -> _Parts:
    parts = _Parts({table: [] for table in TABLES}, [])
    for line in _lines(partial / PARTS):
        try:
            record = json.loads(line)
            table = record.pop("table")
            file = from_json(FileInfo, record)
            files = parts.files[table]
        except (ValueError, KeyError, AttributeError, TypeError, InputError):
            parts.lost.append(f"{PARTS} ends in a torn line; parts listed after it were dropped.")
            break
        if _is_intact(partial / file.path, file):
            files.append(file)
        else:
            parts.lost.append(f"{file.path} is damaged or missing and was dropped.")
    return parts


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


def _rebuild(partial: Path, out: Path, header: Header, parts: _Parts) -> list[str]:
    schemas = table_schemas(header.shape, header.recorded)
    tables = {
        table: pa.concat_tables(
            [schemas[table].empty_table()]
            + [read_part(partial / file.path, schemas[table]) for file in files]
        )
        for table, files in parts.files.items()
        if table != "routing"
    }
    slim = ["step", "layer", "sequence", "position"]
    routing = pa.concat_tables(
        [pa.schema([schemas["routing"].field(name) for name in slim]).empty_table()]
        + [read_part(partial / f.path, schemas["routing"], slim) for f in parts.files["routing"]]
    )
    num_steps = _whole_steps(routing, tables["steps"], header)
    if num_steps == 0:
        raise TraceError(
            f"{partial} holds no step that is whole in every table, so there is nothing to keep. "
            "Record the trace again."
        )
    lost = [*parts.lost, *_dropped(routing, num_steps)]
    kept = pc.field("step") < num_steps
    rebuilt = _missing_sequences(routing.filter(kept), tables, schemas["sequences"])
    if rebuilt.num_rows:
        ids = ", ".join(str(n) for n in rebuilt["sequence"].to_pylist()[:8])
        lost.append(
            f"{rebuilt.num_rows} sequence(s) had not ended ({ids}): their rows were rebuilt from "
            "the routing, without prompt id, domain, hash and output."
        )
    writer = TraceWriter(
        out,
        shape=header.shape,
        hardware=header.hardware,
        run=header.run,
        provenance=header.provenance,
        recorded=header.recorded,
        partial=out.with_name(out.name + ".salvage.partial"),
        overwrite=True,  # of a salvage that was itself killed; `out` does not exist
    )
    with writer:
        for table in ("steps", "transfers"):
            writer.append(table, tables[table].filter(kept))
        used = pa.array(np.unique(routing.filter(kept)["sequence"].to_numpy()))
        known = tables["sequences"].filter(pc.field("sequence").isin(used))
        writer.append("sequences", pa.concat_tables([known, rebuilt]))
        for file in parts.files["routing"]:
            rows = read_part(partial / file.path, schemas["routing"])
            writer.append("routing", rows.filter(kept))
            writer.flush()
        writer.close(warnings=[f"Salvaged: {words}" for words in lost], salvaged=True)
    return lost


def _whole_steps(routing: pa.Table, steps: pa.Table, header: Header) -> int:
    """Steps from 0 on, without a gap, that have all layers with all tokens in every table."""
    layers = header.shape.num_moe_layers
    keys = routing["step"].to_numpy().astype(np.int64) * layers + routing["layer"].to_numpy()
    found = np.bincount(keys) if keys.size else np.zeros(0, dtype=np.int64)
    found = np.pad(found, (0, -len(found) % layers)).reshape(-1, layers)
    is_whole = (found > 0).all(axis=1) & (found == found[:, :1]).all(axis=1)
    if "steps" in header.recorded:
        is_whole &= _agreed(found, steps)
    gaps = np.flatnonzero(~is_whole)
    return int(gaps[0]) if gaps.size else len(is_whole)


def _agreed(found: np.ndarray, steps: pa.Table) -> np.ndarray:
    step, layer = steps["step"].to_numpy(), steps["layer"].to_numpy()
    is_in = step < len(found)
    told = np.zeros_like(found)
    is_layer = is_in & (layer != WHOLE_STEP)
    told[step[is_layer], layer[is_layer]] = steps["tokens"].to_numpy()[is_layer]
    has_whole = np.zeros(len(found), dtype=bool)
    has_whole[step[is_in & (layer == WHOLE_STEP)]] = True
    return has_whole & (told == found).all(axis=1)


def _dropped(routing: pa.Table, num_steps: int) -> list[str]:
    step = routing["step"].to_numpy()
    torn = np.unique(step[step >= num_steps])
    if not torn.size:
        return []
    return [
        f"{torn.size} step(s) from step {num_steps} on were not whole and were dropped; "
        f"{num_steps} step(s) are kept."
    ]


def _missing_sequences(
    routing: pa.Table, tables: dict[str, pa.Table], schema: pa.Schema
) -> pa.Table:
    """Rows for sequences that were still running when the run was killed."""
    known = set(tables["sequences"]["sequence"].to_pylist())
    first_layer = routing.filter(pc.field("layer") == 0)
    step, sequence = first_layer["step"].to_numpy(), first_layer["sequence"].to_numpy()
    is_token = first_layer["position"].to_numpy() >= 0
    batches = tables["sequences"]["batch"].to_pylist()
    next_batch = max(batches, default=-1) + 1
    firsts: dict[int, int] = {}
    rows: list[dict[str, object]] = []
    for number in sorted(set(sequence.tolist()) - known):
        own = step[(sequence == number) & is_token]
        first = int(own.min()) if own.size else int(step[sequence == number].min())
        prompt_tokens = int((own == first).sum())
        rows.append(
            {
                "sequence": number,
                "prompt_id": str(number),
                "domain": "",
                "batch": next_batch + firsts.setdefault(first, len(firsts)),
                "prompt_tokens": prompt_tokens,
                # The prefill gives the first token; every later step fed one that was generated.
                "generated_tokens": 1 + len(own) - prompt_tokens,
                "finish": "cut",
                "ttft_s": _whole_step_s(tables["steps"], first),
                "prompt_sha256": "",
                "prompt_text": None,
                "output_ids": None,
            }
        )
    return pa.Table.from_pylist(rows, schema=schema)


def _whole_step_s(steps: pa.Table, step: int) -> float:
    is_row = (pc.field("step") == step) & (pc.field("layer") == WHOLE_STEP)
    found = steps.filter(is_row)["total_s"].to_pylist()
    return float(found[0]) if found else 0.0

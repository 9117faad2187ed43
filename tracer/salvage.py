"""Turning what a killed run left behind into a valid trace of the steps that were finished."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import TraceError, UsageError
from .schema import WHOLE_STEP, table_schemas
from .store import read_part
from .unfinished import (
    Parts,
    intact_parts,
    is_complete,
    read_header,
    slim_routing,
    small_tables,
    whole_steps,
)
from .writer import Header, TraceWriter, publish


def salvage(partial: Path, out: Path) -> list[str]:
    """Make the trace `out` from the `.partial` folder of a run that was killed.

    Kept are the steps that are whole in every table, from the first on without a gap. Returns what
    was lost or rebuilt, in words (empty if nothing was); the new manifest says `salvaged` and holds
    the same words. `partial` is left as it is, unless the run was complete and only had to be
    renamed. Raises TraceError if no whole step is left, UsageError if `out` exists or `partial` is a trace that was
    finished.
    """
    partial, out = Path(partial), Path(out)
    if not partial.is_dir():
        raise TraceError(f"{partial} is not a folder, so there is nothing to salvage.")
    if out.exists():
        raise UsageError(f"{out} exists. Choose another name for the salvaged trace.")
    if is_complete(partial):
        if partial.suffix != ".partial":
            raise UsageError(
                f"{partial} is a complete trace, so there is nothing to salvage. Verify it with "
                f"`expertflow-trace check {partial}`."
            )
        publish(partial, out)
        return []
    header = read_header(partial)
    parts = intact_parts(partial)
    return _rebuild(partial, out, header, parts)


def _rebuild(partial: Path, out: Path, header: Header, parts: Parts) -> list[str]:
    schemas = table_schemas(header.shape, header.recorded)
    tables = small_tables(partial, parts.files, schemas)
    routing = slim_routing(partial, parts.files["routing"], schemas["routing"])
    num_steps = whole_steps(routing, tables["steps"], header)
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
                "template": "",
            }
        )
    return pa.Table.from_pylist(rows, schema=schema)


def _whole_step_s(steps: pa.Table, step: int) -> float:
    is_row = (pc.field("step") == step) & (pc.field("layer") == WHOLE_STEP)
    found = steps.filter(is_row)["total_s"].to_pylist()
    return float(found[0]) if found else 0.0

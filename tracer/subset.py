"""A trace of some sequences of another one.

What a forward pass took is true of the batch that ran. Where a batch loses sequences, the rows that stay are
routing as it was, but no time of that run describes them any more, so the new trace has no times at all: `recorded`
leaves out `steps` and `transfers`, and the times are NaN. Where every batch is kept whole or dropped whole, times,
copies and padding stay as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .arrays import expert_ids
from .errors import TraceError, UsageError
from .probe import provenance
from .schema import STEPS, WHOLE_STEP, Manifest
from .store import Trace
from .writer import TraceWriter

TIMES_LOST = (
    "Some batches lost sequences, so no time of the original run describes them: times and copies were left "
    "out, and padding of those batches with them. Choose --whole-batches to keep times."
)
HISTORY_LOST = (
    "Recorded with experts offloaded: which of them were loaded, and the stalls, depended on sequences that are not "
    "in this trace."
)
_ROWS_AT_A_TIME = 1 << 18


@dataclass(frozen=True, slots=True)
class _Kept:
    """Which rows stay, and the new numbers of their steps, sequences and batches (-1: gone)."""

    rows: np.ndarray
    step: np.ndarray
    sequence: np.ndarray
    batch: dict[int, int]
    has_torn_batch: bool


def write_subset(
    source: Trace,
    sequences: Collection[int],
    out: Path,
    *,
    seed: int,
    note: str,
    overwrite: bool = False,
) -> Manifest:
    """Write `out` with these sequences of `source`, renumbered from 0 in order.

    `note` says in the provenance how they were chosen. Raises UsageError if none of them has routing, if `out`
    is the source itself, or if it exists and `overwrite` is false.
    """
    refuse_itself(out, source)
    routing = source.table("routing")
    kept = _kept(source, routing, sequences)
    has_times = source.has_times and not kept.has_torn_batch
    recorded = [
        name for name in source.manifest.recorded if has_times or name not in ("steps", "transfers")
    ]
    made = source.manifest.provenance
    notes = (
        f"Part of trace {source.manifest.trace_id} ({source.path.name}), made by `{made.command}` at {made.created}.",
        note,
        *made.notes,
    )
    writer = TraceWriter(
        out,
        shape=source.shape,
        hardware=source.hardware,
        run=source.manifest.run,
        provenance=provenance(seed, made.text, notes=notes),
        recorded=recorded,
        overwrite=overwrite,
    )
    with writer:
        _append_sequences(writer, source, kept, has_times)
        rows = _renumbered(routing.filter(pa.array(kept.rows)), kept)
        for first in range(0, rows.num_rows, _ROWS_AT_A_TIME):
            writer.append("routing", rows.slice(first, _ROWS_AT_A_TIME))
        if source.manifest.rows("steps"):
            writer.append("steps", _steps(source, kept, rows, has_times))
        if "transfers" in recorded:
            writer.append("transfers", _transfers(source, kept))
        return writer.close(
            memory=source.manifest.memory,
            salvaged=source.manifest.salvaged,
            warnings=(*source.manifest.warnings, *_warnings(source, kept)),
        )


def refuse_itself(out: Path, source: Trace) -> None:
    """Raise UsageError if `out` is a trace that is being read, or lies in its folder."""
    if not isinstance(source.path, Path) or not out.resolve().is_relative_to(source.path.resolve()):
        return
    is_same = out.resolve() == source.path.resolve()
    place = "is the trace that is read" if is_same else f"lies in {source.path}, which is read"
    raise UsageError(f"{out} {place}; choose another name to write to.")


def _kept(source: Trace, routing: pa.Table, sequences: Collection[int]) -> _Kept:
    sequence, step = routing["sequence"].to_numpy(), routing["step"].to_numpy()
    listed = source.table("sequences", ["sequence", "batch"]).sort_by("sequence").to_pydict()
    chosen = np.zeros(max([*listed["sequence"], -1]) + 1, dtype=bool)
    chosen[list(sequences)] = True
    if sequence.size and not 0 <= sequence.min() <= sequence.max() < len(chosen):
        raise TraceError(
            f"{source.path}: a sequence of its routing is not listed. Run `expertflow-trace check {source.path}`."
        )
    is_in = chosen[sequence]
    steps = int(step.max(initial=-1)) + 1
    has_kept, has_dropped = np.zeros(steps, dtype=bool), np.zeros(steps, dtype=bool)
    has_kept[step[is_in]] = True
    has_dropped[step[~is_in]] = True
    is_torn = has_kept & has_dropped
    # Padding was there for the longest of the batch, who may be gone.
    rows = is_in & ~(is_torn[step] & (routing["position"].to_numpy() < 0))
    if not rows.any():
        raise UsageError("None of the chosen sequences has any routing; choose others.")
    stays = np.zeros(steps, dtype=bool)
    stays[step[rows]] = True
    batches = sorted(
        {
            batch
            for number, batch in zip(listed["sequence"], listed["batch"], strict=True)
            if chosen[number]
        }
    )
    return _Kept(
        rows=rows,
        step=np.where(stays, np.cumsum(stays) - 1, -1),
        sequence=np.where(chosen, np.cumsum(chosen) - 1, -1),
        batch={old: new for new, old in enumerate(batches)},
        has_torn_batch=bool(is_torn.any()),
    )


def _append_sequences(writer: TraceWriter, source: Trace, kept: _Kept, has_times: bool) -> None:
    rows = source.table("sequences").sort_by("sequence")
    rows = rows.filter(pa.array(kept.sequence[rows["sequence"].to_numpy()] >= 0))
    rows = replaced(rows, "sequence", kept.sequence[rows["sequence"].to_numpy()])
    rows = replaced(rows, "batch", [kept.batch[old] for old in rows["batch"].to_pylist()])
    if not has_times:
        rows = replaced(rows, "ttft_s", np.full(rows.num_rows, np.nan))
    writer.append("sequences", rows)


def _renumbered(rows: pa.Table, kept: _Kept) -> pa.Table:
    rows = replaced(rows, "step", kept.step[rows["step"].to_numpy()])
    return replaced(rows, "sequence", kept.sequence[rows["sequence"].to_numpy()])


def _steps(source: Trace, kept: _Kept, routing: pa.Table, has_times: bool) -> pa.Table:
    rows = source.table("steps")
    rows = rows.filter(pa.array(kept.step[rows["step"].to_numpy()] >= 0))
    rows = replaced(rows, "step", kept.step[rows["step"].to_numpy()])
    return rows if has_times else untimed_steps(rows, routing, source)


def untimed_steps(rows: pa.Table, routing: pa.Table, source: Trace) -> pa.Table:
    """`rows` of the steps table without times, their sizes counted anew from `routing`.

    A step runs the layers of one stack, an encoder's or a decoder's, and all of them see its tokens.
    """
    layers, experts = source.shape.num_moe_layers, source.shape.num_experts
    step, layer = rows["step"].to_numpy().astype(np.int64), rows["layer"].to_numpy()
    is_whole = layer == WHOLE_STEP
    number = int(step.max(initial=-1)) + 1
    row_step = routing["step"].to_numpy().astype(np.int64)
    event = row_step * layers + routing["layer"].to_numpy()
    ids = expert_ids(routing["experts"])
    demanded = np.unique((event[:, None] * experts + ids).reshape(-1)) // experts
    distinct = np.bincount(demanded, minlength=number * layers)
    of_event = np.bincount(event, minlength=number * layers)
    of_step = of_event.reshape(number, layers).max(axis=1, initial=0)
    place = step * layers + np.where(is_whole, 0, layer)
    member = np.unique(row_step << 32 | routing["sequence"].to_numpy()) >> 32
    context = np.zeros(number, dtype=np.int64)
    np.maximum.at(context, row_step, routing["position"].to_numpy() + 1)
    counted = {
        "batch": np.bincount(member, minlength=number)[step],
        "tokens": np.where(is_whole, of_step[step], of_event[place]),
        "context": context[step],
        "distinct": np.where(is_whole, 0, distinct[place]),
        "waves": np.ones(len(step), dtype=np.int64),
    }
    times = [name for name in STEPS.names if name.endswith("_s")]
    for name, values in counted.items():
        rows = replaced(rows, name, values)
    for name in times:
        rows = replaced(rows, name, np.full(len(step), np.nan))
    return rows


def _transfers(source: Trace, kept: _Kept) -> pa.Table:
    rows = source.table("transfers")
    step = rows["step"].to_numpy()
    # Copies from before the first step belong to no sequence and stay.
    new = np.where(step < 0, -1, kept.step[np.maximum(step, 0)])
    is_in = (step < 0) | (new >= 0)
    rows = replaced(rows.filter(pa.array(is_in)), "step", new[is_in])
    return replaced(rows, "transfer", np.arange(rows.num_rows))


def _warnings(source: Trace, kept: _Kept) -> list[str]:
    if source.has_times and kept.has_torn_batch:
        return [TIMES_LOST]
    is_offloaded = source.manifest.run.residency == "offload"
    return [HISTORY_LOST] if is_offloaded and source.has_times else []


def replaced(rows: pa.Table, name: str, values: np.ndarray | Sequence[int]) -> pa.Table:
    """The table with new values in one column, of the type that it had."""
    field = rows.schema.field(name)
    column = pa.array(np.asarray(values).astype(field.type.to_pandas_dtype()), field.type)
    return rows.set_column(rows.schema.get_field_index(name), field, column)

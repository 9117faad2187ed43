"""Several traces of one model as one: numbers go on from trace to trace, and so do their clocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa

from .errors import TraceError, UsageError
from .probe import provenance
from .schema import Manifest, table_schemas
from .store import Trace
from .subset import refuse_itself, replaced, untimed_steps
from .types import Provenance, RunSettings
from .writer import TraceWriter

_ROWS_AT_A_TIME = 1 << 18
_CLOCKS = {
    "steps": ("start_s",),
    "transfers": ("queued_s", "start_s", "end_s", "needed_s"),
}
"""Columns that are moments on the run's clock, rather than durations."""


@dataclass(slots=True)
class _Offsets:
    """Where the next trace's numbers and clock begin."""

    step: int = 0
    sequence: int = 0
    batch: int = 0
    transfer: int = 0
    clock_s: float = 0.0


def merge_traces(sources: Sequence[Trace], out: Path, *, overwrite: bool = False) -> Manifest:
    """Write `out` with all sequences of `sources`, in order.

    What not all of them recorded is left out; so are all times if any of them has none. The machine is the
    first one's. Raises TraceError if the models differ, UsageError for fewer than two traces or runs whose times
    cannot stand side by side.
    """
    if len(sources) < 2:
        raise UsageError("Give two or more traces to merge.")
    first = sources[0]
    for source in sources:
        refuse_itself(out, source)
        _require_same(first, source)
    recorded = _recorded(sources)
    writer = TraceWriter(
        out,
        shape=first.shape,
        hardware=first.hardware,
        run=_run(sources),
        provenance=_provenance(sources),
        recorded=recorded,
        overwrite=overwrite,
    )
    has_steps = all(source.manifest.rows("steps") for source in sources)
    with writer:
        offsets = _Offsets()
        for source in sources:
            _append(writer, source, recorded, offsets, has_steps)
        points = dict.fromkeys(point for source in sources for point in source.manifest.memory)
        return writer.close(
            memory=list(points),
            salvaged=any(source.manifest.salvaged for source in sources),
            warnings=merge_warnings(sources, recorded),
        )


def merge_warnings(sources: Sequence[Trace], recorded: Sequence[str]) -> list[str]:
    """What a reader of the merged trace has to know."""
    found = list(dict.fromkeys(text for source in sources for text in source.manifest.warnings))
    first = sources[0]
    for other in sources[1:]:
        ours, theirs = first.hardware, other.hardware
        if (ours.name, ours.device, ours.link.name) != (
            theirs.name,
            theirs.device,
            theirs.link.name,
        ):
            found.append(
                f"Merged from different machines: {ours.name} with link {ours.link.name}, and {theirs.name} with link "
                f"{theirs.link.name}. The manifest describes the first; times of the others are not its own."
            )
    lost = sorted({name for source in sources for name in source.manifest.recorded} - set(recorded))
    if lost:
        found.append(f"Not recorded by all of the merged traces, and left out: {', '.join(lost)}.")
    ids = [source.manifest.trace_id for source in sources]
    if len(set(ids)) < len(ids):
        found.append("A trace was merged with itself: its prompts are in this one more than once.")
    return list(dict.fromkeys(found))


def _require_same(first: Trace, other: Trace) -> None:
    for field in fields(first.shape):
        ours, theirs = getattr(first.shape, field.name), getattr(other.shape, field.name)
        if ours != theirs:
            raise TraceError(
                f"{first.path} and {other.path} are of different models: {field.name} is {ours!r} and {theirs!r}. "
                "Only traces of one model can be merged."
            )
    ours, theirs = first.manifest.run.residency, other.manifest.run.residency
    if first.has_times and other.has_times and ours != theirs:
        raise UsageError(
            f"{first.path} was recorded with experts {ours}, {other.path} with experts {theirs}: their times cannot "
            "stand side by side. Merge traces that were recorded alike."
        )


def _recorded(sources: Sequence[Trace]) -> list[str]:
    """What all recorded, in the first one's order."""
    others = [set(source.manifest.recorded) for source in sources[1:]]
    common = [
        name for name in sources[0].manifest.recorded if all(name in other for other in others)
    ]
    if "steps" in common:
        return common
    return [name for name in common if name != "transfers"]


def _run(sources: Sequence[Trace]) -> RunSettings:
    runs = [source.manifest.run for source in sources]
    first = runs[0]
    extra = {
        key: value
        for key, value in first.extra.items()
        if all(run.extra.get(key) == value for run in runs)
    }
    kernels = {run.experts_implementation for run in runs}
    return RunSettings(
        batch_size=max(run.batch_size for run in runs),
        max_new_tokens=max(run.max_new_tokens for run in runs),
        residency=first.residency,
        experts_implementation=first.experts_implementation if len(kernels) == 1 else "mixed",
        lookahead=min(run.lookahead for run in runs),
        extra=extra,
    )


def _provenance(sources: Sequence[Trace]) -> Provenance:
    made = [source.manifest.provenance for source in sources]
    texts = {one.text for one in made}
    notes = [
        f"Merged from trace {source.manifest.trace_id} ({source.path.name}), made by `{one.command}` at {one.created}."
        for source, one in zip(sources, made, strict=True)
    ]
    if len(texts) > 1:
        notes.append(f"Text of different kinds: {', '.join(sorted(texts))}.")
    notes += dict.fromkeys(note for one in made for note in one.notes)
    text = made[0].text if len(texts) == 1 else "imported"
    return provenance(made[0].seed, text, notes=notes)


def _append(
    writer: TraceWriter,
    source: Trace,
    recorded: Sequence[str],
    offsets: _Offsets,
    has_steps: bool,
) -> None:
    """Write one trace behind those before it, and move the offsets on."""
    has_times = "steps" in recorded
    schemas = table_schemas(source.shape, recorded)
    sequences = source.table("sequences", schemas["sequences"].names)
    sequences = _moved(_moved(sequences, "sequence", offsets.sequence), "batch", offsets.batch)
    if not has_times:
        sequences = replaced(sequences, "ttft_s", np.full(sequences.num_rows, np.nan))
    writer.append("sequences", sequences)
    routing = source.table("routing", schemas["routing"].names)
    moved = _moved(_moved(routing, "step", offsets.step), "sequence", offsets.sequence)
    for start in range(0, moved.num_rows, _ROWS_AT_A_TIME):
        writer.append("routing", moved.slice(start, _ROWS_AT_A_TIME))
    steps = source.table("steps")
    if has_steps:
        timed = steps if has_times else untimed_steps(steps, routing, source)
        writer.append("steps", _on_clock(_moved(timed, "step", offsets.step), "steps", offsets))
    copies = source.table("transfers")
    if "transfers" in recorded:
        is_in_step = copies["step"].to_numpy() >= 0
        numbers = copies["step"].to_numpy() + np.where(is_in_step, offsets.step, 0)
        rows = _moved(replaced(copies, "step", numbers), "transfer", offsets.transfer)
        writer.append("transfers", _on_clock(rows, "transfers", offsets))
    offsets.step += _end(routing, "step")
    offsets.sequence += _end(sequences, "sequence") - offsets.sequence
    offsets.batch += _end(sequences, "batch") - offsets.batch
    offsets.transfer += _end(copies, "transfer")
    if has_times:
        ends = steps["start_s"].to_numpy() + steps["total_s"].to_numpy()
        offsets.clock_s += float(np.max(ends, initial=0.0))


def _end(rows: pa.Table, name: str) -> int:
    return int(rows[name].to_numpy().max(initial=-1)) + 1


def _moved(rows: pa.Table, name: str, offset: int) -> pa.Table:
    return replaced(rows, name, rows[name].to_numpy() + offset)


def _on_clock(rows: pa.Table, table: str, offsets: _Offsets) -> pa.Table:
    for name in _CLOCKS[table]:
        field = rows.schema.field(name)
        is_null = rows[name].is_null().to_numpy()
        later = rows[name].to_numpy() + offsets.clock_s
        rows = rows.set_column(
            rows.schema.get_field_index(name), field, pa.array(later, field.type, mask=is_null)
        )
    return rows

"""Writes a trace from routing alone. Every time in it is NaN, since none was taken.

The `steps` table is there, because it says how large each pass was; `recorded` leaves it out, because it
holds no times (`Trace.has_times`). A write that fails leaves nothing behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..probe import provenance
from ..schema import STEPS, WHOLE_STEP, Manifest, table_schemas
from ..types import HardwareProfile, LinkProfile, ModelShape, RunSettings
from ..writer import TraceWriter

UNTIMED = "Imported routing: no times were recorded; replay needs a declared or calibrated machine."
NOT_RECORDED = "not recorded"
_ROWS_PER_BLOCK = 1 << 19
_ROWS_PER_PART = 1 << 20
_PHASES = ["prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The routing of tokens, in order of the forward passes that took them.

    `experts` is uint16 [tokens, layers, top_k], likeliest first, `weights` float16 of the same shape or None.
    `step` [tokens] never descends and leaves no number out; `sequence`, `position` and `token_id` (None: not known)
    are [tokens]. `is_decode` is by step; `prompt_ids` and `domains` are by sequence.
    """

    experts: np.ndarray
    weights: np.ndarray | None
    step: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    is_decode: np.ndarray
    prompt_ids: tuple[str, ...]
    domains: tuple[str, ...]
    token_id: np.ndarray | None = None

    @property
    def starts(self) -> np.ndarray:
        """The first row of each step, and the end of the last: [steps + 1]."""
        return np.searchsorted(self.step, np.arange(len(self.is_decode) + 1))

    def rows_of(self, *, decode: bool) -> np.ndarray:
        """Rows of each sequence in one phase: [sequences]."""
        is_in = self.is_decode[self.step] == decode
        return np.bincount(self.sequence[is_in], minlength=len(self.prompt_ids))


def write_untimed(
    out: Path,
    routing: Routing,
    *,
    shape: ModelShape,
    notes: Sequence[str],
    warnings: Sequence[str],
    extra: Mapping[str, str],
    overwrite: bool = False,
) -> Manifest:
    """Write the trace `out`. Raises UsageError if it exists, ResourceError if the disk is full."""
    recorded = ["routing"]
    recorded += ["weights"] if routing.weights is not None else []
    recorded += ["token_ids"] if routing.token_id is not None else []
    steps = _Steps.of(routing)
    writer = TraceWriter(
        out,
        shape=shape,
        hardware=_no_hardware(),
        run=RunSettings(
            batch_size=int(steps.batch.max()),
            max_new_tokens=int(routing.rows_of(decode=True).max()),
            residency="resident",
            experts_implementation=NOT_RECORDED,
            extra=extra,
        ),
        provenance=provenance(0, "imported", notes=tuple(notes)),
        recorded=recorded,
        overwrite=overwrite,
        part_rows=_ROWS_PER_PART,
    )
    try:
        with writer:
            schemas = table_schemas(shape, recorded)
            writer.append("sequences", _sequences(routing, schemas["sequences"]))
            for first, last in _blocks(steps.starts, shape.num_moe_layers):
                writer.append("routing", _routing_rows(routing, steps, first, last, schemas))
                writer.append("steps", _steps_rows(routing, steps, first, last))
            return writer.close(warnings=(UNTIMED, *warnings))
    except BaseException:
        # The file it came from is still there, so half a trace is worth nothing.
        shutil.rmtree(writer.partial, ignore_errors=True)
        raise


def _no_hardware() -> HardwareProfile:
    return HardwareProfile(
        name=NOT_RECORDED,
        device="none",
        device_bytes=0,
        host_bytes=0,
        threads=0,
        link=LinkProfile(name=NOT_RECORDED, origin="declared", curves=()),
        origin="declared",
    )


@dataclass(frozen=True, slots=True)
class _Steps:
    """Sizes of the passes: first rows [steps + 1], and tokens, sequences and longest context [steps]."""

    starts: np.ndarray
    tokens: np.ndarray
    batch: np.ndarray
    context: np.ndarray

    @classmethod
    def of(cls, routing: Routing) -> _Steps:
        starts = routing.starts
        pairs = np.unique(routing.step.astype(np.int64) << 32 | routing.sequence)
        batch = np.bincount(pairs >> 32, minlength=len(starts) - 1)
        context = np.maximum.reduceat(routing.position, starts[:-1]) + 1
        return cls(starts, np.diff(starts), batch, context)


def _blocks(starts: np.ndarray, layers: int) -> Iterator[tuple[int, int]]:
    """Steps that are written together: few enough to fit in memory, one at least."""
    first, steps, size = 0, len(starts) - 1, max(1, _ROWS_PER_BLOCK // layers)
    while first < steps:
        last = int(np.searchsorted(starts, starts[first] + size, side="right")) - 1
        last = min(max(last, first + 1), steps)
        yield first, last
        first = last


def _routing_rows(
    routing: Routing, steps: _Steps, first: int, last: int, schemas: Mapping[str, pa.Schema]
) -> pa.Table:
    """One row per (step, layer, token), in this order."""
    tokens = slice(int(steps.starts[first]), int(steps.starts[last]))
    experts = routing.experts[tokens]
    count, layers, top_k = experts.shape
    step = np.repeat(routing.step[tokens], layers)
    layer = np.tile(np.arange(layers, dtype=np.int16), count)
    # A pass of one token is by layer already.
    is_sorted = count == last - first
    order = slice(None) if is_sorted else np.lexsort((layer, step))
    is_decode = routing.is_decode[step][order]
    columns = {
        "step": step[order].astype(np.int32),
        "layer": layer[order],
        "sequence": np.repeat(routing.sequence[tokens], layers)[order].astype(np.int32),
        "position": np.repeat(routing.position[tokens], layers)[order].astype(np.int32),
        "phase": _labels(is_decode, _PHASES),
        "token_id": np.repeat(_token_ids(routing, tokens), layers)[order],
        "modality": _labels(np.zeros(count * layers), ["text"]),
        "experts": _lists(experts.reshape(-1, top_k)[order]),
    }
    if routing.weights is not None:
        columns["weights"] = _lists(routing.weights[tokens].reshape(-1, top_k)[order])
    return pa.table(columns, schema=schemas["routing"])


def _token_ids(routing: Routing, tokens: slice) -> np.ndarray:
    if routing.token_id is None:
        return np.full(tokens.stop - tokens.start, -1, np.int32)
    return routing.token_id[tokens].astype(np.int32)


def _steps_rows(routing: Routing, steps: _Steps, first: int, last: int) -> pa.Table:
    """The size of each step by layer and as a whole; the times are NaN."""
    experts = routing.experts[steps.starts[first] : steps.starts[last]]
    layers = experts.shape[1]
    distinct = _distinct(experts, steps.starts[first : last + 1] - steps.starts[first])
    places = layers + 1
    rows = (last - first) * places
    counts = {
        "step": np.repeat(np.arange(first, last), places),
        "layer": np.tile([*range(layers), WHOLE_STEP], last - first),
        "batch": np.repeat(steps.batch[first:last], places),
        "tokens": np.repeat(steps.tokens[first:last], places),
        "context": np.repeat(steps.context[first:last], places),
        "distinct": np.concatenate([distinct, np.zeros((last - first, 1))], axis=1).reshape(-1),
        "waves": np.ones(rows),
    }
    columns: dict[str, object] = {
        name: values.astype(STEPS.field(name).type.to_pandas_dtype())
        for name, values in counts.items()
    }
    columns["phase"] = _labels(np.repeat(routing.is_decode[first:last], places), _PHASES)
    columns |= {name: np.full(rows, np.nan) for name in STEPS.names if name.endswith("_s")}
    return pa.table(columns, schema=STEPS)


def _distinct(experts: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Distinct experts of each layer of each step: [steps, layers]."""
    tokens, layers, top_k = experts.shape
    steps = len(starts) - 1
    if tokens == steps:
        return np.full((steps, layers), top_k)
    span = int(experts.max()) + 1
    step = np.repeat(np.arange(steps), np.diff(starts))
    event = step[:, None] * layers + np.arange(layers)
    found = np.unique(event[:, :, None] * span + experts)
    return np.bincount(found // span, minlength=steps * layers).reshape(steps, layers)


def _sequences(routing: Routing, schema: pa.Schema) -> pa.Table:
    count = len(routing.prompt_ids)
    prompts, decoded = routing.rows_of(decode=False), routing.rows_of(decode=True)
    # The pass over the prompt gives the first token, if there is one.
    generated = decoded + ((prompts > 0) & (decoded > 0))
    _, first = np.unique(routing.sequence, return_index=True)
    columns = {
        "sequence": np.arange(count, dtype=np.int32),
        "prompt_id": list(routing.prompt_ids),
        "domain": list(routing.domains),
        "batch": np.unique(routing.step[first], return_inverse=True)[1].astype(np.int32),
        "prompt_tokens": prompts.astype(np.int32),
        "generated_tokens": generated.astype(np.int32),
        "finish": _labels(np.zeros(count), ["unknown"]),
        "ttft_s": np.full(count, np.nan),
        "prompt_sha256": [""] * count,
        "prompt_text": pa.nulls(count, pa.string()),
        "output_ids": pa.nulls(count, pa.list_(pa.int32())),
    }
    return pa.table(columns, schema=schema)


def _lists(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _labels(which: np.ndarray, names: list[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(which.astype(np.int8)), pa.array(names))

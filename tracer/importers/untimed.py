"""Writes a trace from routing alone. Every time in it is NaN, since none was taken.

Sequences run one after another at batch 1. The `steps` table is there, because it says how large each
pass was; `recorded` leaves it out, because it holds no times (`Trace.has_times`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..probe import provenance
from ..schema import STEPS, WHOLE_STEP, Manifest, table_schemas
from ..types import HardwareProfile, LinkProfile, ModelShape, Phase, RunSettings
from ..writer import TraceWriter

UNTIMED = "Imported routing: no times were recorded; replay needs a declared or calibrated machine."
NOT_RECORDED = "not recorded"
_ROWS_PER_BLOCK = 1 << 19
_ROWS_PER_PART = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The routing of whole sequences, one after another.

    `experts` is uint16 [tokens, layers, top_k], `weights` float16 of the same shape or None. `bounds` are
    the rows at which sequences begin, and the end of the last: [sequences + 1].
    """

    experts: np.ndarray
    weights: np.ndarray | None
    bounds: np.ndarray
    prompt_ids: tuple[str, ...]
    domains: tuple[str, ...]

    @property
    def lengths(self) -> np.ndarray:
        """Rows of each sequence."""
        return np.diff(self.bounds)


def write_untimed(
    out: Path,
    routing: Routing,
    *,
    shape: ModelShape,
    phase: Phase,
    notes: Sequence[str],
    warnings: Sequence[str],
    extra: Mapping[str, str],
    overwrite: bool = False,
) -> Manifest:
    """Write the trace `out`: one decode step per row, or one prefill step per sequence."""
    recorded = ["routing", *(["weights"] if routing.weights is not None else [])]
    longest = int(routing.lengths.max())
    writer = TraceWriter(
        out,
        shape=shape,
        hardware=_no_hardware(),
        run=RunSettings(
            batch_size=1,
            max_new_tokens=longest if phase == "decode" else 0,
            residency="resident",
            experts_implementation=NOT_RECORDED,
            extra=extra,
        ),
        provenance=provenance(0, "imported", notes=tuple(notes)),
        recorded=recorded,
        overwrite=overwrite,
        part_rows=_ROWS_PER_PART,
    )
    with writer:
        schemas = table_schemas(shape, recorded)
        writer.append("sequences", _sequences(routing, phase, schemas["sequences"]))
        for first, last in _blocks(routing, phase):
            block = _Block.of(routing, phase, first, last)
            writer.append("routing", block.routing_rows(schemas["routing"]))
            writer.append("steps", block.steps_rows(shape.num_experts))
        return writer.close(warnings=(UNTIMED, *warnings))


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


def _blocks(routing: Routing, phase: Phase) -> Iterator[tuple[int, int]]:
    """Rows that are written together: whole steps, and few enough to fit in memory."""
    if phase == "prefill":
        yield from pairwise(routing.bounds.tolist())
        return
    tokens, layers, _ = routing.experts.shape
    size = max(1, _ROWS_PER_BLOCK // layers)
    for first in range(0, tokens, size):
        yield first, min(first + size, tokens)


@dataclass(frozen=True, slots=True)
class _Block:
    """Some whole steps: for each token its step, sequence and position, and what it was routed to."""

    phase: Phase
    step: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    experts: np.ndarray
    weights: np.ndarray | None

    @classmethod
    def of(cls, routing: Routing, phase: Phase, first: int, last: int) -> _Block:
        token = np.arange(first, last)
        sequence = np.searchsorted(routing.bounds, token, side="right") - 1
        return cls(
            phase,
            token if phase == "decode" else sequence,
            sequence,
            token - routing.bounds[sequence],
            routing.experts[first:last],
            None if routing.weights is None else routing.weights[first:last],
        )

    def routing_rows(self, schema: pa.Schema) -> pa.Table:
        """One row per (step, layer, token), in this order."""
        tokens, layers, _ = self.experts.shape
        layer = np.arange(layers, dtype=np.int16)
        rows = tokens * layers
        columns = {
            "step": self._by_layer(self.step.astype(np.int32)),
            "layer": np.tile(layer, tokens) if self._is_decode else np.repeat(layer, tokens),
            "sequence": self._by_layer(self.sequence.astype(np.int32)),
            "position": self._by_layer(self.position.astype(np.int32)),
            "phase": _label(self.phase, rows),
            "token_id": np.full(rows, -1, np.int32),
            "modality": _label("text", rows),
            "experts": _lists(self._flat(self.experts)),
        }
        if self.weights is not None:
            columns["weights"] = _lists(self._flat(self.weights))
        return pa.table(columns, schema=schema)

    def steps_rows(self, num_experts: int) -> pa.Table:
        """The size of each step by layer and as a whole; the times are NaN."""
        tokens, layers, top_k = self.experts.shape
        if self._is_decode:
            step, size, context = self.step, 1, self.position + 1
            distinct = np.full(layers, top_k)
        else:
            step, size, context = self.step[:1], tokens, np.asarray([tokens])
            distinct = _distinct(self.experts, num_experts)
        places, rows = layers + 1, len(step) * (layers + 1)
        counts = {
            "step": np.repeat(step, places),
            "layer": np.tile([*range(layers), WHOLE_STEP], len(step)),
            "batch": np.ones(rows),
            "tokens": np.full(rows, size),
            "context": np.repeat(context, places),
            "distinct": np.tile([*distinct.tolist(), 0], len(step)),
            "waves": np.ones(rows),
        }
        columns: dict[str, object] = {
            name: values.astype(STEPS.field(name).type.to_pandas_dtype())
            for name, values in counts.items()
        }
        columns["phase"] = _label(self.phase, rows)
        columns |= {name: np.full(rows, np.nan) for name in STEPS.names if name.endswith("_s")}
        return pa.table(columns, schema=STEPS)

    @property
    def _is_decode(self) -> bool:
        return self.phase == "decode"

    def _by_layer(self, of_tokens: np.ndarray) -> np.ndarray:
        """One value per token, at each of its rows: a step's rows are grouped by layer."""
        layers = self.experts.shape[1]
        return np.repeat(of_tokens, layers) if self._is_decode else np.tile(of_tokens, layers)

    def _flat(self, values: np.ndarray) -> np.ndarray:
        # A decode step is one token, so its rows are by layer already.
        ordered = values if self._is_decode else values.transpose(1, 0, 2)
        return np.ascontiguousarray(ordered).reshape(-1, values.shape[2])


def _distinct(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Distinct experts of each layer of one step."""
    layers = experts.shape[1]
    is_used = np.zeros((layers, num_experts), dtype=bool)
    is_used[np.arange(layers)[None, :, None], experts] = True
    return is_used.sum(axis=1)


def _sequences(routing: Routing, phase: Phase, schema: pa.Schema) -> pa.Table:
    count = len(routing.lengths)
    number = np.arange(count, dtype=np.int32)
    lengths, nothing = routing.lengths.astype(np.int32), np.zeros(count, np.int32)
    columns = {
        "sequence": number,
        "prompt_id": list(routing.prompt_ids),
        "domain": list(routing.domains),
        "batch": number,
        "prompt_tokens": nothing if phase == "decode" else lengths,
        "generated_tokens": lengths if phase == "decode" else nothing,
        "finish": _label("unknown", count),
        "ttft_s": np.full(count, np.nan),
        "prompt_sha256": [""] * count,
        "prompt_text": pa.nulls(count, pa.string()),
        "output_ids": pa.nulls(count, pa.list_(pa.int32())),
    }
    return pa.table(columns, schema=schema)


def _lists(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _label(text: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([text]))

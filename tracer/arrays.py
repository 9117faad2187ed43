"""The routing table as numpy arrays: what statistics, replay and learning work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

NO_EXPERT = 65_535
"""Stands for null in arrays of expert ids: no prediction was recorded for that row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingArrays:
    """The routing table as numpy arrays, one entry per row, in recorded order.

    `experts` is uint16 [rows, top_k] in router order; `weights` float16 [rows, top_k] or None, NaN where one
    is not known; `lookahead[d]` uint16 [rows, top_k], filled with NO_EXPERT where nothing was predicted.
    `score_ids` uint16 and `scores` float16 [rows, m] are the likeliest experts of each token and the gate's scores
    of them, or None.
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
    score_ids: np.ndarray | None = None
    scores: np.ndarray | None = None


_HELD = {
    "step",
    "layer",
    "sequence",
    "position",
    "phase",
    "token_id",
    "modality",
    "experts",
    "weights",
    "score_ids",
    "scores",
}


def is_held(column: str) -> bool:
    """Whether RoutingArrays has a place for this column of the routing table."""
    return column in _HELD or column.startswith("lookahead_")


def routing_arrays(rows: pa.Table) -> RoutingArrays:
    """Turn rows of the routing table into numpy arrays."""
    return joined_arrays([rows], rows.schema)


def expert_ids(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of one size as an array [rows, size]; NO_EXPERT or NaN stands for null."""
    found = _empty(pa.field("ids", column.type), len(column))
    _fill(found, column)
    return found


Piece = tuple[int, pa.Table]
Runner = Callable[[Callable[[Piece], None], Sequence[Piece]], object]


def _one_by_one(work: Callable[[Piece], None], pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        work(piece)


def joined_arrays(
    parts: Sequence[pa.Table], schema: pa.Schema, run: Runner = _one_by_one
) -> RoutingArrays:
    """Turn parts of the routing table into arrays that hold all of them, each value copied once.

    `run` does one call per part, in any order or at the same time: parts fill rows of their own.
    """
    rows = sum(part.num_rows for part in parts)
    filled = {field.name: _empty(field, rows) for field in schema if is_held(field.name)}

    def fill(piece: Piece) -> None:
        first, part = piece
        for name, target in filled.items():
            _fill(target[first : first + part.num_rows], part.column(name))

    firsts = np.cumsum([0, *(part.num_rows for part in parts)]).tolist()
    run(fill, list(zip(firsts, parts, strict=False)))
    depths = [int(name.removeprefix("lookahead_")) for name in filled if "lookahead_" in name]
    return RoutingArrays(
        step=filled["step"],
        layer=filled["layer"],
        sequence=filled["sequence"],
        position=filled["position"],
        phase_is_decode=filled["phase"],
        token_id=filled["token_id"],
        is_pad=filled["modality"],
        experts=filled["experts"],
        weights=filled.get("weights"),
        lookahead={depth: filled[f"lookahead_{depth}"] for depth in depths},
        score_ids=filled.get("score_ids"),
        scores=filled.get("scores"),
    )


_MARK = {"phase": "decode", "modality": "pad"}
"""Columns of labels, and the label that their arrays are true for."""


def _empty(field: pa.Field, rows: int) -> np.ndarray:
    if field.name in _MARK:
        return np.empty(rows, dtype=bool)
    if pa.types.is_fixed_size_list(field.type):
        return np.empty((rows, field.type.list_size), field.type.value_type.to_pandas_dtype())
    return np.empty(rows, field.type.to_pandas_dtype())


def _fill(target: np.ndarray, column: pa.ChunkedArray) -> None:
    """Copy a column into `target`, chunk by chunk."""
    first = 0
    for chunk in column.chunks:
        place = target[first : first + len(chunk)]
        first += len(chunk)
        if target.dtype == bool:
            _fill_mark(place, chunk)
        elif target.ndim == 2:
            _fill_lists(place, chunk)
        else:
            place[:] = chunk.to_numpy(zero_copy_only=False)


def _fill_mark(place: np.ndarray, chunk: pa.DictionaryArray) -> None:
    labels = chunk.dictionary.to_pylist()
    is_marked = np.array([label in _MARK.values() for label in labels], dtype=bool)
    np.take(is_marked, chunk.indices.to_numpy(), out=place)


def _fill_lists(place: np.ndarray, chunk: pa.FixedSizeListArray) -> None:
    width = place.shape[1]
    nothing = np.nan if place.dtype.kind == "f" else NO_EXPERT
    # `values` ignores the chunk's own window, and what lies under a null is arbitrary.
    flat = chunk.values.slice(chunk.offset * width, len(chunk) * width)
    if flat.null_count:
        is_known = flat.is_valid().to_numpy(zero_copy_only=False)
        place[:] = nothing
        place.reshape(-1)[is_known] = flat.drop_null().to_numpy(zero_copy_only=False)
    else:
        place[:] = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    if chunk.null_count:
        place[chunk.is_null().to_numpy(zero_copy_only=False)] = nothing

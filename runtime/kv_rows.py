"""Rows of KV caches: made equally wide, and moved between batches.

Only caches that keep every position of every layer are moved. A row is one sequence: keys and values
[rows, heads, positions, size] of each layer. Where sequences share a row (serving_pack.py), a column is one token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from ..simulator.costs import Linear
from ..simulator.kv_copies import fit_kv_move
from ..simulator.policy.units import Placement
from ..tracer.errors import UsageError
from ..tracer.types import ModelShape

_PARTS = ("keys", "values")
_ROWS = (1, 2, 4)
_WIDTHS = (32, 128, 512)
_REPEATS = 5


def require_movable(cache: Any) -> None:
    """Raise UsageError unless the rows of a model's cache can be moved."""
    from transformers.cache_utils import DynamicLayer

    kinds = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
    if kinds:
        raise UsageError(
            f"Batches of this model cannot be regrouped: its cache has {', '.join(sorted(kinds))}, which forget "
            "positions or keep a state; only full attention is moved. Use --scheduler fcfs."
        )


def width_of(cache: Any) -> int:
    """Positions in a cache."""
    return int(cache.get_seq_length())


def widen(cache: Any, width: int) -> None:
    """Put empty positions in front, to be masked, until there are `width`."""
    more = width - width_of(cache)
    for layer in _layers(cache):
        for part in _PARTS:
            setattr(layer, part, functional.pad(getattr(layer, part), (0, 0, more, 0)))


def move_rows(caches: Sequence[Any], placements: Sequence[Placement]) -> list[Any]:
    """Caches of the batches after a rearrangement. All are equally wide; those given are used up."""
    kept = [caches[placement.base] for placement in placements]
    if not any(
        placement.copied or len(placement.rows) < placement.room for placement in placements
    ):
        return kept
    columns = [_layers(cache) for cache in caches]
    for layer in range(len(columns[0])):
        for part in _PARTS:
            old = [getattr(column[layer], part) for column in columns]
            # Everything is read before anything is written: rows change places.
            arriving = [_gathered(old, placement) for placement in placements]
            for placement, rows in zip(placements, arriving, strict=True):
                base = columns[placement.base][layer]
                setattr(base, part, _written(old[placement.base], placement, rows))
    return kept


def keep_columns(cache: Any, columns: torch.Tensor) -> None:
    """Drop all positions but these, which are in ascending order: [columns], on the cache's device."""
    for layer in _layers(cache):
        for part in _PARTS:
            setattr(layer, part, getattr(layer, part).index_select(-2, columns))


def _layers(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if layer.is_initialized]


def _gathered(old: Sequence[torch.Tensor], placement: Placement) -> torch.Tensor | None:
    if not placement.copied:
        return None
    sources = [placement.sources[row] for row in placement.copied]
    return torch.stack([old[batch][row] for batch, row in sources])


def _written(base: torch.Tensor, placement: Placement, rows: torch.Tensor | None) -> torch.Tensor:
    if placement.is_new:
        assert rows is not None
        return rows
    kept = base[: len(placement.rows)]
    if rows is not None:
        for place, row in enumerate(placement.copied):
            kept[row] = rows[place]
    return kept


def measure_kv_move(shape: ModelShape, device: torch.device) -> Linear:
    """Seconds of `move_rows` by (rows, bytes): rows as large as the model's change places between two batches."""
    from transformers.cache_utils import DynamicCache

    if not shape.kv_bytes_per_token:
        return Linear((0.0, 0.0))
    per_tensor = max(1, shape.kv_bytes_per_token // (2 * shape.num_layers))
    points: list[tuple[int, float, float]] = []
    for width in _WIDTHS:
        for rows in _ROWS:
            caches = [DynamicCache() for _ in range(2)]
            for cache in caches:
                for layer in range(shape.num_layers):
                    part = torch.ones(2 * rows, 1, width, per_tensor, dtype=torch.uint8)
                    cache.update(part.to(device), part.to(device), layer)
            best = min(_timed(caches, rows, device) for _ in range(_REPEATS))
            points.append((2 * rows, float(2 * rows * width * shape.kv_bytes_per_token), best))
    return fit_kv_move(points)


def _timed(caches: Sequence[Any], rows: int, device: torch.device) -> float:
    """Seconds to exchange the first `rows` rows of two batches."""
    total = 2 * rows
    placements = [
        Placement(
            base,
            tuple(range(total)),
            tuple((1 - base if row < rows else base, row) for row in range(total)),
            total,
        )
        for base in range(2)
    ]
    _wait(device)
    began = time.perf_counter()
    move_rows(caches, placements)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

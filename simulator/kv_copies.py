"""Seconds to copy rows of a KV cache in this machine's memory: for forecasts of machines where nobody measured it."""

from __future__ import annotations

import time
from functools import cache

import numpy as np

from ..tracer.types import ModelShape
from .costs import Linear

_ROWS = (1, 2, 4, 8)
_WIDTHS = (32, 128, 512)
_REPEATS = 5


def fit_kv_move(points: list[tuple[int, float, float]]) -> Linear:
    """Seconds by (rows, bytes), of points (rows, bytes, seconds)."""
    rows, sizes, seconds = (
        np.asarray(column, dtype=np.float64) for column in zip(*points, strict=True)
    )
    # In proportion: a few long copies must not drown the many short ones.
    features = np.stack([rows, sizes], axis=1) / seconds[:, None]
    weights, *_ = np.linalg.lstsq(features, np.ones(len(seconds)), rcond=None)
    if weights.min() < 0:  # one of the two explains all
        single = [float(features[:, n].sum() / (features[:, n] ** 2).sum()) for n in (0, 1)]
        weights = np.array([0.0, single[1]]) if weights[0] < 0 else np.array([single[0], 0.0])
    misfit = np.abs(features @ weights - 1)
    return Linear((float(weights[0]), float(weights[1])), float(np.median(misfit)))


def measure_host_kv_move(shape: ModelShape) -> Linear:
    """Copy rows as large as the model's in this process, layer by layer, keys apart from values; once."""
    return _measured(shape.num_layers, shape.kv_bytes_per_token)


@cache
def _measured(num_layers: int, bytes_per_token: int) -> Linear:
    if not bytes_per_token:
        return Linear((0.0, 0.0))
    points: list[tuple[int, float, float]] = []
    per_tensor = max(1, bytes_per_token // (2 * num_layers))
    for width in _WIDTHS:
        for rows in _ROWS:
            tensors = [
                np.ones((2 * rows, width * per_tensor), np.uint8) for _ in range(2 * num_layers)
            ]
            best = min(_timed(tensors, rows) for _ in range(_REPEATS))
            points.append((rows, float(rows * width * bytes_per_token), best))
    return fit_kv_move(points)


def _timed(tensors: list[np.ndarray], rows: int) -> float:
    began = time.perf_counter()
    for tensor in tensors:
        arriving = [tensor[rows + row].copy() for row in range(rows)]
        for row, values in enumerate(arriving):
            tensor[row] = values
    return time.perf_counter() - began

"""Large matrices made small enough to draw: neighbours put together, and said so on the axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

MAX_SIDE: Final = 200
"""Rows or columns of a drawn matrix at most; more than a screen can tell apart."""


def binned(
    matrix: np.ndarray, axis: int, limit: int = MAX_SIDE, put: Callable[..., np.ndarray] = np.sum
) -> tuple[np.ndarray, list[str]]:
    """The matrix with at most `limit` entries along an axis, and the names of what each entry holds."""
    length = matrix.shape[axis]
    size = -(-length // limit)
    starts = np.arange(0, length, size)
    if size == 1:
        return matrix, [str(start) for start in starts]
    pieces = [
        put(np.take(matrix, range(start, min(start + size, length)), axis=axis), axis=axis)
        for start in starts.tolist()
    ]
    names = [f"{start}–{min(start + size, length) - 1}" for start in starts.tolist()]
    return np.stack(pieces, axis=axis), names

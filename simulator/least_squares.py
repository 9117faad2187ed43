"""Least squares for costs, which are never negative."""

from __future__ import annotations

import numpy as np


def non_negative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights [features] of rows [rows, features]: the most negative one is dropped until none is left."""
    active = list(range(matrix.shape[1]))
    weights = np.zeros(matrix.shape[1])
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    while active:
        solved, *_ = np.linalg.lstsq(matrix[:, active] / scale[active], target, rcond=None)
        if (solved >= 0).all():
            weights[active] = solved / scale[active]
            return weights
        active.pop(int(np.argmin(solved)))
    return weights

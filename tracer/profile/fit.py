"""Lines through measured points, and what the points say of themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .document import CopyPoint, ExpertPoint, Line, Sample

POOR_FIT = 0.15
"""Median relative error of a line above which its points should be used instead."""
NOISY = 0.5
"""Relative interquartile range, or drift between halves, above which the machine was busy."""


def sample(seconds: Sequence[float]) -> Sample:
    """Median and quartiles of repeated measurements."""
    low, middle, high = (float(q) for q in np.quantile(seconds, [0.25, 0.5, 0.75]))
    return Sample(seconds=middle, low_s=low, high_s=high, repeats=len(seconds))


def drift(seconds: Sequence[float]) -> float:
    """Relative difference of the medians of the first and the second half of repeated measurements."""
    half = len(seconds) // 2
    if half == 0:
        return 0.0
    first, second = float(np.median(seconds[:half])), float(np.median(seconds[half:]))
    return abs(first - second) / max(min(first, second), 1e-12)


def fit_line(
    features: Sequence[str], rows: Sequence[Sequence[float]], seconds: Sequence[float]
) -> Line:
    """Least squares on the relative error, with no negative weight: a longer copy is never a quicker one."""
    x, y = np.asarray(rows, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    scaled = x / y[:, None]
    active = list(range(x.shape[1]))
    weights = np.zeros(x.shape[1])
    while active:
        # Columns of their own size: bytes beside ones would drown them.
        size = np.linalg.norm(scaled[:, active], axis=0)
        found = np.linalg.lstsq(scaled[:, active] / size, np.ones(len(y)), rcond=None)[0] / size
        if (found >= 0).all():
            weights[active] = found
            break
        active.pop(int(np.argmin(found * size)))
    residual = float(np.median(np.abs(x @ weights / y - 1)))
    return Line(
        features=tuple(features), weights=tuple(float(w) for w in weights), residual=residual
    )


def fit_copies(points: Sequence[CopyPoint]) -> Line:
    """Seconds of a copy by (1, bytes)."""
    rows = [(1.0, float(point.num_bytes)) for point in points]
    return fit_line(("1", "bytes"), rows, [point.time.seconds for point in points])


def fit_experts(points: Sequence[ExpertPoint]) -> Line:
    """Seconds of a call by (1, tokens, distinct experts)."""
    rows = [(1.0, float(point.tokens), float(point.distinct)) for point in points]
    return fit_line(("1", "tokens", "distinct"), rows, [point.time.seconds for point in points])

"""The Pareto front: what nothing else beats in every respect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def pareto(
    rows: Sequence[T], *, maximise: Sequence[str] = (), minimise: Sequence[str] = ()
) -> list[T]:
    """The rows that no other row dominates, best in the first attribute first.

    One row dominates another if it is nowhere worse and somewhere better. Equal rows stay together.
    """
    scored = [(_score(row, maximise, minimise), row) for row in rows]
    # Whatever dominates a row stands before it in this order, or something on the front that dominates both.
    scored.sort(key=lambda pair: pair[0], reverse=True)
    front: list[tuple[tuple[float, ...], T]] = []
    for score, row in scored:
        if not any(_dominates(other, score) for other, _ in front):
            front.append((score, row))
    return [row for _, row in front]


def _score(row: object, maximise: Sequence[str], minimise: Sequence[str]) -> tuple[float, ...]:
    return (
        *(float(getattr(row, name)) for name in maximise),
        *(-float(getattr(row, name)) for name in minimise),
    )


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))

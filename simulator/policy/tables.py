"""Tables of small numbers as text, so that what a policy has learned stays short and readable in policy.json.

A row is numbers with spaces between them, a table rows with `|` between them: `3 17 4|0 2 9`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def packed(rows: Iterable[Iterable[int]]) -> str:
    """A table as text."""
    return "|".join(" ".join(map(str, row)) for row in rows)


def unpacked(text: str) -> list[list[int]]:
    """The table a text holds."""
    return [[int(number) for number in row.split()] for row in text.split("|")]


def unpacked_pairs(text: str) -> list[list[tuple[int, int]]]:
    """The table a text holds, two numbers at a time."""
    return [_pairs(row) for row in unpacked(text)]


def _pairs(row: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(row[::2], row[1::2], strict=True))

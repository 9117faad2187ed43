"""Policy names short enough for an axis, and still different from each other."""

from __future__ import annotations

from collections.abc import Sequence


def short(name: str, limit: int = 44) -> str:
    """A name cut in its middle: policies differ at both ends (the cache first, the slots last)."""
    if len(name) <= limit:
        return name
    tail = limit * 2 // 5
    return f"{name[: limit - tail - 1]}…{name[-tail:]}"


def short_names(names: Sequence[str], limit: int = 44, *, number: bool = True) -> list[str]:
    """The names cut to `limit`, numbered where two are alike then: an axis would merge them."""
    if not number:
        return [short(name, limit) for name in names]
    out: list[str] = []
    seen: dict[str, int] = {}
    for name in names:
        text = short(name, limit)
        seen[text] = seen.get(text, 0) + 1
        out.append(text if seen[text] == 1 else f"{text} ({seen[text]})")
    return out

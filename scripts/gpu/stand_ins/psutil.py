"""Stands in for psutil: how much memory is free, from Linux's own account."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    """Bytes of the machine."""

    total: int
    available: int


def virtual_memory() -> Memory:
    """Memory as /proc/meminfo tells it."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    found = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
    return Memory(found["MemTotal"], found["MemAvailable"])

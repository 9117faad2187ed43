"""What has been measured so far: one line per cell, written as soon as it is done, so that a later run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CELLS = "cells.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRecord:
    """One configuration of one model: predicted (None where nobody predicts it), measured, and the samples behind it.

    `predicted` and `measured` are results as `deploy` writes them, `samples` the raw times of each repeat.
    """

    key: str
    subject: str
    kind: str
    batch: int
    share: float
    settings: str
    predicted: Mapping[str, Any] | None
    measured: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    seconds: float
    notes: Sequence[str] = field(default_factory=tuple)

    def median(self, *path: str) -> float:
        """The middle value of a field over the repeats (the lower of two)."""
        found: list[float] = []
        for result in self.measured:
            value: Any = result
            for name in path:
                value = value[name]
            found.append(float(value))
        return sorted(found)[(len(found) - 1) // 2]

    def foretold(self, *path: str) -> float | None:
        """The same of the prediction."""
        value: Any = self.predicted
        for name in path:
            if value is None:
                return None
            value = value[name]
        return None if value is None else float(value)


class Evidence:
    """The cells in a folder. Those measured under other settings, and lines cut short by a kill, are left aside."""

    def __init__(self, folder: Path, settings: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._settings = folder / CELLS, settings
        self._found: dict[str, CellRecord] = {}
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    @property
    def cells(self) -> list[CellRecord]:
        """All cells, in the order in which they were measured."""
        return list(self._found.values())

    def has(self, key: str) -> bool:
        """Whether a cell needs no measuring."""
        return key in self._found

    def add(self, record: CellRecord) -> None:
        """Keep a cell."""
        fields = {name: getattr(record, name) for name in CellRecord.__slots__}
        with self._path.open("a", encoding="utf-8") as file:
            if file.tell() and not self._ends_with_newline():
                file.write("\n")
            file.write(json.dumps(fields) + "\n")
        self._found[record.key] = record

    def _read(self, line: str) -> None:
        try:
            record = CellRecord(**json.loads(line))
        except (ValueError, TypeError):
            return
        if record.settings == self._settings:
            self._found[record.key] = record

    def _ends_with_newline(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"

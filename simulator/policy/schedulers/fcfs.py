"""First come, first served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ..base import Waiting


class FCFS:
    """Batches in order of arrival."""

    name: ClassVar[str] = "fcfs"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def pick(self, waiting: Sequence[Waiting], limit: int) -> Sequence[int]:
        return range(min(limit, len(waiting)))


MEMBER = FCFS

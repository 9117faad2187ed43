"""Load every missing expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class Load:
    """Bring it over the link, and compute it on the device."""

    name: ClassVar[str] = "load"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True
    loads_all: ClassVar[bool] = True

    def on_cpu(self, tokens: Sequence[int]) -> Sequence[int]:
        return ()


MEMBER = Load

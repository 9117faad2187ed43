"""Load every missing expert, and send what it replaces back to the host first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class WriteBack:
    """Swap experts, as Mixtral-offloading does (Eliseev & Mazur, arXiv 2312.17238): an eviction costs a copy too.

    Weights do not change, so the way back is wasted: a baseline to be compared with, not to be deployed for its speed.
    The way back takes as long as the way there and goes before it over the same link; with spare buffers a bus that
    carries both ways at once hides some of it.
    """

    name: ClassVar[str] = "write_back"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True
    is_baseline: ClassVar[bool] = True
    loads_all: ClassVar[bool] = True
    writes_back: ClassVar[bool] = True

    def on_cpu(self, tokens: Sequence[int]) -> Sequence[int]:
        return ()


MEMBER = WriteBack

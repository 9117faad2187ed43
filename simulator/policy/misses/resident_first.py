"""Compute what is there while the rest is on its way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class ResidentFirst:
    """Load every missing expert, and compute the resident ones of the event meanwhile (Shen et al., arXiv 2510.26730).

    Their cache-aware routing, as an order only: each token's experts and weights stay what the router said. An event
    that finds some of its experts runs in two waves, and pays for the second walk of the kernel; it saves what the
    first one hides of the copies.
    """

    name: ClassVar[str] = "resident_first"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True
    loads_all: ClassVar[bool] = True
    residents_first: ClassVar[bool] = True

    def on_cpu(self, tokens: Sequence[int]) -> Sequence[int]:
        return ()


MEMBER = ResidentFirst

"""Keep what will be demanded soonest: the bound no cache without prefetch can beat (Belady, 1966)."""

from __future__ import annotations

from typing import ClassVar

from .belady_forced import BeladyForcedAdmit


class Belady(BeladyForcedAdmit):
    """Knows the future and need not keep a miss: an event runs beside the pool, then the best are kept.

    For that it uses slots that no real policy has (`staging`), which also makes it a bound for events larger
    than the pool.
    """

    name: ClassVar[str] = "belady"
    needs: ClassVar[frozenset[str]] = frozenset({"future"})

    def staging(self, largest_event: int) -> int:
        return largest_event


MEMBER = Belady

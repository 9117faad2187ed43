"""The events to come, for members that are bounds (Belady, oracle)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from ...tracer.types import ExpertKey

NEVER = 2**62


class Future:
    """A known sequence of layer events, read from a moving present.

    `events` are the distinct experts of each event, in order. The present is before the first event
    until `advance` is called.
    """

    def __init__(self, events: Sequence[Sequence[ExpertKey]]) -> None:
        self._events = events
        self._uses: dict[ExpertKey, list[int]] = {}
        for number, event in enumerate(events):
            for key in event:
                self._uses.setdefault(key, []).append(number)
        self._present = -1

    def advance(self) -> None:
        """The next event becomes the present."""
        self._present += 1

    def next_use(self, key: ExpertKey) -> int:
        """Number of the first event after the present that demands `key`; NEVER if none."""
        uses = self._uses.get(key, [])
        place = bisect_right(uses, self._present)
        return uses[place] if place < len(uses) else NEVER

    def upcoming(self, count: int) -> Sequence[Sequence[ExpertKey]]:
        """The next `count` events after the present."""
        return self._events[self._present + 1 : self._present + 1 + count]

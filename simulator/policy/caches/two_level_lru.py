"""LRU with two levels: what was not used lately goes before what was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from ....tracer.errors import UsageError
from ....tracer.types import ExpertKey
from ..base import Facts
from ..rescored import Entry, Rescored, Resident


class TwoLevelLRU(Rescored):
    """Two levels after Shen et al. (arXiv 2510.26730), who released no code: this is one reading.

    High level: demanded within the last `window` events of this pool, now − last < window, or predicted for its layer
    by the predictor's latest words on it, until that layer is routed. Low level: the rest, and prefetched experts that
    are no longer predicted, until they are demanded. rank = (0 if low else 1, last event, key), lowest first; the last
    event is that of the last demand, or of admission for the prefetched. Without a predictor the levels follow recency
    and this is LRU. An event with an eviction costs O(n) of the pool (rescored.py), and so does a prediction.
    """

    name: ClassVar[str] = "two_level_lru"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def __init__(self, window: int = 48) -> None:
        if window < 1:
            raise UsageError(f"cache 'two_level_lru' takes window >= 1, got {window}.")
        super().__init__()
        self._window = window
        self._event: frozenset[ExpertKey] = frozenset()
        self._unused: set[ExpertKey] = set()
        self._predicted: dict[int, set[ExpertKey]] = {}

    def begin(self, keys: Sequence[ExpertKey], facts: Facts) -> None:
        super().begin(keys, facts)
        self._event = frozenset(keys)
        self._predicted.pop(keys[0].layer, None)

    def expect(self, keys: Sequence[ExpertKey]) -> None:
        self._heap = None
        said: dict[int, set[ExpertKey]] = {}
        for key in keys:
            said.setdefault(key.layer, set()).add(key)
        self._predicted |= said

    def entries(self, residents: Iterable[Resident]) -> list[Entry]:
        return [
            (1.0 if self._is_high(key, last) else 0.0, last, key) for key, (last, _) in residents
        ]

    def _is_high(self, key: ExpertKey, last: int) -> bool:
        if key in self._predicted.get(key.layer, ()):
            return True
        return last > self.now - self._window and key not in self._unused

    def touch(self, key: ExpertKey) -> None:
        # An admission comes here too; outside the event it is that of a prefetch.
        if key in self._event:
            self._unused.discard(key)
        else:
            self._unused.add(key)
        super().touch(key)

    def remove(self, key: ExpertKey) -> None:
        self._unused.discard(key)
        super().remove(key)

    def released(self, keys: Sequence[ExpertKey]) -> Iterable[ExpertKey]:
        # What is admitted from now on was not demanded by the event.
        self._event = frozenset()
        return ()


MEMBER = TwoLevelLRU

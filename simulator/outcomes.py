"""What became of prefetches: useful, late, wasted, harmful or cancelled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..tracer.types import ExpertKey
from .policy.log import Entry
from .result import PrefetchResult


def prefetch_outcomes(log: Sequence[Entry]) -> PrefetchResult:
    """Judge every prefetch of a decision log by what happened to its expert afterwards.

    useful: demanded after it had arrived; late: demanded while on its way; wasted: evicted or left over
    undemanded; harmful: the expert it evicted was missed before its own was of any use. An event demands its
    experts together: a prefetch that is useful or late in the very event that misses its victim does no harm.
    """
    ledger = Ledger()
    rows: list[Entry] = []
    for entry in log:
        is_answer = entry.kind in ("event", "cancel") or entry.detail == "demand"
        if not is_answer and rows:
            _judge(ledger, rows)
            rows = []
        if is_answer:
            rows.append(entry)
        elif entry.kind == "load" and entry.detail == "prefetch":
            gone = ExpertKey(entry.evicted_layer, entry.evicted_expert)
            ledger.prefetched(_key(entry), gone if gone.layer >= 0 else None)
    _judge(ledger, rows)
    return ledger.result()


def _judge(ledger: Ledger, rows: Sequence[Entry]) -> None:
    """One event with its answers: it is demanded as a whole, before room is made for it."""
    keys: dict[str, list[ExpertKey]] = {"hit": [], "late": [], "miss": [], "cpu": []}
    for row in rows:
        if row.kind == "event":
            keys[row.detail].append(_key(row))
    ledger.demanded(keys["hit"], keys["late"], keys["miss"] + keys["cpu"])
    for row in rows:
        if row.kind == "cancel":
            ledger.cancelled(_key(row))


def _key(entry: Entry) -> ExpertKey:
    return ExpertKey(entry.layer, entry.expert)


class Ledger:
    """Counts outcomes as they happen. An expert is blamed on at most one prefetch, the last that evicted it."""

    def __init__(self) -> None:
        self._issued = self._useful = self._late = self._harmful = self._cancelled = 0
        self._victim_of: dict[ExpertKey, ExpertKey | None] = {}
        self._blamed: dict[ExpertKey, ExpertKey] = {}

    def prefetched(self, key: ExpertKey, evicts: ExpertKey | None) -> None:
        """A prefetch was asked for."""
        self._issued += 1
        self._close(key)
        self._came_back(key)
        self._victim_of[key] = evicts
        if evicts is not None:
            self._came_back(evicts)  # an older blame ends where a newer begins
            self._blamed[evicts] = key

    def demanded(
        self,
        hits: Iterable[ExpertKey],
        lates: Iterable[ExpertKey],
        misses: Sequence[ExpertKey],
    ) -> None:
        """A layer event was answered; its experts were demanded together."""
        for key in hits:
            self._useful += self._close(key)
        for key in lates:
            self._late += self._close(key)
        for key in misses:
            self._harmful += key in self._blamed
            self._came_back(key)
        for key in misses:
            self._close(key)

    def cancelled(self, key: ExpertKey) -> None:
        """A prefetch was given up on its way."""
        self._cancelled += 1
        self._close(key)

    def result(self) -> PrefetchResult:
        """The counts so far; what is still undemanded counts as wasted."""
        known = self._useful + self._late + self._cancelled
        return PrefetchResult(
            issued=self._issued,
            useful=self._useful,
            late=self._late,
            wasted=self._issued - known,
            harmful=self._harmful,
            cancelled=self._cancelled,
        )

    def _close(self, key: ExpertKey) -> bool:
        """End the story of a prefetch; says whether there was one."""
        if key not in self._victim_of:
            return False
        victim = self._victim_of.pop(key)
        if victim is not None and self._blamed.get(victim) == key:
            del self._blamed[victim]
        return True

    def _came_back(self, key: ExpertKey) -> None:
        """An evicted expert is loaded again, or about to be."""
        by = self._blamed.pop(key, None)
        if by is not None and by in self._victim_of:
            self._victim_of[by] = None

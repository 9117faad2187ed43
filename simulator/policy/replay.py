"""Replays a decision log: the inputs go into a fresh core, and every answer must come out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...tracer.types import ExpertKey, ModelShape
from .base import NO_FACTS, Facts
from .future import Future
from .log import Entry
from .spec import PolicySpec


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """How many rows came out equal, and the first that did not."""

    rows: int
    equal: int
    first_difference: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether every row was reproduced."""
        return self.equal == self.rows and not self.first_difference


def replay(log: Sequence[Entry], spec: PolicySpec, shape: ModelShape) -> ReplayReport:
    """Feed a log's inputs to a fresh core and compare all rows."""
    again: list[Entry] = []
    future = Future([keys for _, _, keys, _ in events(log)]) if "future" in spec.needs() else None
    core = spec.build(shape, future=future, log=again)
    core.warm()
    for kind, step, keys, facts in _inputs(log):
        if kind == "event":
            core.demand(step, keys[0].layer, [key.expert for key in keys], facts)
        elif kind == "predict":
            core.prefetch(step, keys)
        elif kind == "loaded":
            core.loaded(step, keys[0])
        elif kind == "lost":
            core.lost(step, keys[0])
        else:
            core.release(step, keys[0].layer)
    return _compare(log, again)


Input = tuple[str, int, tuple[ExpertKey, ...], Facts]


def events(log: Sequence[Entry]) -> Iterator[Input]:
    """The log's layer events in order: kind, step, distinct experts ascending, facts."""
    return (item for item in _inputs(log) if item[0] == "event")


def _inputs(log: Sequence[Entry]) -> Iterator[Input]:
    # Rows of one event or one prediction follow each other; answers stand between them.
    rows: list[Entry] = []
    for entry in log:
        if entry.kind in ("load", "cancel"):
            continue
        if rows and not _joins(rows[0], entry):
            yield _input(rows)
            rows = []
        rows.append(entry)
    if rows:
        yield _input(rows)


def _joins(first: Entry, entry: Entry) -> bool:
    if entry.kind not in ("event", "predict") or (entry.kind, entry.step) != first[:2]:
        return False
    return entry.kind == "predict" or entry.layer == first.layer


def _input(rows: list[Entry]) -> Input:
    first = rows[0]
    if first.kind == "event":
        # Waves list an event's experts in the order they ran; it was asked for in ascending order.
        rows = sorted(rows, key=lambda row: row.expert)
    keys = tuple(ExpertKey(row.layer, row.expert) for row in rows)
    if first.kind != "event":
        return first.kind, first.step, keys, NO_FACTS
    weights = tuple(row.weight for row in rows) if first.weight >= 0 else ()
    facts = Facts(first.is_prefill, tuple(row.tokens for row in rows), weights)
    return first.kind, first.step, keys, facts


def _compare(log: Sequence[Entry], again: Sequence[Entry]) -> ReplayReport:
    equal = sum(a == b for a, b in zip(log, again, strict=False))
    rows = max(len(log), len(again))
    if equal == rows:
        return ReplayReport(rows, equal)
    place = next(
        (i for i, (a, b) in enumerate(zip(log, again, strict=False)) if a != b),
        min(len(log), len(again)),
    )
    recorded = log[place] if place < len(log) else "nothing"
    replayed = again[place] if place < len(again) else "nothing"
    return ReplayReport(rows, equal, f"row {place}: recorded {recorded}, replayed {replayed}")

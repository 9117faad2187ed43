"""Replays a decision log: the inputs go into a fresh core, and every answer must come out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...tracer.types import ExpertKey, ModelShape
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
    future = Future([keys for _, _, keys in events(log)]) if "future" in spec.needs() else None
    core = spec.build(shape, future=future, log=again)
    core.warm()
    for kind, step, keys in _inputs(log):
        if kind == "event":
            core.demand(step, keys[0].layer, [key.expert for key in keys])
        elif kind == "predict":
            core.prefetch(step, keys)
        elif kind == "loaded":
            core.loaded(step, keys[0])
        else:
            core.release(step, keys[0].layer)
    return _compare(log, again)


def events(log: Sequence[Entry]) -> Iterator[tuple[str, int, tuple[ExpertKey, ...]]]:
    """The log's layer events in order, each with its distinct experts ascending."""
    return (item for item in _inputs(log) if item[0] == "event")


def _inputs(log: Sequence[Entry]) -> Iterator[tuple[str, int, tuple[ExpertKey, ...]]]:
    # Rows of one event or one prediction follow each other; answers stand between them.
    kind, step, keys = "", -1, []
    for entry in log:
        if entry.kind in ("load", "cancel"):
            continue
        key = ExpertKey(entry.layer, entry.expert)
        joins = entry.kind in ("event", "predict") and (entry.kind, entry.step) == (kind, step)
        if joins and not (entry.kind == "event" and keys[0].layer != entry.layer):
            keys.append(key)
            continue
        if keys:
            yield kind, step, _ordered(kind, keys)
        kind, step, keys = entry.kind, entry.step, [key]
    if keys:
        yield kind, step, _ordered(kind, keys)


def _ordered(kind: str, keys: list[ExpertKey]) -> tuple[ExpertKey, ...]:
    # Waves list an event's experts in the order they ran; it was asked for in ascending order.
    return tuple(sorted(keys)) if kind == "event" else tuple(keys)


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

"""Batches that are decoded in turns and regrouped: what simulator and runtime do in the same way.

A driver holds batches of sequences, row by row. Before a decode step it leaves out those that have ended, asks the
scheduler if it is time, and gets the places of all rows from `arrange`: whose keys and values are copied where.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ...tracer.errors import UsageError
from .base import Regrouping, Route, Scheduler

RouteSource = Literal["true", "predicted", "previous"]


def require_unit(**counts: int) -> None:
    """Raise UsageError unless all counts are whole numbers of at least 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {count!r}.")


def regrouping_of(scheduler: Scheduler) -> Regrouping | None:
    """The scheduler as one that regroups; None if its batches run one after another."""
    if getattr(scheduler, "batches", 1) < 2:
        return None
    return scheduler  # pyright: ignore[reportReturnType]


def is_time(scheduler: Regrouping, count: int, batches: int, limit: int) -> bool:
    """Whether to ask before decode step `count` of so many batches: only where there is something to exchange."""
    if not scheduler.every or count % scheduler.every:
        return False
    return min(batches, limit) > 1


def source_of_routes(scheduler: Regrouping) -> RouteSource:
    """Which routes a scheduler is told (policy.base.Regrouping)."""
    if "future" in scheduler.needs:
        return "true"
    return "predicted" if "paths" in scheduler.needs else "previous"


def even_sizes(count: int, limit: int) -> list[int]:
    """Sizes of as few batches as `count` sequences need: equal, or larger by one at the front."""
    number = -(-count // limit)
    least, more = divmod(count, number) if number else (0, 0)
    return [least + (place < more) for place in range(number)]


def distinct(routes: Sequence[Route], groups: Iterable[Iterable[int]]) -> int:
    """Distinct experts, summed over batches and layers: what regrouping is to make small."""
    total = 0
    for group in groups:
        union = 0
        for place in group:
            union |= routes[place]
        total += union.bit_count()
    return total


def ask(
    scheduler: Regrouping,
    routes: Sequence[Route],
    groups: Sequence[Sequence[int]],
    limit: int,
) -> list[list[int]]:
    """The scheduler's answer, checked. Raises UsageError for one that is no partition."""
    found = [list(group) for group in scheduler.regroup(routes, groups, limit)]
    placed = sorted(place for group in found for place in group)
    is_sound = placed == list(range(len(routes))) and len(found) <= len(groups)
    if not is_sound or not all(1 <= len(group) <= limit for group in found):
        raise UsageError(
            f"Scheduler {scheduler.name!r} made {found} of {len(routes)} sequences in {len(groups)} batches; expected "
            f"each of them once, in as many batches or fewer of 1 to {limit}."
        )
    return found


@dataclass(frozen=True, slots=True)
class Placement:
    """One batch after a rearrangement: it takes over the rows of the batch `base`.

    Row i now holds sequence `rows[i]`, which was in row `sources[i][1]` of batch `sources[i][0]`; `room` are the rows
    that `base` had. If there are more now, all are copied; else only those that come from elsewhere are, in place.
    """

    base: int
    rows: tuple[int, ...]
    sources: tuple[tuple[int, int], ...]
    room: int

    @property
    def is_new(self) -> bool:
        """Whether the batch has grown out of its rows."""
        return len(self.rows) > self.room

    @property
    def copied(self) -> tuple[int, ...]:
        """The rows whose keys and values are copied."""
        if self.is_new:
            return tuple(range(len(self.rows)))
        return tuple(row for row, source in enumerate(self.sources) if source != (self.base, row))

    @property
    def arrived(self) -> int:
        """Sequences that came from another batch."""
        return sum(batch != self.base for batch, _ in self.sources)


def arrange(held: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]) -> list[Placement]:
    """Places for the sequences of `groups`, which are in `held`, so that few rows are copied; in order of `held`.

    A group takes over the batch it shares most sequences with. Sequences of no group are left behind.
    """
    sources = {
        sequence: (batch, row)
        for batch, rows in enumerate(held)
        for row, sequence in enumerate(rows)
    }
    bases = _bases(held, groups)
    order = sorted(range(len(groups)), key=bases.__getitem__)
    return [
        _placed(bases[group], len(held[bases[group]]), groups[group], sources) for group in order
    ]


def _bases(held: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]) -> list[int]:
    """The batch that each group takes over: the largest overlaps first."""
    shared = sorted(
        (-len(set(rows) & set(group)), batch, number)
        for number, group in enumerate(groups)
        for batch, rows in enumerate(held)
    )
    bases, taken = [-1] * len(groups), set[int]()
    for _, batch, number in shared:
        if bases[number] < 0 and batch not in taken:
            bases[number] = batch
            taken.add(batch)
    return bases


def _placed(
    base: int, room: int, group: Sequence[int], sources: dict[int, tuple[int, int]]
) -> Placement:
    ordered = sorted(group, key=sources.__getitem__)
    size = len(ordered)
    if size > room:
        own = [sequence for sequence in ordered if sources[sequence][0] == base]
        rows = [*own, *(sequence for sequence in ordered if sources[sequence][0] != base)]
    else:
        stays = {
            sources[s][1]: s for s in ordered if sources[s][0] == base and sources[s][1] < size
        }
        others = iter([s for s in ordered if s not in stays.values()])
        rows = [stays[row] if row in stays else next(others) for row in range(size)]
    return Placement(base, tuple(rows), tuple(sources[s] for s in rows), room)

"""What a sweep may try: axes of budgets, links and members, and the points they span."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..tracer.records import to_json
from .policy.registry import FAMILIES
from .policy.spec import AS_ROUTED, Member

DEFAULTS = {
    "cache": "lru",
    "allocation": "equal",
    "predictor": "none",
    "scheduler": "fcfs",
    "misses": "load",
    "routing": AS_ROUTED.name,
}
"""Members of the other families where one family's bound is looked at."""


@dataclass(frozen=True, slots=True)
class Range:
    """All values from `low` to `high`, both included; whole numbers if both ends are."""

    low: float
    high: float

    @property
    def is_continuous(self) -> bool:
        """Whether the values cannot be counted."""
        return isinstance(self.low, float) or isinstance(self.high, float)

    def values(self) -> tuple[int, ...]:
        """The whole numbers in it."""
        return tuple(range(int(self.low), int(self.high) + 1))


Values = tuple[Any, ...] | Range


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget in the user's words, and the slots it pays for."""

    text: str
    slots: int


@dataclass(frozen=True, slots=True)
class Option:
    """A member by name, and what each of its parameters may be; the others keep their defaults."""

    name: str
    params: Mapping[str, Values] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Every combination of budget, link and one member per family, and the rivals and bounds beside them.

    `budgets` as a Range is in slots. `members` is by family. A link of None is the machine's own. `rivals` are
    predictors that are tried with every cache at the listed budgets, and with the plainest of all else; `answers` are
    answers to misses that are tried with every cache and every predictor of the grid, the rest as plain.
    """

    budgets: tuple[Budget, ...] | Range
    members: Mapping[str, tuple[Option, ...]]
    links: tuple[str | None, ...] = (None,)
    rivals: tuple[Option, ...] = ()
    answers: tuple[Option, ...] = ()
    bounds: bool = True

    def size(self) -> int | None:
        """Number of combinations; None if a continuous range makes them countless."""
        sizes = [_count(self.budgets), len(self.links)]
        for options in self.members.values():
            variants = [_product(map(_count, option.params.values())) for option in options]
            sizes.append(None if None in variants else sum(size or 0 for size in variants))
        return _product(sizes)

    def all_budgets(self) -> tuple[Budget, ...]:
        """The budgets one by one."""
        if isinstance(self.budgets, Range):
            return tuple(Budget(f"{slots}slots", slots) for slots in self.budgets.values())
        return self.budgets


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One configuration. `members` hold the parameters asked for, not what a trace teaches."""

    budget: str
    slots: int
    link: str | None
    members: Mapping[str, Member]

    @property
    def key(self) -> str:
        """Sixteen hex digits over all that makes the configuration, the budget's wording aside."""
        # Points older than routings keep their key.
        members = {kind: m for kind, m in self.members.items() if m != AS_ROUTED}
        document = [self.slots, self.link, to_json(members)]
        text = json.dumps(document, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def needs(self) -> frozenset[str]:
        """What its members need."""
        return frozenset().union(
            *(
                family.get(self.members[family.kind].name).needs
                for family in FAMILIES
                if family.kind in self.members
            )
        )

    @property
    def is_bound(self) -> bool:
        """Whether a member knows the future, so that it cannot be deployed."""
        return "future" in self.needs


def grid(space: Space) -> list[Point]:
    """Every point of a space without continuous ranges, each once."""
    kinds = list(space.members)
    families = [
        [member for option in space.members[kind] for member in expand(option)] for kind in kinds
    ]
    return _distinct(
        Point(
            budget=budget.text,
            slots=budget.slots,
            link=link,
            members=dict(zip(kinds, members, strict=True)),
        )
        for budget in space.all_budgets()
        for link in space.links
        for members in itertools.product(*families)
    )


def rival_points(space: Space) -> list[Point]:
    """The rivals of a space, which has only so many predictors in its grid lest it explode."""
    if isinstance(space.budgets, Range):
        return []
    plain = {kind: Member(name=name) for kind, name in DEFAULTS.items()}
    pairs = itertools.product(_expanded(space.members["cache"]), _expanded(space.rivals))
    members = [{**plain, "cache": cache, "predictor": predictor} for cache, predictor in pairs]
    triples = itertools.product(
        _expanded(space.members["cache"]),
        _expanded(space.members["predictor"]),
        _expanded(space.answers),
    )
    members += [
        {**plain, "cache": cache, "predictor": predictor, "misses": answer}
        for cache, predictor, answer in triples
    ]
    routings = _expanded(space.members.get("routing", (Option(AS_ROUTED.name),)))
    members = [{**found, "routing": routing} for found in members for routing in routings]
    return _distinct(
        Point(budget=budget.text, slots=budget.slots, link=link, members=found)
        for budget in space.budgets
        for link in space.links
        for found in members
    )


def bound_points(space: Space) -> list[Point]:
    """Members that know the future, one family at a time, at the listed budgets.

    Caches that know the future are looked at under every allocation that learns nothing.
    """
    if not space.bounds or isinstance(space.budgets, Range):
        return []
    bounds = list(_bound_members())
    return _distinct(
        Point(budget=budget.text, slots=budget.slots, link=link, members=members)
        for budget in space.budgets
        for link in space.links
        for members in bounds
    )


def _expanded(options: Iterable[Option]) -> list[Member]:
    return [member for option in options if _is_listed(option) for member in expand(option)]


def _is_listed(option: Option) -> bool:
    return not any(isinstance(v, Range) and v.is_continuous for v in option.params.values())


def expand(option: Option) -> list[Member]:
    """A member with every combination of its parameters."""
    names = list(option.params)
    lists = [
        values.values() if isinstance(values, Range) else values
        for values in option.params.values()
    ]
    return [
        Member(name=option.name, params=dict(zip(names, chosen, strict=True)))
        for chosen in itertools.product(*lists)
    ]


def corners(space: Space) -> Iterator[tuple[str, Member]]:
    """Every member with each parameter at what is listed, or at both ends of its range; and its family."""
    for kind, options in (*space.members.items(), ("predictor", space.rivals)):
        for option in options:
            ends = {
                name: (values.low, values.high) if isinstance(values, Range) else values
                for name, values in option.params.items()
            }
            for member in expand(Option(option.name, ends)):
                yield kind, member


def _bound_members() -> Iterator[dict[str, Member]]:
    for family in FAMILIES:
        for name in family.names():
            member = family.get(name)
            if "future" not in member.needs or getattr(member, "is_hypothetical", False):
                continue
            for allocation in _plain_allocations() if family.kind == "cache" else ("equal",):
                names = DEFAULTS | {"allocation": allocation, family.kind: name}
                yield {kind: Member(name=chosen) for kind, chosen in names.items()}


def _plain_allocations() -> list[str]:
    registry = next(family for family in FAMILIES if family.kind == "allocation")
    return [name for name in registry.names() if not registry.get(name).needs]


def _distinct(points: Iterable[Point]) -> list[Point]:
    found: dict[str, Point] = {}
    for point in points:
        found.setdefault(point.key, point)
    return list(found.values())


def _count(values: Values) -> int | None:
    if isinstance(values, Range):
        return None if values.is_continuous else len(values.values())
    return len(values)


def _product(counts: Iterable[int | None]) -> int | None:
    """The product; None if a factor is not known."""
    known: list[int] = []
    for count in counts:
        if count is None:
            return None
        known.append(count)
    return math.prod(known)

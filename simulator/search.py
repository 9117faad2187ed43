"""Walks a space too large to list: Optuna asks, we predict.

NSGA-II for several objectives, TPE for one. Points are asked for in batches of a fixed size and answered in
the order they were asked for, so that a seed gives the same search whatever the number of workers; a search
that was cut short is walked again from its start, answered at once with the rows it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..tracer.errors import ResourceError
from .policy.spec import Member
from .space import Option, Point, Range, Space, Values
from .sweep_row import OBJECTIVES, Row

_POPULATION = 40
_BATCH = 10
"""Points in one batch: a generation of NSGA-II, or a few steps of TPE."""
_PATIENCE = 10
"""Batches in a row without a new point after which a search that only repeats itself is ended."""

Evaluate = Callable[[Sequence[Point]], Sequence[Row]]


def search(
    space: Space,
    objectives: Sequence[str],
    *,
    trials: int,
    seed: int,
    evaluate: Evaluate,
    known: Iterable[Row] = (),
) -> list[str]:
    """Try `trials` distinct points and return their keys, those of `known` rows that were told included.

    `evaluate` gives a row for each point, in order. `known` rows of other searches are told first and are not
    counted. Raises ResourceError if Optuna is not installed.
    """
    optuna = _optuna()
    sampler = _sampler(optuna, len(objectives), seed)
    study = optuna.create_study(
        sampler=sampler, directions=[OBJECTIVES[name] for name in objectives]
    )
    told = [row for row in known if _belongs(row.point, space)]
    for row in told:
        study.enqueue_trial(_choices(row.point, space))
    others = dict.fromkeys(row.key for row in told)
    seen: dict[str, None] = {}
    batch = _POPULATION if len(objectives) > 1 else _BATCH
    size = space.size()
    wanted = trials if size is None else min(trials, size)
    patience = _PATIENCE
    while len(seen) < wanted and patience > 0:
        asked = [study.ask() for _ in range(batch)]
        points = [_suggested(trial, space) for trial in asked]
        points = _first_of(points, trials - len(seen), seen.keys() | others.keys())
        before = len(seen)
        rows = {row.key: row for row in evaluate([p for p in points if p is not None])}
        for trial, point in zip(asked, points, strict=True):
            if point is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            if point.key not in others:
                seen[point.key] = None
            _tell(optuna, study, trial, rows[point.key], objectives)
        is_stale = len(seen) == before and asked[-1].number >= len(told)
        patience = patience - 1 if is_stale else _PATIENCE
    return [*others, *seen]


def _first_of(points: Sequence[Point], room: int, seen: set[str]) -> list[Point | None]:
    """The points, less those that would be new beyond `room`."""
    new: set[str] = set()
    kept: list[Point | None] = []
    for point in points:
        if point.key not in seen and point.key not in new:
            if len(new) >= room:
                kept.append(None)
                continue
            new.add(point.key)
        kept.append(point)
    return kept


def _tell(optuna: Any, study: Any, trial: Any, row: Row, objectives: Sequence[str]) -> None:
    values = [getattr(row, name) for name in objectives]
    if row.error or None in values:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(trial, values)


def _suggested(trial: Any, space: Space) -> Point:
    """One point. Every parameter of every member is drawn, so that parents can always be crossed."""
    drawn = {name: _drawn(trial, name, values) for name, values in _dimensions(space).items()}
    if isinstance(space.budgets, Range):
        slots = drawn["budget"]
        budget = f"{slots}slots"
    else:
        chosen = next(b for b in space.budgets if b.text == drawn["budget"])
        budget, slots = chosen.text, chosen.slots
    members: dict[str, Member] = {}
    for kind, options in space.members.items():
        names = _option_names(options)
        option = options[names.index(drawn[kind])]
        prefix = f"{kind}.{drawn[kind]}."
        members[kind] = Member(
            name=option.name, params={key: drawn[prefix + key] for key in option.params}
        )
    link = next(link for link in space.links if str(link) == drawn["link"])
    return Point(budget=budget, slots=slots, link=link, members=members)


def _drawn(trial: Any, name: str, values: Values) -> Any:
    if not isinstance(values, Range):
        return values[trial.suggest_categorical(name, range(len(values)))]
    if values.is_continuous:
        # Four digits are as fine as anyone can read or a trace can tell apart.
        drawn = float(f"{trial.suggest_float(name, values.low, values.high):.4g}")
        return min(max(drawn, values.low), values.high)
    return trial.suggest_int(name, int(values.low), int(values.high))


def _dimensions(space: Space) -> dict[str, Values]:
    """What is drawn for one point, by name."""
    if isinstance(space.budgets, Range):
        found: dict[str, Values] = {"budget": space.budgets}
    else:
        found = {"budget": tuple(budget.text for budget in space.budgets)}
    found["link"] = tuple(str(link) for link in space.links)
    for kind, options in space.members.items():
        names = _option_names(options)
        found[kind] = names
        for name, option in zip(names, options, strict=True):
            found |= {f"{kind}.{name}.{key}": values for key, values in option.params.items()}
    return found


def _option_names(options: Sequence[Option]) -> tuple[str, ...]:
    """Names of options, numbered where one member is listed more than once."""
    names = [option.name for option in options]
    return tuple(
        name if names.count(name) == 1 else f"{name}#{place}" for place, name in enumerate(names)
    )


def _belongs(point: Point, space: Space) -> bool:
    try:
        _choices(point, space)
    except (ValueError, StopIteration):
        return False
    return True


def _choices(point: Point, space: Space) -> dict[str, Any]:
    """What has to be drawn for a point; ValueError or StopIteration if the space does not hold it."""
    dimensions = _dimensions(space)
    chosen = {name: _first(values) for name, values in dimensions.items()}
    if isinstance(space.budgets, Range):
        chosen["budget"] = _place(space.budgets, point.slots)
    else:
        text = next(b.text for b in space.budgets if b.slots == point.slots)
        chosen["budget"] = _place(dimensions["budget"], text)
    chosen["link"] = _place(dimensions["link"], str(point.link))
    for kind, options in space.members.items():
        member = point.members[kind]
        names = _option_names(options)
        place = next(place for place, option in enumerate(options) if _fits(member, option))
        chosen[kind] = place
        for key, value in member.params.items():
            chosen[f"{kind}.{names[place]}.{key}"] = _place(options[place].params[key], value)
    return chosen


def _fits(member: Member, option: Option) -> bool:
    if option.name != member.name or set(option.params) != set(member.params):
        return False
    return all(_holds(option.params[key], value) for key, value in member.params.items())


def _holds(values: Values, value: Any) -> bool:
    if isinstance(values, Range):
        return isinstance(value, (int, float)) and values.low <= value <= values.high
    return value in values


def _first(values: Values) -> Any:
    return values.low if isinstance(values, Range) else 0


def _place(values: Values, value: Any) -> Any:
    """How Optuna is told a value: the place in a list, or the value in a range."""
    if not _holds(values, value):
        raise ValueError(f"{value} is not in {values}")
    return value if isinstance(values, Range) else values.index(value)


def _sampler(optuna: Any, objectives: int, seed: int) -> Any:
    if objectives > 1:
        return optuna.samplers.NSGAIISampler(population_size=_POPULATION, seed=seed)
    return optuna.samplers.TPESampler(seed=seed, multivariate=False)


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise ResourceError(
            "A space too large to list is searched with optuna, which is not installed. "
            "Run: pip install 'expertflow-trace[sweep]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna

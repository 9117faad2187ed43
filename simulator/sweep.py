"""Tries many policies on one trace: planned, predicted wherever told, kept on disk, and summed up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..tracer.errors import UsageError
from ..tracer.records import to_json
from .executors import Executor
from .judge import Judge
from .pareto import pareto
from .policy.base import LESSONS
from .policy.registry import FAMILIES
from .search import search
from .space import DEFAULTS, Point, Space, bound_points, grid, rival_points
from .space_file import Search
from .sweep_folder import BestOf, MachineNote, SweepFile, SweepFolder
from .sweep_row import OBJECTIVES, Row

EXHAUSTIVE = 2000
"""A grid of at most so many points is walked in full; searching it would cost as much and see less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be tried. `points` are known beforehand: the grid if it is walked; rivals and bounds in any case."""

    space: Space
    search: Search
    method: str
    points: tuple[Point, ...]
    seed: int = 0

    @property
    def total(self) -> int:
        """Points that will be tried at most."""
        return len(self.points) + (self.search.trials if self.method == "optuna" else 0)


def plan_of(space: Space, wanted: Search, *, trials: int | None = None, seed: int = 0) -> Plan:
    """Decide how to walk a space: in full if it is small, with Optuna if it is large or continuous.

    With `trials`, a grid that is larger than that is searched too. Raises UsageError if the grid was asked for.
    """
    if trials is not None:
        wanted = replace(wanted, trials=trials)
        if wanted.method == "grid":
            raise UsageError('--trials limits a search, but the space says method = "grid".')
    size = space.size()
    method = wanted.method
    if method == "auto":
        limit = EXHAUSTIVE if trials is None else min(EXHAUSTIVE, trials)
        method = "grid" if size is not None and size <= limit else "optuna"
    points = grid(space) if method == "grid" else []
    listed = {point.key for point in points}
    beside = [*rival_points(space), *bound_points(space)]
    points += [point for point in beside if point.key not in listed]
    return Plan(space=space, search=wanted, method=method, points=tuple(points), seed=seed)


def needs_curves(space: Space) -> bool:
    """Whether a member of the space learns from hit curves."""
    return "curves" in _needs(space)


def needed_lessons(space: Space) -> tuple[str, ...]:
    """Tables that members of the space learn from a trace."""
    needs = _needs(space)
    return tuple(need for need in LESSONS if need in needs)


def _needs(space: Space) -> set[str]:
    families = {family.kind: family for family in FAMILIES}
    members = [
        families[kind].get(option.name)
        for kind, options in (*space.members.items(), ("predictor", space.rivals))
        for option in options
    ]
    return {need for member in members for need in member.needs}


def document_of(judge: Judge, plan: Plan) -> SweepFile:
    """The sweep.json of a sweep that has not begun."""
    ready = judge.forecaster
    search_note = {"method": plan.method, "objectives": plan.search.objectives}
    if plan.method == "optuna":
        search_note["trials"] = plan.search.trials
    return SweepFile(
        trace_id=ready.trace_id,
        model_id=ready.shape.model_id,
        machine=MachineNote(
            hash=judge.machine_hash(),
            device=ready.device,
            links=tuple(link or f"{ready.link} ({ready.link_origin})" for link in plan.space.links),
            is_calibrated=ready.decision_is_measured,
        ),
        space=to_json(plan.space),
        search=to_json(search_note),
        seed=plan.seed,
        status="running",
        provenance=replace(ready.provenance, seed=plan.seed),
        counts={"planned": plan.total},
        warnings=_warnings(judge),
    )


def sweep(
    judge: Judge,
    plan: Plan,
    folder: SweepFolder,
    executor: Executor,
    *,
    advance: Callable[[int], None],
    known: Iterable[Row] = (),
) -> list[str]:
    """Predict every point of a plan that the folder lacks or that failed before; returns the plan's keys.

    `known` are rows of other searches, for Optuna to learn from.
    """
    tried: set[str] = set()

    def evaluate(points: Sequence[Point]) -> list[Row]:
        fresh = {point.key: point for point in points if point.key not in tried}
        tried.update(fresh)
        left = missing(fresh.values(), folder.rows)
        advance(len(fresh) - len(left))
        for row in executor.run(left):
            folder.add(row)
            advance(1)
        return [folder.rows[point.key] for point in points]

    evaluate(plan.points)
    keys = [point.key for point in plan.points]
    if plan.method == "optuna":
        found = search(
            plan.space,
            plan.search.objectives,
            trials=plan.search.trials,
            seed=plan.seed,
            evaluate=evaluate,
            known=known,
        )
        keys = [*found, *keys]
    return list(dict.fromkeys(keys))


def missing(points: Iterable[Point], rows: Mapping[str, Row]) -> list[Point]:
    """The points without a row, or with one that says why it failed."""
    return [point for point in points if point.key not in rows or rows[point.key].error]


def summed_up(document: SweepFile, rows: Sequence[Row], *, status: str) -> SweepFile:
    """The sweep.json of rows that are there: the front and the best, of what can be deployed."""
    objectives: Sequence[str] = document.search["objectives"]
    good = [row for row in rows if not row.error]
    usable = [row for row in good if not row.is_bound]
    failed = len(rows) - len(good)
    warnings = list(document.warnings)
    if failed:
        error = next(row.error for row in rows if row.error)
        warnings.append(f"{failed} of {len(rows)} points failed; the first: {error}")
    return replace(
        document,
        status=status,
        pareto=tuple(row.key for row in front(usable, objectives)),
        best=tuple(_best(good, objectives[0])),
        counts={
            **document.counts,
            "predicted": len(good),
            "failed": failed,
            "bounds": sum(row.is_bound for row in good),
        },
        seconds=sum(row.seconds for row in rows),
        warnings=tuple(warnings),
    )


def front(rows: Sequence[Row], objectives: Sequence[str]) -> list[Row]:
    """The rows that none beats in all of the objectives; of equals, the simplest first."""
    return pareto(
        sorted(rows, key=_elaborateness),
        maximise=[name for name in objectives if OBJECTIVES[name] == "maximize"],
        minimise=[name for name in objectives if OBJECTIVES[name] == "minimize"],
    )


def _best(rows: Sequence[Row], objective: str) -> list[BestOf]:
    """By link and size, smallest first; none where only bounds were tried."""
    sign = 1.0 if OBJECTIVES[objective] == "minimize" else -1.0
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda r: (sign * getattr(r, objective), _elaborateness(r))):
        groups.setdefault((row.link, row.slots), []).append(row)
    found: list[BestOf] = []
    for (link, slots), group in sorted(groups.items()):
        usable = [row for row in group if not row.is_bound]
        bounds = [row for row in group if row.is_bound]
        if usable:
            found.append(
                BestOf(
                    budget=usable[0].budget,
                    slots=slots,
                    link=link,
                    best=usable[0].key,
                    bound=bounds[0].key if bounds else "",
                )
            )
    return found


def _elaborateness(row: Row) -> int:
    """Members beyond those one would begin with: on a tie the simpler policy wins."""
    return sum(getattr(row, kind) != name for kind, name in DEFAULTS.items())


def _warnings(judge: Judge) -> tuple[str, ...]:
    ready = judge.forecaster
    found = list(ready.warnings)
    if not judge.is_held_out:
        found.append(
            "The trace holds one batch: what policies learn from it flatters them when they are judged on it."
        )
    if not ready.decision_is_measured:
        found.append(
            "The costs come from the trace alone, without what the runtime adds: the order counts, the "
            "speed is optimistic. Calibrate with `expertflow-trace calibrate` and pass --machine."
        )
    return tuple(found)

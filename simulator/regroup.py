"""Recorded batches decoded in turns and regrouped: the workload that a regrouping scheduler makes of a recorded one.

A token's routing does not depend on who else is in its batch, so it is taken from the trace row by row. Prompts are
read as they were recorded. Then the batches of a unit take turns, one decode step each; who has ended leaves, and
padding that was recorded for ended sequences is left out, as in the runtime (runtime/units.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low
from weakref import WeakKeyDictionary

import numpy as np

from ..tracer.errors import UsageError
from ..tracer.store import NO_EXPERT
from ..tracer.types import ModelShape, Phase
from .costs import CostModel, Linear
from .kv_copies import measure_host_kv_move
from .policy.base import Regrouping, Route
from .policy.registry import predictors
from .policy.spec import Member, PolicySpec
from .policy.units import RouteSource, arrange, ask, is_time, regrouping_of, source_of_routes
from .result import RegroupingResult
from .routes import routes_of
from .split import batch_numbers
from .workload import Workload, build_workload, ranges


@dataclass(slots=True, kw_only=True)
class Turn:
    """What happened before one decode step of a unit.

    `place` is the pass it happened before. Of `sequences` the scheduler was asked; it was not if that is 0, and it took
    `seconds` here. `begins` says that the unit's first decode step comes next, `fed` how many sequences it had then.
    `rows` of KV cache were copied, `positions` in all.
    """

    place: int
    fed: int
    begins: bool
    sequences: int = 0
    seconds: float = 0.0
    is_changed: bool = False
    moved: int = 0
    rows: int = 0
    positions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InUnits:
    """Batches in turns: the passes without what is spent before them, and the turns, in order."""

    workload: Workload
    turns: tuple[Turn, ...]
    batches: int
    source: RouteSource
    known: dict[tuple[Linear, int, bool], tuple[Workload, RegroupingResult]] = field(
        default_factory=dict
    )

    def decision_s(self) -> dict[int, float]:
        """The scheduler's own time by number of sequences: medians of what was timed here."""
        seconds: dict[int, list[float]] = {}
        for turn in self.turns:
            if turn.sequences:
                seconds.setdefault(turn.sequences, []).append(turn.seconds)
        return {sequences: median_low(found) for sequences, found in seconds.items()}


def in_units(workload: Workload, spec: PolicySpec) -> InUnits | None:
    """A recorded workload as the policy's scheduler regroups it; None if it does not. Found once for each scheduler.

    Raises UsageError if the recorded batches cannot be taken apart.
    """
    scheduler = regrouping_of(spec.build_scheduler(knows_future=True))
    if scheduler is None:
        return None
    known = _FOUND.setdefault(workload, [])
    for member, found in known:
        if member == spec.scheduler:
            return found
    known.append((spec.scheduler, _Regrouper(workload, scheduler).run()))
    return known[-1][1]


_FOUND: WeakKeyDictionary[Workload, list[tuple[Member, InUnits]]] = WeakKeyDictionary()


def charged(
    units: InUnits,
    costs: CostModel,
    shape: ModelShape,
    read_paths_s: Callable[[Phase, int], float] | None = None,
) -> tuple[Workload, RegroupingResult]:
    """The passes with what is spent before each, and the sum of it.

    `read_paths_s` are a path predictor's seconds for one pass by phase and sequences, None if it is not asked.
    """
    # The same passes for all policies, so that what others have worked out of them is known.
    key = (costs.kv_move, shape.kv_bytes_per_token, read_paths_s is not None)
    if key in units.known:
        return units.known[key]
    workload, decision_s = units.workload, units.decision_s()
    chosen, moved = np.zeros(len(workload.steps)), np.zeros(len(workload.steps))
    for turn in units.turns:
        chosen[turn.place] = decision_s.get(turn.sequences, 0.0)
        if read_paths_s is not None:
            chosen[turn.place] += read_paths_s("decode", turn.fed)
            chosen[turn.place] += read_paths_s("prefill", turn.fed) if turn.begins else 0.0
        moved[turn.place] = costs.kv_move(turn.rows, turn.positions * shape.kv_bytes_per_token)
    sizes = np.diff(workload.ptr)
    result = RegroupingResult(
        batches=units.batches,
        asked=sum(turn.sequences > 0 for turn in units.turns),
        changed=sum(turn.is_changed for turn in units.turns),
        moved=sum(turn.moved for turn in units.turns),
        kv_bytes=sum(turn.positions for turn in units.turns) * shape.kv_bytes_per_token,
        decision_s=float(chosen.sum()),
        move_s=float(moved.sum()),
        passes=int(workload.steps.is_decode.sum()),
        distinct=int(sizes[workload.event_is_decode()].sum()),
    )
    found = replace(workload, steps=replace(workload.steps, overhead_s=chosen + moved))
    units.known[key] = found, result
    return units.known[key]


def with_kv_move(costs: CostModel, shape: ModelShape) -> CostModel:
    """Costs that know what moving keys and values takes: measured in this process if nobody did before."""
    if any(costs.kv_move.weights):
        return costs
    return replace(costs, kv_move=measure_host_kv_move(shape))


def notes_on(costs: CostModel, *, is_declared: bool) -> tuple[str, ...]:
    """What a prediction of regrouped batches says about its charges."""
    if is_declared:
        return (
            "Regrouping: the scheduler's time was measured on this machine's CPU; keys and values move at the declared "
            "memory bandwidth.",
        )
    if any(costs.kv_move.weights):
        return ()
    return (
        "Regrouping: keys and values are charged as copies in this machine's host memory, timed here; "
        "`expertflow-trace calibrate` times them on the device.",
    )


def asks_paths(spec: PolicySpec) -> str:
    """The member that asks for predicted paths, in words."""
    asks = "paths" in predictors.get(spec.predictor.name).needs
    member = spec.predictor if asks else spec.scheduler
    return f"{'predictor' if asks else 'scheduler'} {member.name!r}"


def require_arrivals(spec: PolicySpec) -> None:
    """Raise UsageError for policies that follow the recorded batches only."""
    if "paths" in spec.needs():
        raise UsageError(
            f"{asks_paths(spec)} follows the recorded batches only; leave --arrivals out."
        )
    if regrouping_of(spec.build_scheduler(knows_future=True)) is not None:
        raise UsageError(
            f"scheduler {spec.scheduler.name!r} regroups the recorded batches; requests that arrive run in one batch, "
            "so there is nothing to regroup. Leave --arrivals out, or use --scheduler fcfs."
        )


@dataclass(slots=True)
class _Plan:
    """The passes to be, column by column, and their rows as places in the recorded ones."""

    rows: list[np.ndarray] = field(default_factory=list)
    layers: list[np.ndarray] = field(default_factory=list)
    sizes: list[tuple[bool, int, int, int, int]] = field(default_factory=list)
    members: list[Sequence[int]] = field(default_factory=list)

    def add(
        self,
        rows: np.ndarray,
        layers: np.ndarray,
        size: tuple[bool, int, int, int, int],
        members: Sequence[int],
    ) -> None:
        """A pass of `size`: is decode, batch, tokens, context, KV positions of other batches."""
        self.rows.append(rows)
        self.layers.append(layers)
        self.sizes.append(size)
        self.members.append(members)

    def __len__(self) -> int:
        return len(self.sizes)


class _Regrouper:
    """Makes the passes of one workload under one scheduler."""

    def __init__(self, workload: Workload, scheduler: Regrouping) -> None:
        self._workload, self._scheduler = workload, scheduler
        self._source: RouteSource = source_of_routes(scheduler)
        self._tokens = _Tokens(workload, self._source)
        self._plan = _Plan()
        self._turns: list[Turn] = []

    def run(self) -> InUnits:
        steps = self._workload.steps
        batch = batch_numbers(self._workload)
        unit = batch // self._scheduler.batches
        for number in range(int(unit[-1]) + 1):
            places = np.flatnonzero(unit == number)
            self._unit(np.split(places, np.flatnonzero(np.diff(batch[places])) + 1))
        plan = self._plan
        is_decode, sizes, tokens, context, beside = (
            np.asarray(column) for column in zip(*plan.sizes, strict=True)
        )
        counts = [len(rows) for rows in plan.rows]
        made = build_workload(
            replace(
                steps,
                number=np.arange(len(plan)),
                is_decode=is_decode.astype(bool),
                batch=sizes.astype(np.int64),
                tokens=tokens.astype(np.int64),
                context=context.astype(np.int64),
                member_ptr=np.concatenate(([0], np.cumsum([len(m) for m in plan.members]))),
                members=np.concatenate([np.asarray(m, np.int64) for m in plan.members]),
                kv_beside=beside.astype(np.int64),
            ),
            np.repeat(np.arange(len(plan)), counts),
            np.concatenate(plan.layers),
            self._workload.rows.take(np.concatenate(plan.rows)),
            prompt_tokens=self._workload.prompt_tokens,
            batch_size=self._workload.batch_size,
            num_layers=self._workload.num_layers,
            num_experts=self._workload.num_experts,
            lookahead=self._workload.lookahead,
        )
        return InUnits(
            workload=made,
            turns=tuple(self._turns),
            batches=self._scheduler.batches,
            source=self._source,
        )

    def _unit(self, batches: Sequence[np.ndarray]) -> None:
        """Read the prompts of some batches, given by their passes, then decode them in turns."""
        steps, tokens = self._workload.steps, self._tokens
        held: list[list[int]] = []
        widths: list[int] = []
        for places in batches:
            prompts, decoded = places[~steps.is_decode[places]], places[steps.is_decode[places]]
            beside = sum(len(rows) * width for rows, width in zip(held, widths, strict=True))
            for place in prompts.tolist():
                self._as_recorded(place, beside)
            held.append(self._sequences_of(places))
            first = steps.context[prompts[-1]] if len(prompts) else steps.context[decoded[0]] - 1
            widths.append(int(first))
        width, fed = max(widths), sum(map(len, held))
        narrow = sum(len(rows) for rows, own in zip(held, widths, strict=True) if own < width)
        count = 0
        while any(alive := [[s for s in rows if tokens.lives(s, count)] for rows in held]):
            turn = Turn(place=len(self._plan), fed=fed, begins=count == 0)
            if turn.begins:  # so that all are as wide as the widest
                turn.rows, turn.positions = narrow, narrow * width
            groups = self._groups(alive, turn, count)
            placed = arrange(held, groups)
            copied = sum(len(placement.copied) for placement in placed)
            turn.moved = sum(placement.arrived for placement in placed)
            turn.rows += copied
            turn.positions += copied * (width + count)
            held = [list(placement.rows) for placement in placed]
            self._turns.append(turn)
            self._decode(held, width + count + 1, count)
            count += 1

    def _groups(self, held: Sequence[Sequence[int]], turn: Turn, count: int) -> list[list[int]]:
        """The batches of the next decode step."""
        groups = [list(rows) for rows in held if rows]
        limit = self._workload.batch_size
        if not is_time(self._scheduler, count, len(groups), limit):
            return groups
        alive = [sequence for rows in groups for sequence in rows]
        places = {sequence: place for place, sequence in enumerate(alive)}
        experts = self._tokens.told(alive, count)
        began = time.perf_counter()
        routes: list[Route] = routes_of(experts, self._workload.num_experts)
        found = ask(
            self._scheduler,
            routes,
            [[places[s] for s in rows] for rows in groups],
            limit,
        )
        turn.seconds = time.perf_counter() - began
        turn.sequences = len(alive)
        named = [[alive[place] for place in group] for group in found]
        turn.is_changed = sorted(map(sorted, named)) != sorted(map(sorted, groups))
        return named

    def _sequences_of(self, places: np.ndarray) -> list[int]:
        """The sequences of a batch, in order of rows."""
        steps = self._workload.steps
        return list(dict.fromkeys(steps.members[ranges(steps.member_ptr, places)].tolist()))

    def _as_recorded(self, place: int, beside: int) -> None:
        workload, steps = self._workload, self._workload.steps
        events = np.asarray(workload.events_of(place))
        sizes = np.diff(workload.row_ptr)[events]
        first, last = steps.member_ptr[place : place + 2].tolist()
        size = (
            bool(steps.is_decode[place]),
            int(steps.batch[place]),
            int(steps.tokens[place]),
            int(steps.context[place]),
            beside,
        )
        rows, layers = ranges(workload.row_ptr, events), np.repeat(workload.layer[events], sizes)
        self._plan.add(rows, layers, size, steps.members[first:last].tolist())

    def _decode(self, held: Sequence[Sequence[int]], context: int, count: int) -> None:
        total = sum(map(len, held))
        for rows in held:
            places = self._tokens.fed(rows, count).T  # by layer, then by row
            is_there = places >= 0
            layers = np.broadcast_to(np.arange(len(places))[:, None], places.shape)
            size = (True, len(rows), len(rows), context, (total - len(rows)) * context)
            self._plan.add(places[is_there], layers[is_there], size, rows)


class _Tokens:
    """Where the rows of each sequence's tokens are: [tokens, layers] places, −1 where a layer recorded none."""

    def __init__(self, workload: Workload, source: RouteSource) -> None:
        self._rows, self._source = workload.rows, source
        rows, steps, layers = workload.rows, workload.steps, workload.num_layers
        size = np.diff(workload.row_ptr)
        layer = np.repeat(workload.layer.astype(np.int64), size)
        step = np.repeat(np.repeat(np.arange(len(steps)), np.diff(workload.event_ptr)), size)
        is_real = np.ones(len(layer), bool) if rows.is_pad is None else ~rows.is_pad
        is_fed = is_real & steps.is_decode[step]
        self._sequences = _sequences(workload)
        span = len(steps)
        number = np.searchsorted(self._sequences, rows.sequence)
        keys = number[is_fed] * np.int64(span) + step[is_fed]
        names, token = np.unique(keys, return_inverse=True)
        self._places = np.full((len(names), layers), -1, np.int64)
        if len(np.unique(token * layers + layer[is_fed])) < len(token):
            raise UsageError(
                "This trace has decode steps with several tokens of one sequence; its batches cannot be regrouped. "
                "Leave --scheduler out."
            )
        self._places[token, layer[is_fed]] = np.flatnonzero(is_fed)
        self._start = np.searchsorted(names // span, np.arange(len(self._sequences) + 1))
        # The last token of each prompt, the token before the first that is decoded.
        self._prompt = np.full((len(self._sequences), layers), -1, np.int64)
        is_prompt = is_real & ~steps.is_decode[step]
        self._prompt[number[is_prompt], layer[is_prompt]] = np.flatnonzero(is_prompt)

    def lives(self, sequence: int, count: int) -> bool:
        """Whether a sequence is fed in the unit's decode step `count`."""
        number = int(np.searchsorted(self._sequences, sequence))
        return count < self._start[number + 1] - self._start[number]

    def fed(self, sequences: Sequence[int], count: int) -> np.ndarray:
        """Rows of the tokens that are fed in decode step `count`: [sequences, layers]."""
        return self._places[self._start[np.searchsorted(self._sequences, sequences)] + count]

    def told(self, sequences: Sequence[int], count: int) -> np.ndarray:
        """Experts [sequences, layers, k] of which the scheduler is told before decode step `count`."""
        if self._source == "previous":
            number = np.searchsorted(self._sequences, sequences)
            places = self.fed(sequences, count - 1) if count else self._prompt[number]
        else:
            places = self.fed(sequences, count)
        experts = self._rows.experts
        if self._source == "predicted":
            assert self._rows.path is not None
            # As many as the router takes; the predictor names more, likeliest first.
            experts = self._rows.path[:, : experts.shape[1]]
        return np.where(places[:, :, None] < 0, NO_EXPERT, experts[places])


def _sequences(workload: Workload) -> np.ndarray:
    """All sequences, ascending. Raises UsageError if one is in two batches."""
    steps = workload.steps
    place = np.repeat(np.arange(len(steps)), np.diff(steps.member_ptr))
    batch = batch_numbers(workload)[place]
    sequences, first = np.unique(steps.members, return_index=True)
    if (batch[first][np.searchsorted(sequences, steps.members)] != batch).any():
        raise UsageError(
            "This trace's sequences join and leave running batches, so there are no batches to regroup. "
            "Leave --scheduler out."
        )
    return sequences

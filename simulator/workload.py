"""What a model asked for, step by step: the driver-independent side of a replay.

Held as arrays, because a trace of a million tokens has tens of millions of events; `step` and `event` give one
of them as an object to those who walk it slowly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from ..tracer.errors import TraceError
from ..tracer.schema import WHOLE_STEP
from ..tracer.store import NO_EXPERT, RoutingArrays, Trace
from ..tracer.types import ExpertKey, Phase
from .policy.base import NO_PATH, Facts, Signals
from .policy.spec import AS_ROUTED, Member

if TYPE_CHECKING:
    from .paths import PathTable


@dataclass(frozen=True, slots=True)
class EventDemand:
    """One layer event: its distinct experts ascending, and what else is known of it."""

    layer: int
    experts: tuple[int, ...]
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True, slots=True)
class StepDemand:
    """One forward pass: its size, and the sequences that got a token from it."""

    step: int
    phase: Phase
    batch: int
    tokens: int
    context: int
    sequences: tuple[int, ...]
    overhead_s: float = 0.0
    kv_beside: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Routing of single tokens, in order of events: what each token chose in one layer.

    `experts` [rows, top_k]; `sequence` [rows]; `weights` [rows, top_k] or None; `lookahead[d]` [rows, top_k] with
    NO_EXPERT where there is no layer to look at; `is_pad` [rows], None if no row is padding; `token` [rows], the ids
    of the tokens fed in, None if they were not recorded; `position` [rows] in their sequence, −1 for padding. `path`
    [rows, m] are the experts a path predictor names for the row's own layer, likeliest first, NO_EXPERT where it
    names none; None if there is no such predictor. `score_ids` and `scores` [rows, m] are the token's likeliest experts
    and the gate's scores of them, as in the trace; None if they were not recorded.
    """

    experts: np.ndarray
    sequence: np.ndarray
    weights: np.ndarray | None = None
    lookahead: Mapping[int, np.ndarray] = field(default_factory=dict)
    is_pad: np.ndarray | None = None
    token: np.ndarray | None = None
    position: np.ndarray | None = None
    path: np.ndarray | None = None
    score_ids: np.ndarray | None = None
    scores: np.ndarray | None = None

    def take(self, places: np.ndarray) -> Rows:
        """The rows at `places`."""
        return Rows(
            experts=self.experts[places],
            sequence=self.sequence[places],
            weights=None if self.weights is None else self.weights[places],
            lookahead={depth: ids[places] for depth, ids in self.lookahead.items()},
            is_pad=None if self.is_pad is None else self.is_pad[places],
            token=None if self.token is None else self.token[places],
            position=None if self.position is None else self.position[places],
            path=None if self.path is None else self.path[places],
            score_ids=None if self.score_ids is None else self.score_ids[places],
            scores=None if self.scores is None else self.scores[places],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steps:
    """Forward passes, one array entry each. `members` are the sequences that got a token, by `member_ptr`.

    Where batches are decoded in turns (regroup.py), `overhead_s` are seconds that are spent before each pass on who
    runs in which batch, and `kv_beside` counts the positions of KV cache on the device beside `batch` times `context`:
    those of other batches, less what sequences are shorter than the longest of their pass where that is known.
    """

    number: np.ndarray
    is_decode: np.ndarray
    batch: np.ndarray
    tokens: np.ndarray
    context: np.ndarray
    member_ptr: np.ndarray
    members: np.ndarray
    overhead_s: np.ndarray | None = None
    kv_beside: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.number)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Workload:
    """A whole replay.

    Step i has events `event_ptr[i]` to `event_ptr[i + 1]`. Event j is of `layer[j]` and demands
    `experts[ptr[j]:ptr[j + 1]]`, ascending, each chosen by `counts` tokens with summed gate `weights` (None if not
    recorded); `row_ptr[j]` to `row_ptr[j + 1]` are its token rows. `prompt_tokens` is by sequence number. If the
    sequences are requests, `arrived` is by sequence the number of the step at whose start each arrived. `routing` says
    under which routing its tokens go (reroute.py).
    """

    steps: Steps
    event_ptr: np.ndarray
    layer: np.ndarray
    ptr: np.ndarray
    experts: np.ndarray
    counts: np.ndarray
    weights: np.ndarray | None
    row_ptr: np.ndarray
    rows: Rows
    prompt_tokens: Mapping[int, int]
    batch_size: int
    num_layers: int
    num_experts: int
    lookahead: int
    arrived: Mapping[int, int] | None = None
    routing: Member = AS_ROUTED

    @property
    def num_events(self) -> int:
        """Layer events over all steps."""
        return len(self.layer)

    def step(self, place: int) -> StepDemand:
        """One forward pass as an object."""
        steps = self.steps
        first, last = steps.member_ptr[place : place + 2].tolist()
        return StepDemand(
            step=int(steps.number[place]),
            phase="decode" if steps.is_decode[place] else "prefill",
            batch=int(steps.batch[place]),
            tokens=int(steps.tokens[place]),
            context=int(steps.context[place]),
            sequences=tuple(steps.members[first:last].tolist()),
            overhead_s=0.0 if steps.overhead_s is None else float(steps.overhead_s[place]),
            kv_beside=0 if steps.kv_beside is None else int(steps.kv_beside[place]),
        )

    def events_of(self, place: int) -> range:
        """Numbers of the events of one step."""
        return range(int(self.event_ptr[place]), int(self.event_ptr[place + 1]))

    def event(self, number: int, *, is_prefill: bool = False) -> EventDemand:
        """One event as an object."""
        first, last = self.ptr[number : number + 2].tolist()
        weights = () if self.weights is None else tuple(self.weights[first:last].tolist())
        counts = tuple(self.counts[first:last].tolist())
        experts = tuple(self.experts[first:last].tolist())
        return EventDemand(int(self.layer[number]), experts, Facts(is_prefill, counts, weights))

    def signals(self, number: int, depth: int, *, routed: bool = False) -> Signals:
        """What a predictor may know at one event: look-ahead to `depth`, paths, and the tokens' own routing."""
        first, last = self.row_ptr[number : number + 2].tolist()
        layer = int(self.layer[number])
        ahead = {
            d: _predicted(self.rows.lookahead[d][first:last])
            for d in range(1, depth + 1)
            if d in self.rows.lookahead and layer + d < self.num_layers
        }
        path = NO_PATH if self.rows.path is None else _PathAhead(self, number)
        if not routed:
            return Signals(ahead, path=path)
        rows = self.rows
        return Signals(
            ahead,
            _chosen(rows.experts[first:last]),
            rows.sequence[first:last].tolist(),
            () if rows.token is None else rows.token[first:last].tolist(),
            path,
        )

    def events(self) -> list[tuple[ExpertKey, ...]]:
        """All events in order, for members that know the future."""
        layers, experts = self.layer.tolist(), self.experts.tolist()
        bounds = self.ptr.tolist()
        return [
            tuple(ExpertKey(layer, expert) for expert in experts[bounds[j] : bounds[j + 1]])
            for j, layer in enumerate(layers)
        ]

    def event_is_decode(self) -> np.ndarray:
        """Whether each event belongs to a decode step: [events]."""
        return np.repeat(self.steps.is_decode, np.diff(self.event_ptr))

    def keys(self) -> np.ndarray:
        """Demanded experts as layer × num_experts + expert, aligned with `experts`."""
        found = _KEYS.get(self)
        if found is None:
            layers = np.repeat(self.layer.astype(np.int32), np.diff(self.ptr))
            found = _KEYS[self] = layers * np.int32(self.num_experts) + self.experts
        return found

    def popularity(self) -> list[list[int]]:
        """Demands of each expert by layer: counts[layer][expert] over all events."""
        total = self.num_layers * self.num_experts
        counts = np.bincount(self.keys(), minlength=total)
        return counts.reshape(self.num_layers, self.num_experts).tolist()

    def mean_distinct(self, phase: Phase) -> float:
        """Mean distinct experts per event in one phase; 0 without such steps."""
        is_phase = self.event_is_decode() == (phase == "decode")
        sizes = np.diff(self.ptr)[is_phase]
        return float(sizes.mean()) if sizes.size else 0.0

    def select(self, places: np.ndarray) -> Workload:
        """The steps at `places`, with their events and rows."""
        events = ranges(self.event_ptr, places)
        experts, rows = ranges(self.ptr, events), ranges(self.row_ptr, events)
        members = ranges(self.steps.member_ptr, places)
        steps = Steps(
            number=self.steps.number[places],
            is_decode=self.steps.is_decode[places],
            batch=self.steps.batch[places],
            tokens=self.steps.tokens[places],
            context=self.steps.context[places],
            member_ptr=_bounds(np.diff(self.steps.member_ptr)[places]),
            members=self.steps.members[members],
            overhead_s=None if self.steps.overhead_s is None else self.steps.overhead_s[places],
            kv_beside=None if self.steps.kv_beside is None else self.steps.kv_beside[places],
        )
        present = set(steps.members.tolist())
        return replace(
            self,
            steps=steps,
            event_ptr=_bounds(np.diff(self.event_ptr)[places]),
            layer=self.layer[events],
            ptr=_bounds(np.diff(self.ptr)[events]),
            experts=self.experts[experts],
            counts=self.counts[experts],
            weights=None if self.weights is None else self.weights[experts],
            row_ptr=_bounds(np.diff(self.row_ptr)[events]),
            rows=self.rows.take(rows),
            prompt_tokens={s: n for s, n in self.prompt_tokens.items() if s in present},
        )

    def with_rows(self, rows: Rows) -> Workload:
        """The same passes and events with other experts in their rows."""
        event = np.repeat(np.arange(self.num_events), np.diff(self.row_ptr))
        ptr, experts, counts, weights = _distinct(event, self.num_events, rows, self.num_experts)
        return replace(self, ptr=ptr, experts=experts, counts=counts, weights=weights, rows=rows)

    def with_paths(self, table: PathTable) -> Workload:
        """The same with what a path predictor says of its tokens. Raises TraceError without their positions."""
        if self.rows.position is None:
            raise TraceError("These rows do not say where in their sequence each token stands.")
        layer = np.repeat(self.layer, np.diff(self.row_ptr))
        path = table.at(self.rows.sequence, self.rows.position, layer)
        return replace(self, rows=replace(self.rows, path=path))

    def walk(self) -> Iterator[tuple[StepDemand, int]]:
        """Steps and event numbers in order."""
        for place in range(len(self.steps)):
            step = self.step(place)
            for number in self.events_of(place):
                yield step, number


class _PathAhead(Mapping[int, Sequence[Sequence[int]]]):
    """Predicted paths by layers ahead of one event, looked up when asked for."""

    def __init__(self, workload: Workload, number: int) -> None:
        step = int(np.searchsorted(workload.event_ptr, number, side="right"))
        later = range(number + 1, int(workload.event_ptr[step]))
        depths = workload.layer[later.start : later.stop] - workload.layer[number]
        self._workload = workload
        self._events = dict(zip(depths.tolist(), later, strict=True))

    def __getitem__(self, depth: int) -> Sequence[Sequence[int]]:
        rows, row_ptr, event = self._workload.rows, self._workload.row_ptr, self._events[depth]
        assert rows.path is not None
        return _predicted(rows.path[row_ptr[event] : row_ptr[event + 1]])

    def __iter__(self) -> Iterator[int]:
        return iter(self._events)

    def __len__(self) -> int:
        return len(self._events)


_KEYS: WeakKeyDictionary[Workload, np.ndarray] = WeakKeyDictionary()


def ranges(bounds: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Indices of all that lies in the given intervals: bounds[p] to bounds[p + 1] for each p."""
    starts = bounds[places]
    sizes = bounds[places + 1] - starts
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - sizes), sizes)


def _bounds(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)


def _chosen(ids: np.ndarray) -> list[list[int]]:
    """The experts of each token, without holes."""
    is_real = ids != NO_EXPERT
    if is_real.all():
        return ids.tolist()
    return [row[known].tolist() for row, known in zip(ids, is_real, strict=True)]


def _predicted(ids: np.ndarray) -> list[list[int]]:
    """One group per token that has a prediction."""
    return ids[(ids != NO_EXPERT).all(axis=1)].tolist()


def workload_of(trace: Trace) -> Workload:
    """Read a trace's routing as a workload. Raises TraceError if it has none."""
    found = trace.routing_arrays()
    if not len(found.step):
        raise TraceError(f"{trace.path} holds no routing rows; nothing can be replayed.")
    # Row order inside an event is the order of tokens; (step, layer) blocks are contiguous after this.
    steps = _steps_of(trace, found)
    order = np.lexsort((np.arange(len(found.step)), found.layer, found.step))
    order = order[np.isin(found.step[order], steps.number)]
    step, layer = found.step[order], found.layer[order]
    rows = Rows(
        experts=found.experts[order],
        sequence=found.sequence[order],
        weights=None if found.weights is None else found.weights[order],
        lookahead={depth: ids[order] for depth, ids in found.lookahead.items()},
        is_pad=found.is_pad[order],
        token=found.token_id[order],
        position=found.position[order],
        score_ids=None if found.score_ids is None else found.score_ids[order],
        scores=None if found.scores is None else found.scores[order],
    )
    prompts = trace.table("sequences", columns=["sequence", "prompt_tokens"]).to_pydict()
    return build_workload(
        steps,
        step,
        layer,
        rows,
        prompt_tokens=dict(zip(prompts["sequence"], prompts["prompt_tokens"], strict=True)),
        batch_size=trace.manifest.run.batch_size,
        num_layers=trace.shape.num_moe_layers,
        num_experts=trace.shape.num_experts,
        lookahead=trace.manifest.run.lookahead,
    )


def build_workload(
    steps: Steps,
    row_step: np.ndarray,
    row_layer: np.ndarray,
    rows: Rows,
    *,
    prompt_tokens: Mapping[int, int],
    batch_size: int,
    num_layers: int,
    num_experts: int,
    lookahead: int,
) -> Workload:
    """A workload of token rows sorted by (step number, layer), each of one of `steps`."""
    changes = (np.diff(row_step) != 0) | (np.diff(row_layer) != 0)
    starts = np.flatnonzero(np.concatenate(([True], changes))) if len(row_step) else row_step[:0]
    sizes = np.diff(np.concatenate((starts, [len(row_step)])))
    event = np.repeat(np.arange(len(starts)), sizes)
    ptr, experts, counts, weights = _distinct(event, len(starts), rows, num_experts)
    ends = np.searchsorted(row_step[starts], steps.number, side="right")
    return Workload(
        steps=steps,
        event_ptr=np.concatenate(([0], ends)).astype(np.int64),
        layer=row_layer[starts].astype(np.int16),
        ptr=ptr,
        experts=experts,
        counts=counts,
        weights=weights,
        row_ptr=_bounds(sizes),
        rows=rows,
        prompt_tokens=prompt_tokens,
        batch_size=batch_size,
        num_layers=num_layers,
        num_experts=num_experts,
        lookahead=lookahead,
    )


def _distinct(
    event: np.ndarray, num_events: int, rows: Rows, num_experts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Distinct experts by event, ascending: bounds, ids, tokens that chose each, summed gate weights."""
    is_real = rows.experts != NO_EXPERT
    places = (event[:, None] * np.int64(num_experts) + rows.experts)[is_real]
    if rows.weights is None:
        found, counts = np.unique(places, return_counts=True)
        weights = None
    else:
        found, inverse, counts = np.unique(places, return_inverse=True, return_counts=True)
        weights = np.bincount(inverse, rows.weights[is_real], len(found))
    sizes = np.bincount(found // num_experts, minlength=num_events)
    experts = (found % num_experts).astype(np.int32)
    return _bounds(sizes), experts, counts.astype(np.int32), weights


def _steps_of(trace: Trace, found: RoutingArrays) -> Steps:
    names = ["step", "layer", "phase", "batch", "tokens", "context"]
    table = trace.table("steps", columns=names, filters=[("layer", "==", WHOLE_STEP)])
    columns = table.to_pydict()
    if not columns["step"]:
        raise TraceError(
            f"{trace.path} holds no times of whole passes (table steps); nothing can be replayed. "
            "Record the trace again."
        )
    number = np.asarray(columns["step"], dtype=np.int64)
    order = np.argsort(number, kind="stable")

    def column(name: str) -> np.ndarray:
        return np.asarray(columns[name], dtype=np.int64)[order]

    member_ptr, members = _members(number[order], found)
    return Steps(
        number=number[order],
        is_decode=(np.asarray(columns["phase"]) == "decode")[order],
        batch=column("batch"),
        tokens=column("tokens"),
        context=column("context"),
        member_ptr=member_ptr,
        members=members,
    )


def _members(number: np.ndarray, found: RoutingArrays) -> tuple[np.ndarray, np.ndarray]:
    """Sequences with a real token in each step, in order of rows, from the first layer's rows."""
    is_first = (found.layer == 0) & ~found.is_pad
    step, sequence = found.step[is_first].astype(np.int64), found.sequence[is_first]
    span = int(sequence.max()) + 1 if len(sequence) else 1
    _, first = np.unique(step * span + sequence, return_index=True)
    first.sort()
    step, sequence = step[first], sequence[first]
    order = np.argsort(step, kind="stable")
    step, sequence = step[order], sequence[order]
    is_known = np.isin(step, number)
    step, sequence = step[is_known], sequence[is_known]
    place = np.searchsorted(number, step)
    return _bounds(np.bincount(place, minlength=len(number))), sequence

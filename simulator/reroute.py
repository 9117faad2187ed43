"""A workload as it would have been under another routing, from recorded gate scores: an approximation.

All tokens of one layer in one pass are the block that shares experts. What was recorded is what the model said when
every earlier layer and pass was routed as its router wanted; under another routing the hidden states, and so the
scores, would have been somewhat different. Where no scores were recorded, tokens are restricted to the experts their
router chose, weighed by the recorded weights, and may be left with fewer of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np

from ..tracer.errors import UsageError
from ..tracer.store import NO_EXPERT
from ..tracer.types import ExpertKey
from .account import SequenceTimes
from .policy.base import GateScores, Routed, Routing
from .policy.spec import AS_ROUTED, Member, build_routing
from .result import RoutingResult
from .source import Source
from .workload import Rows, Workload

_RESTRICTED = "restricted to the recorded top-"
_TIMED_EVENTS = 100


@dataclass(slots=True)
class Change:
    """What a routing did, added up: choices are experts of single tokens, short tokens have fewer than they had."""

    before: int = 0
    after: int = 0
    events: int = 0
    choices: int = 0
    changed: int = 0
    tokens: int = 0
    short: int = 0

    def add(self, said: GateScores, routed: Routed, demanded: Sequence[Sequence[int]]) -> None:
        """Count one layer of one pass; `demanded` are the experts its tokens had."""
        self.events += 1
        self.before += len({expert for ids in demanded for expert in ids})
        self.after += len({expert for ids in routed.ids for expert in ids})
        self.tokens += len(said)
        for own, ids in zip(demanded, routed.ids, strict=True):
            self.choices += len(own)
            self.changed += len(set(own).difference(ids))
            self.short += len(ids) < len(own)

    def result(self, routing: Member, scores: str, *, is_approximate: bool) -> RoutingResult:
        """The counts as rates, and a sentence."""
        before, after = (
            (self.before / self.events, self.after / self.events) if self.events else (0.0, 0.0)
        )
        changed = self.changed / self.choices if self.choices else 0.0
        finding = f"{routing} is LOSSY: it changes {changed:.1%} of the tokens' choices."
        if is_approximate:
            finding += " Approximate: routing changes later hidden states; confirm on the model."
        if scores.startswith(_RESTRICTED):
            finding += f" {scores[0].upper()}{scores[1:]}: no token gets another; trace again with --scores."
        return RoutingResult(
            routing=str(routing),
            scores=scores,
            distinct_before=before,
            distinct_after=after,
            changed_share=changed,
            short_share=self.short / self.tokens if self.tokens else 0.0,
            is_approximate=is_approximate,
            finding=finding,
        )


def rerouted(workload: Workload, routing: Member) -> Workload:
    """The workload under a routing; made once for each pair, and the same again if it is under it already.

    `as_routed` leaves tokens where they are, under whichever routing that was.

    Raises UsageError if neither scores nor weights were recorded.
    """
    if routing in (workload.routing, AS_ROUTED):
        return workload
    if workload.routing != AS_ROUTED:
        raise ValueError(f"this workload is routed by {workload.routing} already")
    known = _MADE.setdefault(workload, {})
    name = str(routing)
    if name not in known:
        known[name] = _rerouted(workload, routing)
    return known[name]


def rerouted_source(source: Workload | Source, routing: Member) -> Workload | Source:
    """What an engine replays under a routing: a workload, or passes as they are made."""
    if isinstance(source, Workload):
        return rerouted(source, routing)
    if routing == AS_ROUTED or isinstance(source, ReroutedSource):
        return source
    return ReroutedSource(source, routing)


class ReroutedSource:
    """Passes of another source under a routing (source.Source)."""

    def __init__(self, source: Source, routing: Member) -> None:
        self._source = source
        self._routing = routing
        self._live = build_routing(routing)
        self._change = Change()
        self._scores = ""

    def next(self, now_s: float) -> tuple[Workload, int] | float | None:
        """The next pass, rerouted."""
        found = self._source.next(now_s)
        if not isinstance(found, tuple):
            return found
        workload, place = found
        self._scores = scores_of(workload)
        one = workload.select(np.array([place])) if len(workload.steps) > 1 else workload
        rows = _routed_rows(one, self._live, self._change)
        return replace(one.with_rows(rows), routing=self._routing), 0

    def ended(self, now_s: float) -> None:
        """See Source."""
        self._source.ended(now_s)

    def sequences(self) -> Sequence[SequenceTimes]:
        """See Source."""
        return self._source.sequences()

    def events(self) -> Sequence[Sequence[ExpertKey]]:
        """See Source: what nobody can know cannot be rerouted either."""
        return self._source.events()

    def result(self) -> RoutingResult:
        """What the routing did so far."""
        return self._change.result(self._routing, self._scores, is_approximate=True)


def routing_result(source: Workload | Source) -> RoutingResult | None:
    """What a routing did to what was replayed; None if it was replayed as recorded."""
    if isinstance(source, Workload):
        return _RESULTS.get(source)
    return source.result() if isinstance(source, ReroutedSource) else None


def scores_of(workload: Workload) -> str:
    """What a routing has to go by, in words. Raises UsageError if there is nothing."""
    rows = workload.rows
    if rows.scores is not None:
        return f"scores of {rows.scores.shape[1]} of {workload.num_experts} experts per token"
    if rows.weights is None:
        raise UsageError(
            "Another routing needs gate scores or weights, and the trace recorded neither. Trace again with "
            f"--scores {workload.num_experts}."
        )
    return f"{_RESTRICTED}{rows.experts.shape[1]}"


def measure_routing_s(workload: Workload, routing: Member) -> tuple[float, float]:
    """Time a routing's own code on the first events of this machine: mean seconds per event (prefill, decode)."""
    live = build_routing(routing)
    is_decode = workload.event_is_decode()
    found: list[float] = []
    for phase in (False, True):
        seconds: list[float] = []
        for number in np.flatnonzero(is_decode == phase)[:_TIMED_EVENTS].tolist():
            said, _ = said_at(workload, number)
            began = time.perf_counter()
            live.route(said)
            seconds.append(time.perf_counter() - began)
        kept = sorted(seconds)[: max(1, int(0.95 * len(seconds)))]
        found.append(sum(kept) / len(kept) if kept else 0.0)
    return found[0], found[1]


def said_at(workload: Workload, number: int) -> tuple[GateScores, list[list[int]]]:
    """What the router said at one event, and the experts each token had, in recorded order."""
    first, last = workload.row_ptr[number : number + 2].tolist()
    return _said(workload.rows, slice(first, last), workload.num_experts)


_MADE: WeakKeyDictionary[Workload, dict[str, Workload]] = WeakKeyDictionary()
_RESULTS: WeakKeyDictionary[Workload, RoutingResult] = WeakKeyDictionary()


def _rerouted(workload: Workload, routing: Member) -> Workload:
    scores, change = scores_of(workload), Change()
    rows = _routed_rows(workload, build_routing(routing), change)
    made = replace(workload.with_rows(rows), routing=routing)
    _RESULTS[made] = change.result(routing, scores, is_approximate=True)
    return made


def _routed_rows(workload: Workload, live: Routing, change: Change) -> Rows:
    rows = workload.rows
    experts = rows.experts.copy()
    weights = None if rows.weights is None else rows.weights.copy()
    for number, first in enumerate(workload.row_ptr[:-1].tolist()):
        said, own = said_at(workload, number)
        routed = live.route(said)
        change.add(said, routed, own)
        for token, ids in enumerate(routed.ids):
            if set(ids) == set(own[token]):
                continue
            experts[first + token] = NO_EXPERT
            experts[first + token, : len(ids)] = ids
            if weights is not None:
                weights[first + token] = 0
                weights[first + token, : len(ids)] = routed.weights[token]
    return replace(rows, experts=experts, weights=weights)


def _said(rows: Rows, part: slice, num_experts: int) -> tuple[GateScores, list[list[int]]]:
    experts = rows.experts[part]
    is_real = experts != NO_EXPERT
    own = [ids[known].tolist() for ids, known in zip(experts, is_real, strict=True)]
    if rows.weights is not None:
        given = np.nan_to_num(rows.weights[part].astype(np.float64))
        weights = [w[known].tolist() for w, known in zip(given, is_real, strict=True)]
    else:
        weights = []
    if rows.score_ids is None or rows.scores is None:
        return _by_weight(own, weights, num_experts), own
    ids, scores = rows.score_ids[part].tolist(), rows.scores[part].astype(np.float64).tolist()
    # Weights are by rank here, but recorded in router order.
    ranked = [
        _in_order(ids[token][: len(mine)], mine, weights[token] if weights else None, scores[token])
        for token, mine in enumerate(own)
    ]
    return GateScores(ids, scores, ranked, num_experts), own


def _in_order(
    wanted: Sequence[int],
    own: Sequence[int],
    weights: Sequence[float] | None,
    scores: Sequence[float],
) -> list[float]:
    if weights is None:  # not recorded: those of a router that normalises
        shares = np.exp(np.asarray(scores[: len(wanted)]) - max(scores[: len(wanted)], default=0.0))
        return (shares / shares.sum()).tolist() if len(wanted) else []
    by_expert = dict(zip(own, weights, strict=True))
    return [by_expert[expert] for expert in wanted]


def _by_weight(
    own: Sequence[Sequence[int]], weights: Sequence[Sequence[float]], num_experts: int
) -> GateScores:
    """Only the chosen are known; their weights are all there is to go by."""
    ids: list[list[int]] = []
    ordered: list[list[float]] = []
    for mine, given in zip(own, weights, strict=True):
        order = sorted(range(len(mine)), key=lambda place: (-given[place], mine[place]))
        ids.append([mine[place] for place in order])
        ordered.append([given[place] for place in order])
    smallest = 1e-30
    scores = [np.log(np.maximum(each, smallest)).tolist() for each in ordered]
    return GateScores(ids, scores, ordered, num_experts)

"""What a predictor says at every event of a workload, worked out before the clock starts.

A predictor sees routing and signals, never the clock or the slots, so its answers are the same under every cache,
size and link. Any predictor can be taped by asking it; the built-in ones that a sweep asks for are taped by loops.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from ...tracer.records import to_json
from ...tracer.store import NO_EXPERT
from ..policy.base import Predictor
from ..policy.future import Future
from ..policy.registry import predictors
from ..policy.spec import PolicySpec
from ..workload import Workload, ranges
from .curves import lowest_bit
from .guesses import guesses
from .jit import array_maker, compiled


class Tape(NamedTuple):
    """Predicted experts (keys) of event j: `keys[ptr[j]:ptr[j + 1]]`, likeliest and soonest first."""

    ptr: np.ndarray
    keys: np.ndarray

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return self.ptr.nbytes + self.keys.nbytes


def tape_of(workload: Workload, spec: PolicySpec) -> Tape:
    """Record what the predictor of `spec` says over a workload."""
    name, params = spec.predictor.name, dict(spec.predictor.params)
    if name == "none":
        return Tape(np.zeros(workload.num_events + 1, np.int64), np.empty(0, np.int32))
    if name == "oracle":
        return _oracle(workload, int(params.get("horizon", 1)))
    if name == "gate_lookahead":
        return _lookahead(workload, spec.lookahead_depth, int(params.get("width", 0)))
    if name == "synthetic":
        return _synthetic(workload, spec)
    return _remembered(workload, spec)


_KEPT_BYTES = 256 << 20
_KEPT: WeakKeyDictionary[Workload, dict[str, Tape]] = WeakKeyDictionary()
"""Tapes made by asking: a predictor says the same under every cache, size and link, but takes its time."""


def _remembered(workload: Workload, spec: PolicySpec) -> Tape:
    """The tape by asking, asked once as long as the workload lives; a few hundred megabytes of them are kept."""
    kept = _KEPT.setdefault(workload, {})
    member = predictors.get(spec.predictor.name)
    said = json.dumps(
        [to_json(spec.predictor), spec.lookahead_depth, repr(member), id(member)], sort_keys=True
    )
    name = hashlib.sha256(said.encode()).hexdigest()
    if name not in kept:
        tape = asked(workload, spec)
        if sum(other.nbytes for other in kept.values()) + tape.nbytes > _KEPT_BYTES:
            return tape
        kept[name] = tape
    return kept[name]


def asked(workload: Workload, spec: PolicySpec) -> Tape:
    """Tape any predictor by asking it event by event."""
    params = dict(spec.predictor.params)
    future = None
    if "future" in predictors.get(spec.predictor.name).needs:
        future = params["future"] = Future(workload.events())
    return ask(predictors.build(spec.predictor.name, params), workload, spec, future)


def ask(
    predictor: Predictor, workload: Workload, spec: PolicySpec, future: Future | None = None
) -> Tape:
    """What a live predictor says over a workload, after whatever it has been asked before."""
    width, layers = workload.num_experts, workload.num_layers
    sizes = np.zeros(workload.num_events, np.int64)
    said: list[int] = []
    for number in range(workload.num_events):
        if future is not None:
            future.advance()
        signals = workload.signals(number, spec.lookahead_depth, routed=spec.reads_routing)
        keys = predictor.predict(int(workload.layer[number]), signals)
        found = [key.layer * width + key.expert for key in keys if 0 <= key.layer < layers]
        said += found
        sizes[number] = len(found)
    return Tape(_bounds(sizes), np.asarray(said, dtype=np.int32))


def _oracle(workload: Workload, horizon: int) -> Tape:
    return _ahead(workload.ptr, workload.keys(), horizon)


def _ahead(ptr: np.ndarray, keys: np.ndarray, horizon: int) -> Tape:
    """What is said of the next `horizon` events, given what is said of each: [events + 1], [keys]."""
    events = len(ptr) - 1
    first = np.minimum(np.arange(events + 1) + 1, events)
    if horizon == 1:  # the events themselves, one earlier
        return Tape(ptr[first] - ptr[1], keys[ptr[1] :])
    last = np.minimum(first[:-1] + horizon, events)
    starts = ptr[first[:-1]]
    sizes = ptr[last] - starts
    both = np.ravel(np.stack((starts, starts + sizes), axis=1))
    return Tape(_bounds(sizes), keys[ranges(both, np.arange(len(starts)) * 2)])


def _synthetic(workload: Workload, spec: PolicySpec) -> Tape:
    # An instance of it checks the parameters and knows the defaults.
    asked = predictors.build("synthetic", {**spec.predictor.params, "future": Future([])})
    used = np.zeros((workload.num_layers, workload.num_experts), np.bool_)
    used.reshape(-1)[workload.keys()] = True
    said = guesses(
        workload.ptr,
        workload.experts,
        workload.layer,
        used,
        float(asked.recall),
        min(float(asked.excess), float(workload.num_experts)),  # there are no more wrong ones
        np.uint64(asked.seed % 2**64),
    )
    return _ahead(*said, asked.horizon)


def _lookahead(workload: Workload, depth: int, width: int) -> Tape:
    columns = [workload.rows.lookahead[d] for d in range(1, depth + 1)]
    votes = np.stack(columns, axis=1) if columns else np.empty((0, 0, 0), np.uint16)
    most = depth * (min(width, workload.num_experts) if width else workload.num_experts)
    return Tape(
        *_count_votes(
            votes,
            workload.row_ptr,
            workload.layer,
            workload.num_layers,
            workload.num_experts,
            width or workload.num_experts,
            most,
        )
    )


@array_maker
def _count_votes(
    votes: np.ndarray,
    row_ptr: np.ndarray,
    layer: np.ndarray,
    num_layers: int,
    num_experts: int,
    width: int,
    most: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Experts of the layers ahead by votes, most first, ties by number."""
    events, depth, top_k = len(layer), votes.shape[1], votes.shape[2]
    ptr = np.zeros(events + 1, np.int64)
    keys = np.empty(max(16, min(most * events, votes.shape[0] * depth * top_k)), np.int32)
    count = np.zeros(num_experts, np.int64)
    order = np.zeros(num_experts, np.int64)
    bits = np.zeros((num_experts >> 6) + 1, np.uint64)
    end = 0
    for event in range(events):
        for ahead in range(depth):
            target = layer[event] + ahead + 1
            if target >= num_layers:
                break
            first = row_ptr[event]
            if row_ptr[event + 1] - first == 1 and top_k <= width:
                end = _in_order(votes[first, ahead], target * num_experts, bits, keys, end)
                continue
            found = 0
            for row in range(row_ptr[event], row_ptr[event + 1]):
                if _has_hole(votes[row, ahead]):
                    continue
                for k in range(top_k):
                    expert = votes[row, ahead, k]
                    if count[expert] == 0:
                        order[found] = expert
                        found += 1
                    count[expert] += 1
            _sort_by_votes(order, count, found)
            for number in range(found):
                if number < width:
                    keys[end] = target * num_experts + order[number]
                    end += 1
                count[order[number]] = 0
        ptr[event + 1] = end
    return ptr, keys[:end].copy()


@compiled
def _in_order(ids: Any, base: int, bits: Any, keys: Any, end: int) -> int:
    """One token's experts have a vote each: they are written by number. Returns where they end."""
    if _has_hole(ids):
        return end
    one = np.uint64(1)
    for expert in ids:
        bits[expert >> 6] |= one << np.uint64(expert & 63)
    for place in range(len(bits)):
        word = bits[place]
        bits[place] = np.uint64(0)
        while word:
            keys[end] = base + 64 * place + lowest_bit(word)
            end += 1
            word &= word - one
    return end


@compiled
def _has_hole(ids: np.ndarray) -> bool:
    for expert in ids:
        if expert == NO_EXPERT:
            return True
    return False


@compiled
def _sort_by_votes(order: np.ndarray, count: np.ndarray, found: int) -> None:
    for number in range(1, found):
        expert = order[number]
        place = number
        while place > 0:
            other = order[place - 1]
            is_before = count[other] > count[expert]
            if is_before or (count[other] == count[expert] and other < expert):
                break
            order[place] = other
            place -= 1
        order[place] = expert


def _bounds(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)

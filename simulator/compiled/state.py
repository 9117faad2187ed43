"""The arrays a compiled run works on: records by step, pool, expert and copy, in few arrays so that Numba is quick."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .lists import Lists

Records = Any
"""A structured array: compiled code reads and writes its fields as attributes, which the type checker cannot know."""
Numbers = Any
"""An array of plain numbers, read one by one; to the type checker `numbers[i]` would be an array again."""

ABSENT, RESIDENT, LOADING = 0, 1, 2

# Caches by number, in the order of `KINDS`.
KINDS = (
    "none",
    "fifo",
    "lru",
    "slru",
    "arc",
    "sieve",
    "lfu",
    "static",
    "belady",
    "belady_forced",
    "lfru",
    "least_stale",
    "two_level_lru",
    "score",
    "multi_factor",
    "plec",
)
(
    NONE,
    FIFO,
    LRU,
    SLRU,
    ARC,
    SIEVE,
    LFU,
    STATIC,
    BELADY,
    BELADY_FORCED,
    LFRU,
    LEAST_STALE,
    TWO_LEVEL_LRU,
    SCORE,
    MULTI_FACTOR,
    PLEC,
) = range(len(KINDS))

MISSES = ("load", "cpu", "sooner", "resident_first", "write_back")
LOAD, ON_CPU, SOONER, RESIDENT_FIRST, WRITE_BACK = range(len(MISSES))


MIXER, READBACK, DECISION, LOOKAHEAD, STALL, EXPERTS, CPU = range(7)
LAP_COUNT = 7


def _record(**fields: str) -> np.dtype:
    return np.dtype(list(fields.items()), align=True)


STEP = _record(
    is_decode="i8",
    batch="i8",
    tokens="i8",
    context="i8",
    first_event="i8",
    last_event="i8",
    kv_beside="i8",
    overhead_s="f8",
)
"""One forward pass: its size, its events, and what is spent before it (simulator.workload.Steps)."""

COSTS = _record(
    mixer="(5,)f8",
    experts="(6,)f8",
    head="(3,)f8",
    decision="(3,)f8",
    lookahead="(3,)f8",
    pass_lookahead_s="f8",
    readback_s="f8",
    row="f8",
    gathered_row="f8",
    partial="f8",
    weighted="f8",
    layer_kv="f8",
)
"""Weights of one phase's costs: see simulator.costs.PhaseCosts, and simulator.activations.ExpertBytes."""

MACHINE = _record(
    cpu_expert_s="f8",
    cpu_token_s="f8",
    idle_chunk_s="f8",
    busy_chunk_s="f8",
    wake_s="f8",
    group_s="f8",
    chunks="i8",
    writes_back="i8",
    expert_bytes="i8",
    num_experts="i8",
    num_layers="i8",
)
"""What both phases share: see simulator.costs.CostModel."""

RULES = _record(
    kind="i8",
    misses="i8",
    predicts="i8",
    params="(3,)f8",
    copy_s="f8",
    expert_s="f8",
    token_s="f8",
    num_experts="i8",
    stamp="i8",
)
"""The policy by numbers: which cache and which answer to misses, with their parameters. `stamp` is the latest mark
by which experts are protected (EXPERT.stamp)."""

POOL = _record(
    size="i8",
    staging="i8",
    start="i8",
    count="i8",
    flying="i8",
    now="i8",
    ticks="i8",
    layer="i8",
    layers_seen="i8",
    in_event="i8",
    hand="i8",
    room="i8",
    stamp="i8",
    target="f8",
)
"""Slots of one pool: its members are `members[start:start + count]`; `room` is what a prediction (`stamp`) may still
fill; the rest is what its cache counts."""

EXPERT = _record(
    where="i4",
    position="i4",
    copy="i4",
    flag="i4",
    stamp="i8",
    is_open="i4",
    victim_of="i4",
    blamed="i4",
)
"""One expert: where it is, and the story of its prefetch (simulator.outcomes.Ledger). Small: it is looked at most."""

MEMORY = _record(
    event="i8",
    count="i8",
    tick="i8",
    last="i8",
    next_use="i8",
    demands="i8",
    score="f8",
    popularity="f8",
)
"""What caches remember of one expert; most use a field or two."""

COPY = _record(
    key="i4",
    step="i4",
    row="i8",
    chunks="i4",
    left="i4",
    is_prefetch="i4",
    is_urgent="i4",
    is_cancelled="i4",
    is_done="i4",
    has_started="i4",
    free="i4",
    arrived="i4",
)
"""One copy under way; `free` and `arrived` are lists of copies of their own, by place."""

CLOCK = _record(
    now_s="f8",
    busy_s="f8",
    chunk_start_s="f8",
    chunk_end_s="f8",
    current="i8",
    free="i8",
    arrived="i8",
    rows="i8",
    demand_before="i8",
    prefetch_before="i8",
    issued="i8",
    useful="i8",
    late="i8",
    harmful="i8",
    cancelled="i8",
    laps="(7,)f8",
)
"""Moving numbers: the time, the chunk on the link, list ends, loads of the event before, outcomes of prefetches,
parts of the running event's time."""

SCRATCH = _record(
    hit="i4",
    late="i4",
    miss="i4",
    miss_tokens="i4",
    load_tokens="i4",
    on_cpu="i4",
    order="i4",
    load="i4",
    load_evicts="i4",
    wave_loads="i4",
    wave_members="i4",
    wave_rows="i4",
    wave_waits="i4",
    cancel="i4",
    needed="i4",
)
"""Lists of one event, by place: keys by outcome, loads by wave, copies to wait for."""

ASKED = _record(key="i4", evicts="i4")
"""Prefetches that one prediction asks for."""

OUT = _record(
    start_s="f8",
    end_s="f8",
    laps="(7,)f8",
    hits="i8",
    lates="i8",
    misses="i8",
    bytes_moved="i8",
    expert_bytes="f8",
)
"""Totals of one step."""

ROW = _record(
    key="i4",
    evicts="i4",
    is_prefetch="i4",
    step="i4",
    queued_s="f8",
    start_s="f8",
    end_s="f8",
    needed_s="f8",
)
"""One copy for those who want to see single ones; -1 for times that never came."""


class Work(NamedTuple):
    """The workload (see simulator.workload.Workload): `keys` are the demanded experts, `next_use` the event that
    demands each next; `guess_*` are a predictor's answers by event."""

    steps: Records
    layer: Numbers
    ptr: Numbers
    keys: Numbers
    counts: Numbers
    weights: Numbers
    next_use: Numbers
    guess_ptr: Numbers
    guess_keys: Numbers


class Slots(NamedTuple):
    """Who is where. `pool_of` is by layer; each pool has four lists for its cache; `loading` is in order of asking.

    `rank_*` stand beside `members`: what caches that rank need to know of each, close together, as they look at all.
    """

    rules: Records
    pool_of: Numbers
    pools: Records
    members: Numbers
    rank_a: Numbers
    rank_b: Numbers
    rank_layer: Numbers
    experts: Records
    memory: Records
    lists: Lists
    loading: Lists


class Wire(NamedTuple):
    """The link, its copies and the clock. Queue 0 is demand, 1 prefetch."""

    machine: Records
    clock: Records
    copies: Records
    queues: Lists
    out: Records
    rows: Records


class Run(NamedTuple):
    """Everything of one run."""

    work: Work
    costs: Records
    slots: Slots
    wire: Wire
    scratch: Records
    asked: Records

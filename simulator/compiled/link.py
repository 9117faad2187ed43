"""The link over arrays: the compiled twin of engine.Link. It is moved on whenever compute spends time."""

from __future__ import annotations

from .jit import compiled
from .lists import push_back, push_front, unlink
from .state import Records, Wire

DEMAND, PREFETCH = 0, 1


@compiled
def submit(wire: Wire, key: int, evicts: int, step: int, is_prefetch: int) -> int:
    """Ask for a copy; returns its number."""
    clock, copies = wire.clock, wire.copies
    clock[0].free -= 1
    copy = copies[clock[0].free].free
    copies[copy].key = key
    copies[copy].step = step
    ways = 2 if wire.machine[0].writes_back and evicts >= 0 else 1
    copies[copy].chunks = copies[copy].left = ways * wire.machine[0].chunks
    copies[copy].is_prefetch = is_prefetch
    copies[copy].is_urgent = 1 - is_prefetch
    copies[copy].is_cancelled = 0
    copies[copy].is_done = 0
    copies[copy].has_started = 0
    row = clock[0].rows
    clock[0].rows += 1
    copies[copy].row = row
    if row < len(wire.rows):
        wire.rows[row].key = key
        wire.rows[row].evicts = evicts
        wire.rows[row].is_prefetch = is_prefetch
        wire.rows[row].step = step
        wire.rows[row].queued_s = clock[0].now_s
        wire.rows[row].start_s = wire.rows[row].end_s = wire.rows[row].needed_s = -1.0
    push_back(wire.queues, PREFETCH if is_prefetch else DEMAND, copy)
    return copy


@compiled
def free(wire: Wire, copy: int) -> None:
    """Nobody asks after this copy any more."""
    wire.copies[wire.clock[0].free].free = copy
    wire.clock[0].free += 1


@compiled
def promote(wire: Wire, copy: int) -> None:
    """A late prefetch goes first."""
    wire.copies[copy].is_urgent = 1
    if wire.queues.links[copy].on == PREFETCH:
        unlink(wire.queues, copy)
        push_back(wire.queues, DEMAND, copy)


@compiled
def cancel(wire: Wire, copy: int) -> None:
    """Give up a prefetch at its next chunk."""
    wire.copies[copy].is_cancelled = 1
    if wire.queues.links[copy].on == PREFETCH:
        unlink(wire.queues, copy)
        if wire.copies[copy].has_started:
            _account(wire, copy)
        free(wire, copy)


@compiled
def _account(wire: Wire, copy: int) -> None:
    """A copy has ended, in whole or in part: what it moved was moved."""
    machine, found = wire.machine[0], wire.copies[copy]
    moved = machine.expert_bytes * (found.chunks - found.left) // machine.chunks
    wire.out[found.step].bytes_moved += moved
    if found.row < len(wire.rows):
        wire.rows[found.row].end_s = wire.clock[0].now_s


@compiled
def _pick(wire: Wire, is_computing: bool) -> None:
    """Start the next chunk, if anything is asked for."""
    clock, copies, queues = wire.clock, wire.copies, wire.queues
    copy = queues.ends[DEMAND].head
    if copy < 0:
        copy = queues.ends[PREFETCH].head
    clock[0].current = copy
    if copy < 0:
        return
    unlink(queues, copy)
    if not copies[copy].has_started:
        copies[copy].has_started = 1
        if copies[copy].row < len(wire.rows):
            wire.rows[copies[copy].row].start_s = clock[0].now_s
    _start_chunk(wire, is_computing)


@compiled
def _start_chunk(wire: Wire, is_computing: bool) -> None:
    clock = wire.clock
    chunk_s = wire.machine[0].busy_chunk_s if is_computing else wire.machine[0].idle_chunk_s
    clock[0].chunk_start_s = clock[0].now_s
    clock[0].chunk_end_s = clock[0].now_s + chunk_s


@compiled
def _next_chunk(wire: Wire, is_computing: bool) -> None:
    """Carry the clock to the end of the running chunk, and start the one after it."""
    clock, copies = wire.clock, wire.copies
    copy = clock[0].current
    clock[0].now_s = clock[0].chunk_end_s
    clock[0].busy_s += clock[0].now_s - clock[0].chunk_start_s
    copies[copy].left -= 1
    if copies[copy].left and not copies[copy].is_cancelled:
        if copies[copy].is_urgent or wire.queues.ends[DEMAND].head < 0:
            _start_chunk(wire, is_computing)  # nothing goes before it
            return
        push_front(wire.queues, PREFETCH, copy)
    else:
        _end(wire, copy)
    _pick(wire, is_computing)


@compiled
def _end(wire: Wire, copy: int) -> None:
    """A copy has been carried to its end, or to where it was given up."""
    clock, copies = wire.clock, wire.copies
    _account(wire, copy)
    if copies[copy].is_cancelled:
        free(wire, copy)
        return
    copies[copy].is_done = 1
    if copies[copy].is_prefetch:
        copies[clock[0].arrived].arrived = copy
        clock[0].arrived += 1


@compiled
def spend(wire: Wire, seconds: float, is_computing: bool) -> None:
    """Compute is busy (or waits) for so long; nothing happens in no time."""
    if not seconds > 0.0:
        return
    clock = wire.clock
    until_s = clock[0].now_s + seconds
    if clock[0].current < 0:
        _pick(wire, is_computing)
    while clock[0].current >= 0 and clock[0].chunk_end_s <= until_s:
        _next_chunk(wire, is_computing)
    clock[0].now_s = until_s


@compiled
def wait(wire: Wire, scratch: Records, count: int) -> None:
    """Compute waits for the first `count` copies of `needed`, then wakes."""
    clock, copies = wire.clock, wire.copies
    began_s, is_waiting = clock[0].now_s, False
    for number in range(count):
        row = copies[scratch[number].needed].row
        if row < len(wire.rows):
            wire.rows[row].needed_s = began_s
    for number in range(count):
        while not copies[scratch[number].needed].is_done:
            is_waiting = True
            if clock[0].current < 0:
                _pick(wire, False)
            _next_chunk(wire, False)
    if is_waiting:
        spend(wire, wire.machine[0].wake_s, False)

"""Hits of an event-atomic LRU at every capacity, in one pass (stack distances; Mattson et al., 1970).

An LRU of c slots holds the c experts that stand first in order of recency, whatever c is, because the experts of
one event are equally recent and ties go by number (policy/caches/lru.py). So it is enough to find, for each demand, the
place of its expert in that order before the event: with more slots than that it hits. Valid for capacities that
hold the largest event; smaller ones run in waves and are marked by the caller.

Recency is kept as marks in a ring of bits: the newest at its end. A place is the number of marks after an expert's
own, counted 64 at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import array_maker, compiled
from .state import Numbers

_WORD = 64
_ONE, _MASK, _SHIFT = np.uint64(1), np.uint64(63), np.uint64(6)


@array_maker
def stack_hits(ptr: Numbers, keys: Numbers, counted: Numbers, num_keys: int) -> np.ndarray:
    """Hits by capacity: [num_keys + 1], over the events with `counted`.

    `keys[ptr[j]:ptr[j + 1]]` are the distinct experts of event j, ascending.
    """
    room = max(4 * num_keys, 4 * _WORD)
    room += -room % _WORD
    words = np.zeros(room // _WORD, np.uint64)
    marks = np.zeros(room // _WORD, np.int32)
    place = np.full(num_keys, -1, np.int64)
    owner = np.full(room, -1, np.int64)
    at = np.zeros(num_keys + 1, np.int64)
    end = 0
    for event in range(len(ptr) - 1):
        first, last = ptr[event], ptr[event + 1]
        if end + (last - first) > room:
            end = _compact(words, marks, place, owner, end)
        if counted[event]:
            for demand in range(first, last):
                where = place[keys[demand]]
                if where >= 0:
                    at[_marks_after(words, marks, where, end)] += 1
        for demand in range(first, last):
            key = keys[demand]
            where = place[key]
            if where >= 0:
                words[where >> 6] &= ~(np.uint64(1) << np.uint64(where & 63))
                marks[where >> 6] -= 1
            words[end >> 6] |= np.uint64(1) << np.uint64(end & 63)
            marks[end >> 6] += 1
            owner[end] = key
            place[key] = end
            end += 1
    hits = np.zeros(num_keys + 1, np.int64)
    for slots in range(1, num_keys + 1):
        hits[slots] = hits[slots - 1] + at[slots - 1]
    return hits


@compiled
def _marks_after(words: Numbers, marks: Numbers, where: Any, end: int) -> int:
    """How many experts were used later than the one marked at `where`."""
    word = where >> 6
    rest = words[word] >> np.uint64(where & 63)
    found = _ones(rest) - 1
    for other in range(word + 1, ((end - 1) >> 6) + 1):
        found += marks[other]
    return found


@compiled
def _ones(bits: Any) -> Any:
    """Bits that are set in a word (LLVM makes one instruction of it)."""
    bits = bits - ((bits >> np.uint64(1)) & np.uint64(0x5555555555555555))
    bits = (bits & np.uint64(0x3333333333333333)) + (
        (bits >> np.uint64(2)) & np.uint64(0x3333333333333333)
    )
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((bits * np.uint64(0x0101010101010101)) >> np.uint64(56))


@array_maker
def lru_hits(ptr: Numbers, keys: Numbers, counted: Numbers, num_keys: int, slots: int) -> int:
    """Hits of an event-atomic LRU of so many slots that hold the largest event, shared by all `keys`.

    What an LRU holds is what was demanded last, so no list is kept: residents are those demanded at `oldest` or
    later. A bit per demand says whether it is its expert's last; the next victim is the next bit. Demands are
    numbered from 1.
    """
    live = np.zeros((len(keys) >> 6) + 3, np.uint64)
    last = np.zeros(num_keys, np.uint64)
    hits: Any = 0
    room, oldest = slots, _ONE
    for event in range(len(ptr) - 1):
        begin, end = np.uint64(ptr[event]), np.uint64(ptr[event + 1])
        missing = 0
        demand = begin
        while demand < end:
            key = np.uint32(keys[demand])
            before = last[key]
            missing += before < oldest
            live[before >> _SHIFT] &= ~(_ONE << (before & _MASK))
            demand += _ONE
            last[key] = demand
        _set_bits(live, begin + _ONE, end)
        if counted[event]:
            hits += np.int64(end - begin) - missing
        room -= missing
        while room < 0:
            word = live[oldest >> _SHIFT] >> (oldest & _MASK)
            while word == 0:
                oldest = ((oldest >> _SHIFT) + _ONE) << _SHIFT
                word = live[oldest >> _SHIFT]
            oldest += np.uint64(lowest_bit(word) + 1)
            room += 1
    return hits


@compiled
def _set_bits(words: Numbers, first: Any, last: Any) -> None:
    """Set the bits from `first` to `last`, both included."""
    place = first
    while place <= last:
        offset = place & _MASK
        fit = min(np.uint64(_WORD) - offset, last + _ONE - place)
        words[place >> _SHIFT] |= (~np.uint64(0) >> (np.uint64(_WORD) - fit)) << offset
        place += fit


@compiled
def lowest_bit(word: Any) -> Any:
    """The place of the lowest bit that is set."""
    return _ones((word & (~word + _ONE)) - _ONE)


@compiled
def _compact(words: Numbers, marks: Numbers, place: Numbers, owner: Numbers, end: int) -> int:
    """Move all marks to the front, in order; returns where they end."""
    words[:] = np.uint64(0)
    marks[:] = 0
    kept = 0
    for where in range(end):
        key = owner[where]
        if place[key] == where:
            owner[kept] = key
            place[key] = kept
            words[kept >> 6] |= np.uint64(1) << np.uint64(kept & 63)
            marks[kept >> 6] += 1
            kept += 1
    return kept

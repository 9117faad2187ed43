"""Compiled twins of the built-in caches, one branch each; tests hold them to the classes in policy/caches.

Most order residents by a rank, lowest first with ties by key; the others keep lists, as their classes do.
"""

from __future__ import annotations

import numpy as np

from ..policy import ranks
from .jit import compiled
from .lists import push_back, unlink
from .state import (
    ARC,
    BELADY,
    BELADY_FORCED,
    LEAST_STALE,
    LFRU,
    LFU,
    LRU,
    MULTI_FACTOR,
    PLEC,
    RESIDENT,
    SCORE,
    SIEVE,
    SLRU,
    STATIC,
    TWO_LEVEL_LRU,
    Slots,
    Work,
)

_lfru_rank = compiled(ranks.lfru_rank)
_nearness = compiled(ranks.nearness)
_multi_factor_rank = compiled(ranks.multi_factor_rank)
_target_raised = compiled(ranks.arc_target_raised)
_target_lowered = compiled(ranks.arc_target_lowered)
_protected_slots = compiled(ranks.protected_slots)
_plan_rank = compiled(ranks.plan_rank)


@compiled
def begin(slots: Slots, work: Work, pool: int, event: int, is_prefill: bool) -> None:
    """An event asks for its experts."""
    kind, pools, memory = slots.rules[0].kind, slots.pools, slots.memory
    first, last = work.ptr[event], work.ptr[event + 1]
    if first == last:
        return
    layer = work.layer[event]
    if kind == MULTI_FACTOR and is_prefill and layer <= pools[pool].layer:
        _forget_demands(slots, pool)
    pools[pool].now += 1
    if kind == MULTI_FACTOR and not memory[layer * slots.rules[0].num_experts].tick:
        memory[layer * slots.rules[0].num_experts].tick = 1  # a layer seen for the first time
        pools[pool].layers_seen += 1
    pools[pool].layer = layer
    pools[pool].in_event = pools[pool].now
    if kind == SCORE:
        _update_scores(slots, work, event)
        return
    if kind == PLEC:
        _end_plan(slots, work, event)
        return
    if kind == TWO_LEVEL_LRU:
        _end_window(slots, layer)
    for place in range(first, last):
        key = work.keys[place]
        if kind == BELADY or kind == BELADY_FORCED:
            memory[key].next_use = work.next_use[place]
        elif kind == TWO_LEVEL_LRU:
            memory[key].event = pools[pool].now
        elif kind == MULTI_FACTOR:
            memory[key].event = pools[pool].now
            memory[key].demands += 1
            _refresh(slots, key)
    if kind == ARC:
        _arc_begin(slots, work, pool, first, last)


@compiled
def _end_plan(slots: Slots, work: Work, event: int) -> None:
    """A layer has been routed: what was planned for it and not demanded is not needed."""
    experts, memory = slots.experts, slots.memory
    base = work.layer[event] * slots.rules[0].num_experts
    memory[base].demands = 0
    for key in range(base, base + slots.rules[0].num_experts):
        experts[key].flag = memory[key].tick > 0
        memory[key].tick = 0
    for place in range(work.ptr[event], work.ptr[event + 1]):
        experts[work.keys[place]].flag = 0
    for key in range(base, base + slots.rules[0].num_experts):
        _refresh(slots, key)


@compiled
def _end_window(slots: Slots, layer: int) -> None:
    """A layer has been routed: what was predicted for it is so no longer."""
    base = layer * slots.rules[0].num_experts
    for key in range(base, base + slots.rules[0].num_experts):
        if slots.memory[key].tick:
            slots.memory[key].tick = 0
            _refresh(slots, key)


@compiled
def expect(slots: Slots, work: Work, first: int, last: int) -> None:
    """Experts are predicted, in order of need: `guess_keys[first:last]`. Only PLEC and two-level LRU listen."""
    if slots.rules[0].kind != PLEC and slots.rules[0].kind != TWO_LEVEL_LRU:
        return
    memory, num_experts, stamp = slots.memory, slots.rules[0].num_experts, slots.rules[0].stamp
    for place in range(first, last):
        key = work.guess_keys[place]
        base = key // num_experts * num_experts
        if (
            memory[base].next_use != stamp
        ):  # the first word on this layer: what was said before is forgotten
            memory[base].next_use = stamp
            memory[base].demands = 1
            for other in range(base, base + num_experts):
                memory[other].tick = 0
        if not memory[key].tick:
            memory[key].tick = memory[base].demands
            memory[base].demands += 1
    for layer in range(len(slots.pool_of)):
        base = layer * num_experts
        if memory[base].next_use == stamp:
            for key in range(base, base + num_experts):
                _refresh(slots, key)


@compiled
def _forget_demands(slots: Slots, pool: int) -> None:
    slots.pools[pool].now = 0
    num_experts = slots.rules[0].num_experts
    for layer in range(len(slots.pool_of)):
        if slots.pool_of[layer] == pool:
            for key in range(layer * num_experts, (layer + 1) * num_experts):
                slots.memory[key].event = 0
                slots.memory[key].demands = 0
                _refresh(slots, key)


@compiled
def _update_scores(slots: Slots, work: Work, event: int) -> None:
    alpha, memory = slots.rules[0].params[0], slots.memory
    base = work.layer[event] * slots.rules[0].num_experts
    kept = 1.0 - alpha
    for key in range(base, base + slots.rules[0].num_experts):
        memory[key].score = kept * memory[key].score
    for place in range(work.ptr[event], work.ptr[event + 1]):
        weight = work.weights[place] if len(work.weights) else 1.0
        memory[work.keys[place]].score += alpha * weight
    for key in range(base, base + slots.rules[0].num_experts):
        _refresh(slots, key)


@compiled
def _refresh(slots: Slots, key: int) -> None:
    """Write what ranks a resident to its place beside the members."""
    kind, expert = slots.rules[0].kind, slots.experts[key]
    if kind < LFU or expert.where != RESIDENT:
        return
    known = slots.memory[key]
    a, b = 0.0, float(known.last)
    if kind == LFU:
        a, b = float(known.count), float(known.tick)
    elif kind == STATIC:
        a, b = known.popularity, -float(key % slots.rules[0].num_experts)
    elif kind == BELADY or kind == BELADY_FORCED:
        a, b = -float(known.next_use), 0.0
    elif kind == LFRU:
        a = float(known.count)
    elif kind == TWO_LEVEL_LRU:
        a = -1.0 if known.tick else float(expert.flag)
    elif kind == SCORE:
        a = known.score
    elif kind == MULTI_FACTOR:
        a, b = float(known.event), float(known.demands)
    elif kind == PLEC and known.tick:
        a, b = 2.0, -float(known.tick)
    elif kind == PLEC:
        is_spoken_of = slots.memory[key - key % slots.rules[0].num_experts].demands > 0
        a = 0.0 if expert.flag or is_spoken_of else 1.0
    slots.rank_a[expert.position] = a
    slots.rank_b[expert.position] = b


@compiled
def _arc_begin(slots: Slots, work: Work, pool: int, first: int, last: int) -> None:
    lists, pools, base = slots.lists, slots.pools, 4 * pool
    recent, frequent = lists.ends[base + 2].length, lists.ends[base + 3].length
    for place in range(first, last):
        key = work.keys[place]
        on, target = lists.links[key].on, pools[pool].target
        if on == base + 2:
            pools[pool].target = _target_raised(target, pools[pool].size, recent, frequent)
        elif on == base + 3:
            pools[pool].target = _target_lowered(target, recent, frequent)
        else:
            continue
        slots.memory[key].event = pools[pool].now


@compiled
def touch(slots: Slots, pool: int, key: int) -> None:
    """A resident expert was demanded."""
    kind, keys, memory = slots.rules[0].kind, slots.experts, slots.memory
    if kind == SLRU or kind == ARC or kind == SIEVE:
        keys[key].flag = 1
    elif kind == LFU:
        slots.pools[pool].ticks += 1
        memory[key].count += 1
        memory[key].tick = slots.pools[pool].ticks
    elif kind >= LFRU:
        memory[key].count += 1
        memory[key].last = slots.pools[pool].now
        keys[key].flag = 0
    _refresh(slots, key)


@compiled
def admit(slots: Slots, pool: int, key: int) -> None:
    """An expert became resident."""
    kind, keys, memory = slots.rules[0].kind, slots.experts, slots.memory
    if kind <= SLRU:
        push_back(slots.lists, 4 * pool, key)
    elif kind == ARC:
        _arc_admit(slots, pool, key)
    elif kind == SIEVE:
        if slots.pools[pool].hand < 0:
            slots.pools[pool].hand = key
        push_back(slots.lists, 4 * pool, key)
    elif kind == LFU:
        memory[key].count = 0
        touch(slots, pool, key)
    elif kind >= LFRU:
        memory[key].count = 1
        memory[key].last = slots.pools[pool].now
        if kind == TWO_LEVEL_LRU:
            # Outside an event, or not of it: a prefetch, unused so far.
            now = slots.pools[pool].now
            keys[key].flag = slots.pools[pool].in_event != now or memory[key].event != now
    if kind >= LFU:
        slots.rank_layer[keys[key].position] = key // slots.rules[0].num_experts
        _refresh(slots, key)


@compiled
def _arc_admit(slots: Slots, pool: int, key: int) -> None:
    lists, base = slots.lists, 4 * pool
    again = slots.memory[key].event == slots.pools[pool].now
    if lists.links[key].on >= 0:
        again = True
        unlink(lists, key)
    push_back(lists, base + 1 if again else base, key)
    size = slots.pools[pool].size
    while (
        lists.ends[base + 2].length and lists.ends[base].length + lists.ends[base + 2].length > size
    ):
        unlink(lists, lists.ends[base + 2].head)
    residents = lists.ends[base].length + lists.ends[base + 1].length
    while residents + lists.ends[base + 2].length + lists.ends[base + 3].length > 2 * size:
        ghosts = base + 3 if lists.ends[base + 3].length else base + 2
        unlink(lists, lists.ends[ghosts].head)


@compiled
def remove(slots: Slots, pool: int, key: int) -> None:
    """An expert was evicted."""
    kind, lists = slots.rules[0].kind, slots.lists
    if kind == SIEVE:
        _sieve_remove(slots, pool, key)
        return
    slots.experts[key].flag = 0
    if kind <= SLRU:
        unlink(lists, key)
    elif kind == ARC:
        ghosts = lists.links[key].on + 2
        unlink(lists, key)
        push_back(lists, ghosts, key)


@compiled
def _newer(slots: Slots, pool: int, key: int) -> int:
    after = slots.lists.links[key].nxt
    return after if after >= 0 else slots.lists.ends[4 * pool].head


@compiled
def _sieve_remove(slots: Slots, pool: int, key: int) -> None:
    experts, pools = slots.experts, slots.pools
    if experts[key].flag:
        start = pools[pool].start
        for place in range(start, start + pools[pool].count):
            experts[slots.members[place]].flag = 0
    else:
        passed = pools[pool].hand
        while passed != key:
            experts[passed].flag = 0
            passed = _newer(slots, pool, passed)
    newer = _newer(slots, pool, key)
    pools[pool].hand = -1 if newer == key else newer
    unlink(slots.lists, key)


@compiled
def released(slots: Slots, work: Work, pool: int, event: int) -> None:
    """The event is over: bring lists in order. Which experts to drop is decided in core.release."""
    kind, lists, keys, base = slots.rules[0].kind, slots.lists, slots.experts, 4 * pool
    slots.pools[pool].in_event = -1
    if kind != LRU and kind != SLRU and kind != ARC:
        return
    places = 0
    if kind == SLRU:
        places = _protected_slots(slots.rules[0].params[0], slots.pools[pool].size)
    for place in range(work.ptr[event], work.ptr[event + 1]):
        key = work.keys[place]
        if keys[key].where != RESIDENT:
            continue
        if kind == LRU:
            unlink(lists, key)
            push_back(lists, base, key)
        elif keys[key].flag:
            keys[key].flag = 0
            unlink(lists, key)
            push_back(lists, base + 1, key)
            while kind == SLRU and lists.ends[base + 1].length > places:
                demoted = lists.ends[base + 1].head
                unlink(lists, demoted)
                push_back(lists, base, demoted)


@compiled
def victim(slots: Slots, pool: int, stamp: int) -> int:
    """The resident to evict first among those not stamped; -1 if there is none."""
    kind, base = slots.rules[0].kind, 4 * pool
    if kind <= LRU:
        return _first(slots, base, stamp)
    if kind == SLRU or kind == ARC:
        one, other = base, base + 1
        if kind == ARC and slots.lists.ends[base].length <= slots.pools[pool].target:
            one, other = base + 1, base
        found = _first(slots, one, stamp)
        return found if found >= 0 else _first(slots, other, stamp)
    if kind == SIEVE:
        return _sieve_victim(slots, pool, stamp)
    return _lowest(slots, pool, stamp)


@compiled
def _first(slots: Slots, number: int, stamp: int) -> int:
    key = slots.lists.ends[number].head
    while key >= 0 and slots.experts[key].stamp == stamp:
        key = slots.lists.links[key].nxt
    return key


@compiled
def _sieve_victim(slots: Slots, pool: int, stamp: int) -> int:
    second = -1
    key = slots.pools[pool].hand
    for _ in range(slots.pools[pool].count):
        if slots.experts[key].stamp != stamp:
            if not slots.experts[key].flag:
                return key
            if second < 0:
                second = key
        key = _newer(slots, pool, key)
    return second


@compiled
def _lowest(slots: Slots, pool: int, stamp: int) -> int:
    kind = slots.rules[0].kind
    # Each call is compiled for its own kind, so that the loop has no branch on it.
    if kind == LFRU:
        return _scan(slots, pool, stamp, LFRU)
    if kind == LEAST_STALE:
        return _scan(slots, pool, stamp, LEAST_STALE)
    if kind == TWO_LEVEL_LRU:
        return _scan(slots, pool, stamp, TWO_LEVEL_LRU)
    if kind == MULTI_FACTOR:
        return _scan(slots, pool, stamp, MULTI_FACTOR)
    if kind == PLEC:
        return _scan(slots, pool, stamp, PLEC)
    return _scan(slots, pool, stamp, LFU)


@compiled
def _scan(slots: Slots, pool: int, stamp: int, kind: int) -> int:
    """The member of lowest (rank, second rank, key) without the stamp; -1 if there is none."""
    found, lowest, second = -1, np.inf, 0.0
    start = slots.pools[pool].start
    for place in range(start, start + slots.pools[pool].count):
        rank = _rank(slots, pool, place, kind)
        if rank > lowest:
            continue
        key = slots.members[place]
        if slots.experts[key].stamp == stamp:
            continue
        tie = 0.0 if kind == MULTI_FACTOR else slots.rank_b[place]
        if rank < lowest or tie < second or (tie == second and key < found) or found < 0:
            found, lowest, second = key, rank, tie
    return found


@compiled
def _rank(slots: Slots, pool: int, place: int, kind: int) -> float:
    a, b = slots.rank_a[place], slots.rank_b[place]
    now, params = slots.pools[pool].now, slots.rules[0].params
    if kind == LFRU:
        return _lfru_rank(a, now - b)
    if kind == LEAST_STALE:
        return 0.0 if slots.rank_layer[place] <= slots.pools[pool].layer else 1.0
    if kind == TWO_LEVEL_LRU:
        return 0.0 if a > 0.0 or (a == 0.0 and b < now - params[0] + 1.0) else 1.0
    if kind == MULTI_FACTOR:
        layers = max(slots.pools[pool].layers_seen, 1)
        near = params[2] * _nearness(slots.rank_layer[place], slots.pools[pool].layer, layers)
        return _multi_factor_rank(a, b, max(now, 1), params[0], params[1], near)
    if kind == PLEC and a >= 1.0:
        return a + _plan_rank(slots.rank_layer[place], slots.pools[pool].layer)
    return a

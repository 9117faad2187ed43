"""The decision core over arrays: the compiled twin of policy.residency.Residency."""

from __future__ import annotations

from . import caches, ledger
from .jit import compiled
from .lists import push_back, unlink
from .state import (
    ABSENT,
    LOADING,
    NONE,
    ON_CPU,
    RESIDENT,
    RESIDENT_FIRST,
    SOONER,
    Run,
    Slots,
    Work,
)


@compiled
def settle(slots: Slots, pool: int, key: int) -> None:
    """An expert became resident."""
    pools = slots.pools
    place = pools[pool].start + pools[pool].count
    slots.members[place] = key
    slots.experts[key].position = place
    slots.experts[key].where = RESIDENT
    pools[pool].count += 1
    caches.admit(slots, pool, key)


@compiled
def evict(slots: Slots, pool: int, key: int) -> None:
    """A resident expert goes."""
    caches.remove(slots, pool, key)
    pools, experts, members = slots.pools, slots.experts, slots.members
    last = pools[pool].start + pools[pool].count - 1
    place, moved = experts[key].position, members[last]
    members[place] = moved
    experts[moved].position = place
    slots.rank_a[place] = slots.rank_a[last]
    slots.rank_b[place] = slots.rank_b[last]
    slots.rank_layer[place] = slots.rank_layer[last]
    experts[key].where = ABSENT
    pools[pool].count -= 1


@compiled
def free_slots(slots: Slots, pool: int) -> int:
    """Slots that hold nothing and await nothing, staging included."""
    found = slots.pools[pool]
    return found.size + found.staging - found.count - found.flying


@compiled
def pool_of(slots: Slots, key: int) -> int:
    """The pool an expert lives in."""
    return slots.pool_of[key // slots.rules[0].num_experts]


@compiled
def arrived(slots: Slots, key: int) -> None:
    """A prefetch has ended undemanded."""
    stop_loading(slots, key)
    settle(slots, pool_of(slots, key), key)


@compiled
def stop_loading(slots: Slots, key: int) -> None:
    """A prefetch has ended, was demanded or was given up."""
    unlink(slots.loading, key)
    slots.experts[key].where = ABSENT
    slots.pools[pool_of(slots, key)].flying -= 1


@compiled
def new_stamp(slots: Slots) -> int:
    """A mark nobody bears yet."""
    slots.rules[0].stamp += 1
    return slots.rules[0].stamp


@compiled
def demand(run: Run, event: int, is_prefill: bool) -> tuple[int, int, int, int, int, int]:
    """Answer one event; counts of hits, lates, misses, misses on the CPU, waves and cancels.

    The rest of the answer is in `scratch`: late, load and load_evicts (wave_loads of them by wave), wave_members,
    wave_rows, cancel, and in miss_tokens the tokens of the experts on the CPU.
    """
    work, slots, scratch, clock = run.work, run.slots, run.scratch, run.wire.clock
    experts = slots.experts
    pool = slots.pool_of[work.layer[event]]
    caches.begin(slots, work, pool, event, is_prefill)
    hits = lates = misses = hit_rows = late_rows = 0
    for place in range(work.ptr[event], work.ptr[event + 1]):
        key = work.keys[place]
        if experts[key].where == RESIDENT:
            scratch[hits].hit = key
            hits += 1
            hit_rows += work.counts[place]
            clock[0].useful += ledger.close(experts, key)
            caches.touch(slots, pool, key)
        elif experts[key].where == LOADING:
            scratch[lates].late = key
            lates += 1
            late_rows += work.counts[place]
        else:
            scratch[misses].miss = key
            scratch[misses].miss_tokens = scratch[misses].load_tokens = work.counts[place]
            misses += 1
    for number in range(lates):
        key = scratch[number].late
        clock[0].late += ledger.close(experts, key)
        stop_loading(slots, key)
        settle(slots, pool, key)
    for number in range(misses):
        clock[0].harmful += ledger.came_back(experts, scratch[number].miss)
    for number in range(misses):
        ledger.close(experts, scratch[number].miss)
    on_cpu = _choose_cpu(run, misses)
    waves, cancels = _make_waves(run, pool, hits, lates, hit_rows, late_rows, misses - on_cpu)
    return hits, lates, misses, on_cpu, waves, cancels


@compiled
def _choose_cpu(run: Run, misses: int) -> int:
    """How many misses go to the CPU; those to load keep their order at the front of `miss`."""
    scratch, rule = run.scratch, run.slots.rules[0].misses
    if misses == 0 or (rule != ON_CPU and rule != SOONER):
        return 0
    chosen = misses if rule == ON_CPU else _sooner(run, misses)
    for number in range(misses):
        scratch[number].on_cpu = rule == ON_CPU
    if rule == SOONER:
        for number in range(chosen):
            scratch[scratch[number].order].on_cpu = 1
    kept = taken = 0
    for number in range(misses):
        if scratch[number].on_cpu:
            scratch[taken].miss_tokens = scratch[number].miss_tokens
            taken += 1
        else:
            scratch[kept].miss = scratch[number].miss
            scratch[kept].load_tokens = scratch[number].load_tokens
            kept += 1
    return chosen


@compiled
def _sooner(run: Run, misses: int) -> int:
    """The compiled twin of policy.misses.sooner: positions of the chosen are the first of `order`."""
    scratch, rules = run.scratch, run.slots.rules[0]
    for number in range(misses):
        tokens = scratch[number].miss_tokens
        place = number
        while place > 0 and scratch[scratch[place - 1].order].miss_tokens > tokens:
            scratch[place].order = scratch[place - 1].order
            place -= 1
        scratch[place].order = number
    best, best_s, cpu_s = 0, misses * rules.copy_s, 0.0
    for count in range(1, misses + 1):
        cpu_s += rules.expert_s + rules.token_s * scratch[scratch[count - 1].order].miss_tokens
        ends_s = max(cpu_s, (misses - count) * rules.copy_s)
        if ends_s < best_s:
            best, best_s = count, ends_s
    return best


@compiled
def _make_waves(
    run: Run, pool: int, hits: int, lates: int, hit_rows: int, late_rows: int, to_load: int
) -> tuple[int, int]:
    slots, scratch, experts = run.slots, run.scratch, run.slots.experts
    capacity = slots.pools[pool].size + slots.pools[pool].staging
    present, present_rows = hits + lates, hit_rows + late_rows
    done = waves = cancels = 0
    is_split = slots.rules[0].misses == RESIDENT_FIRST
    while present > 0 or done < to_load or waves == 0:
        stamp = new_stamp(slots)
        if waves == 0:
            for number in range(hits):
                experts[scratch[number].hit].stamp = stamp
            for number in range(lates):
                experts[scratch[number].late].stamp = stamp
        fetched = min(capacity - present, to_load - done)
        for number in range(done, done + fetched):
            experts[scratch[number].miss].stamp = stamp
        fetched_rows = 0
        for number in range(done, done + fetched):
            cancels = _load(run, pool, number, stamp, cancels)
            fetched_rows += scratch[number].load_tokens
        scratch[waves].wave_loads = fetched
        scratch[waves].wave_members = present + fetched
        scratch[waves].wave_rows = present_rows + fetched_rows
        scratch[waves].wave_waits = 1
        awaited = lates + fetched
        if is_split and waves == 0 and hits > 0 and awaited > 0:
            # What is there runs by itself; the next wave waits for what was asked for with this one.
            scratch[0].wave_members, scratch[0].wave_rows = hits, hit_rows
            scratch[0].wave_waits = 0
            scratch[1].wave_loads = 0
            scratch[1].wave_members, scratch[1].wave_rows = awaited, late_rows + fetched_rows
            scratch[1].wave_waits = 1
            waves = 1
        done += fetched
        present = present_rows = 0
        waves += 1
    return waves, cancels


@compiled
def _load(run: Run, pool: int, number: int, stamp: int, cancels: int) -> int:
    slots, scratch = run.slots, run.scratch
    key = scratch[number].miss
    gone = -1
    if free_slots(slots, pool) <= 0:
        gone = caches.victim(slots, pool, stamp)
        if gone >= 0:
            evict(slots, pool, gone)
        else:
            # Every slot outside the event is being filled by a prefetch: give up the last one asked for.
            given_up = slots.loading.ends[0].tail
            while pool_of(slots, given_up) != pool:
                given_up = slots.loading.links[given_up].prv
            stop_loading(slots, given_up)
            ledger.close(slots.experts, given_up)
            run.wire.clock[0].cancelled += 1
            scratch[cancels].cancel = given_up
            cancels += 1
    settle(slots, pool, key)
    scratch[number].load = key
    scratch[number].load_evicts = gone
    return cancels


@compiled
def prefetch(run: Run, event: int) -> int:
    """Answer a prediction; the prefetches worth asking for are in `asked`."""
    work, slots, experts = run.work, run.slots, run.slots.experts
    first, last = work.guess_ptr[event], work.guess_ptr[event + 1]
    if first == last:
        return 0
    stamp = new_stamp(slots)
    for place in range(work.ptr[event], work.ptr[event + 1]):
        experts[work.keys[place]].stamp = stamp
    _mark_fitting(run, event, stamp)
    asked = 0
    for place in range(first, last):
        key = work.guess_keys[place]
        if experts[key].stamp != stamp or experts[key].where != ABSENT:
            continue
        pool = pool_of(slots, key)
        gone = -1
        if free_slots(slots, pool) <= slots.pools[pool].staging:
            gone = caches.victim(slots, pool, stamp)
            if gone < 0:
                continue
            evict(slots, pool, gone)
        experts[key].where = LOADING
        slots.pools[pool].flying += 1
        push_back(slots.loading, 0, key)
        ledger.prefetched(experts, key, gone)
        run.asked[asked].key = key
        run.asked[asked].evicts = gone
        asked += 1
    run.wire.clock[0].issued += asked
    return asked


@compiled
def _mark_fitting(run: Run, event: int, stamp: int) -> None:
    """Tell the caches what is predicted, and stamp as much of it as its pools hold beside the running event."""
    work, slots, pools, experts = run.work, run.slots, run.slots.pools, run.slots.experts
    running = slots.pool_of[work.layer[event]]
    first, last = work.guess_ptr[event], work.guess_ptr[event + 1]
    caches.expect(slots, work, first, last)
    for place in range(first, last):
        key = work.guess_keys[place]
        if experts[key].stamp == stamp:
            continue
        pool = pool_of(slots, key)
        if pools[pool].stamp != stamp:
            pools[pool].stamp = stamp
            taken = work.ptr[event + 1] - work.ptr[event] if pool == running else 0
            pools[pool].room = pools[pool].size - max(0, taken - pools[pool].staging)
        if pools[pool].room > 0:
            pools[pool].room -= 1
            experts[key].stamp = stamp


@compiled
def release(slots: Slots, work: Work, event: int) -> None:
    """The event has been computed; its experts may be evicted."""
    pool = slots.pool_of[work.layer[event]]
    caches.released(slots, work, pool, event)
    if slots.rules[0].kind == NONE:
        for place in range(work.ptr[event], work.ptr[event + 1]):
            key = work.keys[place]
            if slots.experts[key].where == RESIDENT:
                evict(slots, pool, key)
    elif slots.pools[pool].staging:
        stamp = new_stamp(slots)
        while free_slots(slots, pool) < slots.pools[pool].staging and slots.pools[pool].count:
            evict(slots, pool, caches.victim(slots, pool, stamp))

"""Whole passes: what engine.Simulation does step by step, as one loop."""

from __future__ import annotations

from . import core, link
from .jit import compiled
from .state import (
    CPU,
    DECISION,
    EXPERTS,
    LAP_COUNT,
    LOOKAHEAD,
    MIXER,
    READBACK,
    STALL,
    Run,
    Slots,
    Wire,
)


@compiled
def run_steps(run: Run, first: int, last: int) -> None:
    """Walk the steps from `first` to `last`, without the last."""
    clock, out = run.wire.clock, run.wire.out
    for step in range(first, last):
        size = run.work.steps[step]
        phase = 1 if size.is_decode else 0
        out[step].start_s = clock[0].now_s
        out[step].expert_bytes = 0.0
        if size.overhead_s > 0.0:
            link.spend(run.wire, size.overhead_s, True)
        for event in range(size.first_event, size.last_event):
            for lap in range(LAP_COUNT):
                clock[0].laps[lap] = 0.0
            _run_event(run, step, phase, event)
            for lap in range(LAP_COUNT):
                out[step].laps[lap] += clock[0].laps[lap]
        weights = run.costs[phase].head
        head_s = 0.0 + weights[0]
        head_s += weights[1] * size.batch
        head_s += weights[2] * size.tokens
        link.spend(run.wire, head_s, True)
        out[step].end_s = clock[0].now_s


@compiled
def _compute(wire: Wire, lap: int, seconds: float) -> None:
    if seconds > 0.0:
        link.spend(wire, seconds, True)
        wire.clock[0].laps[lap] += seconds


@compiled
def _run_event(run: Run, step: int, phase: int, event: int) -> None:
    work, wire, clock = run.work, run.wire, run.wire.clock
    tokens = work.steps[step].tokens
    weights = run.costs[phase].mixer
    mixer_s = 0.0 + weights[0]
    mixer_s += weights[1] * tokens
    mixer_s += weights[2] * (tokens * work.steps[step].context)
    mixer_s += weights[3] * clock[0].demand_before
    mixer_s += weights[4] * clock[0].prefetch_before
    _compute(wire, MIXER, mixer_s)
    _compute(wire, READBACK, run.costs[phase].readback_s)
    _take_arrived(wire, run.slots)
    hits, lates, misses, on_cpu, waves, cancels = core.demand(run, event, phase == 0)
    for number in range(cancels):
        key = run.scratch[number].cancel
        link.cancel(wire, run.slots.experts[key].copy)
        run.slots.experts[key].copy = -1
    wire.out[step].hits += hits
    wire.out[step].lates += lates
    wire.out[step].misses += misses
    distinct = work.ptr[event + 1] - work.ptr[event]
    loads = misses - on_cpu
    weights = run.costs[phase].decision
    decision_s = 0.0 + weights[0]
    decision_s += weights[1] * distinct
    decision_s += weights[2] * loads
    _compute(wire, DECISION, decision_s)
    cpu_end_s = clock[0].now_s + _cpu_s(run, on_cpu)
    asked = _run_waves(run, step, phase, event, lates, loads, on_cpu, waves)
    now_s = clock[0].now_s
    if cpu_end_s > now_s:
        link.spend(wire, cpu_end_s - now_s, False)
        wire.clock[0].laps[CPU] += clock[0].now_s - now_s
    core.release(run.slots, work, event)
    clock[0].demand_before = loads
    clock[0].prefetch_before = asked


@compiled
def _take_arrived(wire: Wire, slots: Slots) -> None:
    """Tell the core of prefetches that ended; those demanded meanwhile are no news."""
    for place in range(wire.clock[0].arrived):
        copy = wire.copies[place].arrived
        key = wire.copies[copy].key
        if slots.experts[key].copy == copy:
            slots.experts[key].copy = -1
            core.arrived(slots, key)
        link.free(wire, copy)
    wire.clock[0].arrived = 0


@compiled
def _cpu_s(run: Run, on_cpu: int) -> float:
    machine, seconds = run.wire.machine[0], 0.0
    for number in range(on_cpu):
        expert_s = 0.0 + machine.cpu_expert_s
        expert_s += machine.cpu_token_s * run.scratch[number].miss_tokens
        seconds += expert_s
    return seconds


@compiled
def _run_waves(
    run: Run,
    step: int,
    phase: int,
    event: int,
    lates: int,
    loads: int,
    on_cpu: int,
    waves: int,
) -> int:
    """Load, predict, wait and compute, wave by wave; returns the prefetches asked for."""
    scratch, wire, experts = run.scratch, run.wire, run.slots.experts
    on_device = run.work.ptr[event + 1] - run.work.ptr[event] - on_cpu
    done = asked = flying = needed = computed = first = later = 0
    for wave in range(waves):
        if wave == 0:
            flying = needed = lates
            for number in range(lates):
                scratch[number].needed = experts[scratch[number].late].copy
        for number in range(done, done + scratch[wave].wave_loads):
            scratch[needed].needed = link.submit(
                wire, scratch[number].load, scratch[number].load_evicts, step, 0
            )
            needed += 1
        done += scratch[wave].wave_loads
        if wave == waves - 1:
            asked = _predict(run, step, phase, event)
        if wave == 0:
            for number in range(lates):
                link.promote(wire, scratch[number].needed)
                experts[scratch[number].late].copy = -1
        if scratch[wave].wave_waits:
            began_s = wire.clock[0].now_s
            link.wait(wire, scratch, needed)
            wire.clock[0].laps[STALL] += wire.clock[0].now_s - began_s
            for number in range(flying, needed):
                link.free(wire, scratch[number].needed)
            flying = needed = 0
        members = scratch[wave].wave_members
        if members:
            if computed == 0:
                first = scratch[wave].wave_rows
            else:
                later = max(later, scratch[wave].wave_rows)
            computed += 1
            seconds = _experts_s(run, step, phase, event, on_device, loads, asked, waves)
            _compute(wire, EXPERTS, seconds * (members / on_device))
    is_whole = computed < 2 and on_cpu == 0
    held = _expert_bytes(run, step, phase, event, first, later, is_whole)
    wire.out[step].expert_bytes = max(wire.out[step].expert_bytes, held)
    return asked


@compiled
def _expert_bytes(
    run: Run, step: int, phase: int, event: int, first: int, later: int, is_whole: bool
) -> float:
    """The compiled twin of activations.ExpertBytes.of_event."""
    costs, tokens = run.costs[phase], run.work.steps[step].tokens
    if is_whole:
        peak = costs.row * first
    else:
        last = max(costs.gathered_row * later, costs.weighted * tokens)
        peak = max(costs.gathered_row * first, costs.partial * tokens + last)
    behind = run.wire.machine[0].num_layers - 1 - run.work.layer[event]
    return peak - costs.layer_kv * (tokens * behind)


@compiled
def _predict(run: Run, step: int, phase: int, event: int) -> int:
    asked = core.prefetch(run, event)
    if run.slots.rules[0].predicts:
        weights = run.costs[phase].lookahead
        lookahead_s = 0.0 + weights[0]
        lookahead_s += weights[1] * run.work.steps[step].tokens
        lookahead_s += weights[2] * asked
        if event == run.work.steps[step].first_event:
            lookahead_s += run.costs[phase].pass_lookahead_s
        _compute(run.wire, LOOKAHEAD, lookahead_s)
    for number in range(asked):
        key = run.asked[number].key
        copy = link.submit(run.wire, key, run.asked[number].evicts, step, 1)
        run.slots.experts[key].copy = copy
    return asked


@compiled
def _experts_s(
    run: Run,
    step: int,
    phase: int,
    event: int,
    distinct: int,
    demand: int,
    prefetch: int,
    waves: int,
) -> float:
    machine, weights = run.wire.machine[0], run.costs[phase].experts
    seconds = 0.0 + weights[0]
    seconds += weights[1] * run.work.steps[step].tokens
    seconds += weights[2] * distinct
    seconds += weights[3] * demand
    seconds += weights[4] * prefetch
    seconds += weights[5] * (waves - 1)
    pool_slots = run.slots.pools[run.slots.pool_of[run.work.layer[event]]].size
    seconds += machine.group_s * (waves * pool_slots - machine.num_experts)
    return max(0.0, seconds)

"""Measures this process, now: a cost model from short runs of the runtime itself.

A shared machine drifts by tens of percent within minutes, so `verify` calibrates right before it predicts, on
other prompts, sizes and policies than those it will be judged on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..simulator.account import RunRecord, largest_waves
from ..simulator.costs import CostModel, as_one_walk, fit_costs
from ..simulator.policy.log import Entry
from ..simulator.policy.spec import PolicySpec, make_spec
from ..tracer.generate import Prompt
from ..tracer.memory import measure_memory
from ..tracer.schema import WHOLE_STEP
from ..tracer.types import LinkCurve, LinkProfile, MemoryPoint, ModelShape
from .machine import Machine

Places = Counter[tuple[int, int]]


def calibration_specs(shape: ModelShape, popularity: Sequence[Sequence[int]]) -> list[PolicySpec]:
    """Runs that between them show every cost of demand loading: all hits, all misses, waves.

    Their sizes are odd shares on purpose: nobody asks for them, so no judged run repeats one.
    """
    total = shape.total_experts
    return [
        make_spec(slots=total, cache="static", popularity=popularity),
        make_spec(slots=max(1, round(0.94 * total)), cache="none"),
        make_spec(slots=max(1, round(0.31 * total)), cache="lru"),
    ]


def prefetch_specs(shape: ModelShape) -> list[PolicySpec]:
    """Calibration runs that show the cost of predicting, and of copies beside compute."""
    return [
        make_spec(
            slots=max(1, round(share * shape.total_experts)),
            cache="lru",
            predictor="gate_lookahead",
        )
        for share in (0.56, 0.19)
    ]


def memory_points(
    machine: Machine, specs: Sequence[PolicySpec], prompts: Sequence[Sequence[Prompt]]
) -> tuple[MemoryPoint, ...]:
    """Peaks of working tensors in the runtime's own passes, in one wave and in several."""
    points: list[MemoryPoint] = []
    for spec in specs:
        for batch in prompts:
            with machine.session(spec) as session:
                first = machine.fill_cache(session, prompts[0][:1])
                found = measure_memory(
                    machine.loaded, [batch], machine.device, observer=session, first_step=first
                )
                shares = largest_waves(session.log)
            points += [
                replace(point, largest_wave=shares.get(step, 1.0))
                for step, point in enumerate(found, start=first)
            ]
    return tuple(points)


def calibrate(
    runs: Sequence[tuple[PolicySpec, RunRecord]],
    *,
    shape: ModelShape,
    group_s: float,
    link_name: str,
    memory: tuple[MemoryPoint, ...],
    chunk_bytes: int,
) -> CostModel:
    """Fit a machine to the raw rows of calibration runs."""
    steps, demand, prefetch = _joined([record for _, record in runs])
    copy_s, wake_s = _link_seconds(steps, demand, prefetch)
    walked, _, _ = _joined([_one_walk(spec, record, shape, group_s) for spec, record in runs])
    busy = [
        copy.end_s - copy.start_s
        for _, record in runs
        for copy in record.copies
        if copy.why == "prefetch"
    ]
    busy_s = float(np.median(busy)) if busy else copy_s
    curves = tuple(
        LinkCurve(pinned=pinned, busy=is_busy, points=((shape.expert_bytes, seconds),))
        for pinned in (True, False)
        for is_busy, seconds in ((False, copy_s), (True, busy_s))
    )
    profile = LinkProfile(
        name=link_name, origin="measured", curves=curves, wake_s=wake_s, chunk_bytes=chunk_bytes
    )
    return fit_costs(
        walked,
        demand,
        prefetch,
        link=profile,
        shape=shape,
        pinned=True,
        group_s=group_s,
        memory=memory,
    )


def _one_walk(spec: PolicySpec, record: RunRecord, shape: ModelShape, group_s: float) -> RunRecord:
    """Rows as the fit wants them: expert times for one pool size, look-ahead only where one was at work."""
    core = spec.build(shape)
    pools = {layer: core.pool_slots(layer) for layer in range(shape.num_moe_layers)}
    steps = as_one_walk(record.steps, pools, group_s, shape.num_experts)
    if spec.predictor.name == "none":
        steps["lookahead_s"] = [math.nan] * len(steps["lookahead_s"])
    return replace(record, steps=steps)


def _joined(records: Sequence[RunRecord]) -> tuple[dict[str, list[Any]], Places, Places]:
    """Rows of all runs as one table; steps are renumbered so that they stay apart."""
    steps: dict[str, list[Any]] = {}
    demand: Places = Counter()
    prefetch: Places = Counter()
    first = 0
    for record in records:
        for name, values in record.steps.items():
            shifted = [v + first for v in values] if name == "step" else list(values)
            steps.setdefault(name, []).extend(shifted)
        run_demand, run_prefetch = loads_by_event(record.log)
        demand.update({(step + first, layer): n for (step, layer), n in run_demand.items()})
        prefetch.update({(step + first, layer): n for (step, layer), n in run_prefetch.items()})
        first += max(record.steps["step"]) + 1
    return steps, demand, prefetch


def loads_by_event(log: Sequence[Entry]) -> tuple[Places, Places]:
    """Demand loads and prefetches asked for by each (step, layer) event."""
    demand: Places = Counter()
    prefetch: Places = Counter()
    event = (-1, -1)
    for entry in log:
        if entry.kind == "event":
            event = (entry.step, entry.layer)
        elif entry.kind == "load" and entry.detail == "demand":
            demand[event] += 1
        elif entry.kind == "load" and entry.detail == "prefetch":
            prefetch[event] += 1
    return demand, prefetch


def _link_seconds(
    steps: dict[str, list[Any]], demand: Places, prefetch: Places
) -> tuple[float, float]:
    """Seconds per copy and per wait, from the stalls of events that had the link to themselves."""
    loads: list[int] = []
    stalls: list[float] = []
    rows = zip(steps["step"], steps["layer"], steps["waves"], steps["stall_s"], strict=True)
    for step, layer, waves, stall in rows:
        place = (step, layer)
        is_alone = not prefetch[place] and not prefetch[(step, layer - 1)]
        if layer != WHOLE_STEP and waves == 1 and demand[place] and is_alone:
            loads.append(demand[place])
            stalls.append(stall)
    if not loads:
        return 0.0, 0.0
    x, y = np.asarray(loads, dtype=np.float64), np.asarray(stalls)
    y = np.minimum(y, 5 * np.median(y / x) * x)
    if np.ptp(x) == 0:
        return float(y.mean() / x[0]), 0.0
    # Weighted, so that the few long waits of a prefill do not drown the many short ones of decode.
    slope, base = np.polyfit(x, y, 1, w=1 / np.sqrt(x))
    if slope <= 0 or base < 0:
        return float(y.sum() / x.sum()), 0.0
    return float(slope), float(base)

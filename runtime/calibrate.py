"""Measures this process, now: a cost model from short runs of the runtime itself.

A shared machine drifts by tens of percent within minutes, so `verify` calibrates right before it predicts, on
other prompts, sizes and policies than those it will be judged on. `expertflow-trace calibrate` keeps one
such model as a file, for forecasts from a trace.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..simulator.account import RunRecord
from ..simulator.activations import ONE_CALL, wave_rows
from ..simulator.costs import CostModel, Linear, as_one_walk, fit_costs
from ..simulator.own_costs import OwnCosts
from ..simulator.paths import PathCosts
from ..simulator.policy.registry import predictors
from ..simulator.policy.spec import IN_ORDER, PolicySpec, make_spec
from ..simulator.result import MemoryResult
from ..tracer.copies import CHUNK_BYTES
from ..tracer.generate import Prompt
from ..tracer.kernels import measure_group_s
from ..tracer.memory import measure_memory, spread_by_size
from ..tracer.prompts import batches
from ..tracer.schema import WHOLE_STEP
from ..tracer.types import LinkCurve, LinkProfile, MemoryPoint, ModelShape
from .cpu_times import cpu_spec, fit_cpu_expert
from .kv_rows import measure_kv_move
from .loads import Places, loads_by_event
from .machine import Machine, device_name, generate_all, predictor_bytes
from .own_costs import own_costs
from .paths.latency import measure_latency

_MEMORY_SIZES = 3
_ODD_SHARE = 0.44


class Calibration:
    """Short runs of a machine on some prompts, and the cost model they give.

    Peaks of working tensors do not drift, so they are measured once; times are measured by each `measure`. `slots` are
    the most that its runs may take; None: one for every expert.
    """

    def __init__(
        self,
        machine: Machine,
        prompts: Sequence[Prompt],
        *,
        batch_size: int,
        max_new_tokens: int,
        slots: int | None = None,
    ) -> None:
        self._machine = machine
        # By length, so that batches differ in size and the fit can tell a token from a pass.
        self._prompts = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        shape = machine.loaded.shape
        total = shape.total_experts
        self._most = total if slots is None else min(slots, total)
        demand = calibration_specs(shape, self._most)
        has_gates = all(layer.gate is not None for layer in machine.loaded.layers)
        self.specs = [*demand, *(prefetch_specs(self._most) if has_gates else ())]
        self._memory = self._memory_points(demand)

    def measure(self, advance: Callable[[int], None]) -> CostModel:
        """Run every calibration policy once and fit."""
        machine = self._machine
        shape = machine.loaded.shape
        runs: list[tuple[PolicySpec, RunRecord]] = []
        with machine.always_asking():
            for spec in self.specs:
                runs += [(spec, record) for record in self._runs(spec)]
                advance(1)
        costs = calibrate(
            runs,
            shape=shape,
            group_s=measure_group_s(
                machine.loaded.layers[0],
                machine.blocks.layout,
                shape,
                machine.device,
                machine.loaded.implementation,
            ),
            link_name=machine.link_name,
            memory=self._memory,
            chunk_bytes=CHUNK_BYTES,
        )
        return replace(costs, kv_move=measure_kv_move(shape, machine.device))

    def measure_paths(self, costs: CostModel) -> PathCosts | None:
        """What the machine's path predictor costs beside the model, from two runs; None if it has none."""
        if self._machine.paths is None:
            return None
        model, shape = self._machine.paths, self._machine.loaded.shape
        slots = self._some
        without, asking = (
            self._run(make_spec(slots=slots, predictor=name)) for name in ("none", "path")
        )
        latency = measure_latency(
            model,
            device_name(self._machine.device),
            prompt_tokens=round(np.mean([len(prompt.token_ids) for prompt in self._prompts])),
            most=2 * shape.top_k,
        )
        pass_s = path_seconds(asking, without, costs)
        return PathCosts(pass_s=pass_s, latency=latency, num_bytes=predictor_bytes(model))

    def measure_cpu(self) -> Linear:
        """Seconds of one expert on the CPU by (1, tokens), from a run that computes its misses there.

        With the model, the copies and the hand-over beside it, as in a run that is judged.
        """
        spec = cpu_spec(self._machine.loaded.shape, self._some)
        with self._machine.session(spec) as session:
            generate_all(
                self._machine.loaded,
                self._prompts,
                batch_size=self._batch_size,
                max_new_tokens=self._max_new_tokens,
                observer=session,
            )
            assert session.cpu is not None
            return fit_cpu_expert(session.cpu.work)

    def measure_own(
        self, costs: CostModel, specs: Sequence[PolicySpec], advance: Callable[[int], None]
    ) -> dict[tuple[str, ...], OwnCosts]:
        """What the policies' own code takes, where `costs` cannot know it, by `PolicySpec.code`."""
        asked = {spec.code: spec for spec in specs if has_own_costs(spec)}
        slots = self._some
        found: dict[tuple[str, ...], OwnCosts] = {}
        for code, spec in asked.items():
            runs_beside = bool(spec.needs() & {"paths", "cpu_times"})
            plain = self._walked(make_spec(slots=slots), costs) if runs_beside else None
            found[code] = own_costs(self._walked(spec.with_slots(slots), costs), costs, plain)
            advance(1)
        return found

    def _memory_points(self, specs: Sequence[PolicySpec]) -> tuple[MemoryPoint, ...]:
        """Peaks of working tensors under these policies."""
        sizes = list(batches(self._prompts, self._batch_size))
        return memory_points(self._machine, specs, spread_by_size(sizes, _MEMORY_SIZES))

    @property
    def _some(self) -> int:
        """Slots of runs that compare a policy with plain LRU: an odd share, which nobody asks for."""
        return max(1, round(_ODD_SHARE * self._most))

    def _runs(self, spec: PolicySpec) -> list[RunRecord]:
        """Runs that show what one policy costs."""
        return [self._run(spec)]

    def _walked(self, spec: PolicySpec, costs: CostModel) -> RunRecord:
        return _one_walk(spec, self._run(spec), self._machine.loaded.shape, costs.group_s)

    def _run(self, spec: PolicySpec) -> RunRecord:
        nothing = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)
        record, _ = self._machine.run(
            spec,
            self._prompts,
            batch_size=self._batch_size,
            max_new_tokens=self._max_new_tokens,
            memory=nothing,
        )
        return record


def has_own_costs(spec: PolicySpec) -> bool:
    """Whether a policy does what calibration does not know: predicts other than by the next gate, computes on the CPU.

    Those that need the future cannot be run.
    """
    needs = predictors.get(spec.predictor.name).needs
    is_known = not spec.predicts or (needs == {"lookahead"} and spec.lookahead_depth == 1)
    is_known = is_known and "cpu_times" not in spec.needs()
    return not is_known and "future" not in needs and spec.scheduler == IN_ORDER


def path_seconds(asking: RunRecord, without: RunRecord, costs: CostModel) -> dict[str, float]:
    """Seconds that a path predictor adds to a pass by phase, from runs with and without it.

    What is waited for it at the first layer, or, if that is more, by how much longer the median pass computes: it takes
    cores from the model. What asking for prefetches and their copies cost is taken off: `costs` has it by the load.
    """
    _, prefetches = loads_by_event(asking.log)
    found: dict[str, float] = {}
    for phase in ("prefill", "decode"):
        asked = dict.fromkeys(_busy_seconds(asking, phase), 0)
        for (step, _), count in prefetches.items():
            if step in asked:
                asked[step] += count
        loads = float(np.mean(list(asked.values()) or [0.0]))
        fitted = costs.phase(phase)
        waiting = fitted.lookahead.weights[2] * loads
        beside = waiting + (fitted.mixer.weights[4] + fitted.experts.weights[4]) * loads
        waited = _lookahead_seconds(asking, phase) - waiting
        longer = _median(_busy_seconds(asking, phase)) - _median(_busy_seconds(without, phase))
        found[phase] = max(0.0, waited, longer - beside)
    return found


def _busy_seconds(record: RunRecord, phase: str) -> dict[int, float]:
    """Seconds of each pass of a phase in which nobody waited for an expert."""
    columns = record.steps
    names = ("step", "layer", "phase", "total_s", "stall_s")
    busy: dict[int, float] = {}
    for step, layer, of, total_s, stall_s in zip(*(columns[n] for n in names), strict=True):
        if of == phase:
            busy[step] = busy.get(step, 0.0) + (total_s if layer == WHOLE_STEP else -stall_s)
    return busy


def _lookahead_seconds(record: RunRecord, phase: str) -> float:
    """Mean seconds of a pass that went into predictions."""
    columns = record.steps
    rows = zip(columns["phase"], columns["layer"], columns["lookahead_s"], strict=True)
    seconds = sum(s for of, layer, s in rows if of == phase and layer != WHOLE_STEP)
    return seconds / max(1, len(_busy_seconds(record, phase)))


def _median(seconds: Mapping[int, float]) -> float:
    return float(np.median(list(seconds.values()))) if seconds else 0.0


def calibration_specs(shape: ModelShape, most: int) -> list[PolicySpec]:
    """Runs that between them show every cost of demand loading: all hits, all misses, waves in both phases.

    They take `most` slots and odd shares of them on purpose: nobody asks for those, so no judged run repeats one. With
    fewer slots than experts no run has hits alone, and what such events take is extrapolated.
    """
    # With a slot for every expert, popularity decides nothing; static only loads all of them first.
    even = [[1] * shape.num_experts] * shape.num_moe_layers
    return [
        make_spec(slots=most, cache="static", popularity=even),
        make_spec(slots=max(1, round(0.94 * most)), cache="none"),
        make_spec(slots=max(1, round(0.31 * most)), cache="lru"),
        # The events of a decode pass fit their slots, so without this nobody would know what a second wave costs there.
        make_spec(slots=max(1, round(0.44 * most)), cache="lru", misses="resident_first"),
    ]


def prefetch_specs(most: int) -> list[PolicySpec]:
    """Calibration runs that show the cost of predicting, and of copies beside compute."""
    return [
        make_spec(
            slots=max(1, round(share * most)),
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
                rows = wave_rows(session.log, machine.loaded.shape.num_moe_layers)
            points += [
                replace(point, waves=divided(rows.get(step, ())))
                for step, point in enumerate(found, start=first)
            ]
    return tuple(points)


def divided(rows: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The waves of a pass as its MemoryPoint has them: none if no event was divided."""
    return rows if any(later != ONE_CALL for _, later in rows) else ()


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
    if not spec.predicts:
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


def _link_seconds(
    steps: dict[str, list[Any]], demand: Places, prefetch: Places
) -> tuple[float, float]:
    """Seconds per copy and per wait, from the stalls of events that had the link to themselves.

    Of events in one wave, or, where no event fits its slots, of each wave of those in several.
    """
    found: list[tuple[int, float, float]] = []
    rows = zip(steps["step"], steps["layer"], steps["waves"], steps["stall_s"], strict=True)
    for step, layer, waves, stall in rows:
        place = (step, layer)
        is_alone = not prefetch[place] and not prefetch[(step, layer - 1)]
        if layer != WHOLE_STEP and demand[place] and is_alone:
            found.append((waves, demand[place] / waves, stall / waves))
    found = [row for row in found if row[0] == 1] or found
    if not found:
        return 0.0, 0.0
    _, x, y = np.asarray(found, dtype=np.float64).T
    y = np.minimum(y, 5 * np.median(y / x) * x)
    if np.ptp(x) == 0:
        return float(y.mean() / x[0]), 0.0
    # Weighted, so that the few long waits of a prefill do not drown the many short ones of decode.
    slope, base = np.polyfit(x, y, 1, w=1 / np.sqrt(x))
    if slope <= 0 or base < 0:
        return float(y.sum() / x.sum()), 0.0
    return float(slope), float(base)

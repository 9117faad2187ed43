"""Predicts a run from a trace: workload, machine, policy in; Result out, with its bounds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..tracer.errors import UsageError
from ..tracer.probe import provenance
from ..tracer.quantities import LinkSpec
from ..tracer.store import Trace
from ..tracer.types import ModelShape, Origin, Provenance
from .account import RunContext, RunRecord, summarize
from .costs import NO_TRAFFIC, CostModel, as_one_walk, fit_costs
from .engine import simulate
from .machine import MachineFile
from .policy.base import Signals
from .policy.future import Future
from .policy.spec import PolicySpec, check_shape, make_spec
from .result import Bounds, Result
from .workload import Workload, workload_of

_TIMED_EVENTS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecaster:
    """Predicts policies on one workload and one machine.

    `decision_is_measured` says that the rows behind `costs` hold the policy's time already; otherwise each
    policy's own code is timed here, on this machine, before it is charged.
    """

    workload: Workload
    costs: CostModel
    shape: ModelShape
    trace_id: str
    device: str
    link: str
    link_origin: Origin
    submit_s: float
    decision_is_measured: bool = False
    provenance: Provenance
    warnings: tuple[str, ...] = ()

    def predict(self, spec: PolicySpec, *, with_bounds: bool = True) -> Result:
        """Predict one policy. Raises UsageError if the trace lacks what the policy needs."""
        self.require(spec)
        costs = self._charged(spec)
        record = simulate(self.workload, spec, self.shape, costs)
        result = summarize(record, self._context(spec))
        if not with_bounds:
            return result
        return replace(result, bounds=self.bounds(spec, result))

    def record(self, spec: PolicySpec) -> RunRecord:
        """The raw rows of a prediction, decision log included."""
        self.require(spec)
        return simulate(self.workload, spec, self.shape, self._charged(spec))

    def bounds(self, spec: PolicySpec, result: Result) -> Bounds:
        """What no policy of this size can beat under the same costs."""
        belady_spec = make_spec(slots=spec.slots, cache="belady", allocation=spec.allocation.name)
        belady = summarize(
            simulate(self.workload, belady_spec, self.shape, self.costs), self._context(belady_spec)
        )
        compute_s = self.compute_s()
        tokens = result.tokens_per_s * result.time.total_s
        misses = belady.prefill.misses + belady.decode.misses
        link_s = max(compute_s, misses * self.costs.copy_s)
        best = tokens / link_s if link_s else 0.0
        return Bounds(
            all_resident_tokens_per_s=tokens / compute_s if compute_s else 0.0,
            belady_tokens_per_s=belady.tokens_per_s,
            link_tokens_per_s=best,
            belady_hit_rate=belady.hit_rate,
            share_of_best=result.tokens_per_s / best if best else 0.0,
        )

    def compute_s(self) -> float:
        """Seconds of the whole workload with every expert resident and no policy at work."""
        costs, total = self.costs, 0.0
        for step in self.workload.steps:
            total += costs.head_s(step.phase, step.batch, step.tokens)
            total += len(step.events) * costs.mixer_s(
                step.phase, step.tokens, step.context, NO_TRAFFIC
            )
            for event in step.events:
                total += costs.experts_s(
                    step.phase,
                    step.tokens,
                    len(event.experts),
                    NO_TRAFFIC,
                    1,
                    self.shape.num_experts,
                )
        return total

    def require(self, spec: PolicySpec) -> None:
        """Raise UsageError if the trace did not record what a policy needs."""
        depth = spec.lookahead_depth
        if self.workload.lookahead < depth:
            raise UsageError(
                f"predictor {spec.predictor.name!r} needs look-ahead ids to depth {depth}, but the trace "
                f"recorded {self.workload.lookahead}. Trace again with --lookahead {depth}."
            )

    def _charged(self, spec: PolicySpec) -> CostModel:
        if self.decision_is_measured:
            return self.costs
        return self.costs.with_policy_costs(
            measure_decision_s(self.workload, spec, self.shape), self.submit_s
        )

    def _context(self, spec: PolicySpec) -> RunContext:
        return RunContext(
            source="predicted",
            spec=spec,
            shape=self.shape,
            trace_id=self.trace_id,
            device=self.device,
            link=self.link,
            link_origin=self.link_origin,
            batch_size=self.workload.batch_size,
            provenance=self.provenance,
            warnings=self.warnings,
        )


def forecaster(
    trace: Trace,
    *,
    link: LinkSpec | None = None,
    machine: MachineFile | None = None,
    seed: int = 0,
) -> Forecaster:
    """Prepare predictions from a trace: on its own machine, a calibrated one, or behind a declared link.

    Raises PolicyError if the calibrated machine ran another model.
    """
    workload = workload_of(trace)
    profile = trace.hardware.link
    device = f"{trace.hardware.name} ({trace.hardware.device})"
    name, origin = profile.name, profile.origin
    if machine is None:
        costs = costs_of(trace)
    else:
        check_shape(machine.shape, trace.shape)
        costs, device = machine.costs, machine.device
        name, origin = machine.link, machine.link_origin
    if link is not None:
        costs, name, origin = costs.with_link(link), link.text, "declared"
    return Forecaster(
        workload=workload,
        costs=costs,
        shape=trace.shape,
        trace_id=trace.manifest.trace_id,
        device=device,
        link=name,
        link_origin=origin,
        submit_s=profile.submit_s,
        decision_is_measured=machine is not None,
        provenance=provenance(seed, trace.manifest.provenance.text),
        warnings=trace.manifest.warnings,
    )


def costs_of(trace: Trace) -> CostModel:
    """The machine a trace was recorded on."""
    steps = trace.table("steps").to_pydict()
    group_s = trace.hardware.group_s
    if slots := trace.manifest.run.extra.get("slots"):
        pools = dict.fromkeys(range(trace.shape.num_moe_layers), int(slots))
        steps = as_one_walk(steps, pools, group_s, trace.shape.num_experts)
    loads: Counter[tuple[int, int]] = Counter()
    if trace.manifest.rows("transfers"):
        moved = trace.table("transfers", columns=["step", "layer", "why"]).to_pydict()
        loads.update(
            (step, layer)
            for step, layer, why in zip(moved["step"], moved["layer"], moved["why"], strict=True)
            if why == "demand"
        )
    return fit_costs(
        steps,
        loads,
        {},
        link=trace.hardware.link,
        shape=trace.shape,
        pinned=trace.hardware.device.startswith("cuda"),
        group_s=group_s,
        memory=trace.manifest.memory,
    )


def measure_decision_s(workload: Workload, spec: PolicySpec, shape: ModelShape) -> float:
    """Time a policy's own code on the first events: mean seconds per event on this machine."""
    future = Future(workload.events()) if "future" in spec.needs() else None
    core = spec.build(shape, future=future)
    core.warm()
    depth = spec.lookahead_depth
    events = [(step.step, event) for step in workload.steps for event in step.events]
    seconds: list[float] = []
    for step, event in events[:_TIMED_EVENTS]:
        groups = {d: ids for d, ids in event.lookahead.items() if d <= depth}
        began = time.perf_counter()
        core.demand(step, event.layer, event.experts)
        loads = core.predict(step, event.layer, Signals(groups))
        core.release(step, event.layer)
        for load in loads:
            core.loaded(step, load.key)
        seconds.append(time.perf_counter() - began)
    return _trimmed_mean(seconds)


def _trimmed_mean(seconds: Sequence[float]) -> float:
    ordered = sorted(seconds)
    kept = ordered[: max(1, int(0.95 * len(ordered)))]
    return sum(kept) / len(kept) if kept else 0.0

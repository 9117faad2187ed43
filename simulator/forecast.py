"""Predicts a run from a trace: workload, machine, policy in; Result out, with its bounds."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..tracer.errors import UsageError
from ..tracer.probe import provenance
from ..tracer.quantities import LinkSpec
from ..tracer.store import Trace
from ..tracer.types import ModelShape, Origin, Provenance
from .account import RunContext, RunRecord, summarize
from .accuracy import taped_accuracy
from .bounds import clairvoyant
from .costs import CostModel, as_one_walk, fit_costs
from .engine import simulate
from .engines import engine_for, run
from .layer_times import layer_times
from .lessons import has_token_ids
from .machine import MachineFile
from .own_costs import OwnCosts
from .paths import PathCosts
from .policy.future import Future
from .policy.registry import misses, predictors
from .policy.spec import Member, PolicySpec, check_shape
from .regroup import asks_paths, charged, in_units, notes_on, require_arrivals, with_kv_move
from .reroute import measure_routing_s, rerouted, rerouted_source, routing_result
from .result import Accuracy, Bounds, PrefetchWorth, RegroupingResult, Result
from .serving import Serving
from .source import Source
from .workload import Workload, workload_of
from .worth import worth_of

_TIMED_EVENTS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecaster:
    """Predicts policies on one workload and one machine.

    `decision_is_measured` says that the rows behind `costs` hold the policy's time already; otherwise each
    policy's own code is timed here, on this machine, before it is charged; once for each set of members, so that
    predictions differ by the policies and not by the minute (`decisions_s`). `is_declared` says that nobody
    measured this machine. `path_costs` is the path predictor's own time, charged to policies that use it, and
    `own_costs`, by `PolicySpec.code`, all that was measured in a run of a policy itself, in place of anything else.
    `regrouping` is what became of the recorded batches if `workload` is a regrouped one.
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
    is_declared: bool = False
    provenance: Provenance
    warnings: tuple[str, ...] = ()
    decisions_s: dict[tuple[str, ...], float] = field(default_factory=dict, compare=False)
    path_costs: PathCosts | None = None
    own_costs: Mapping[tuple[str, ...], OwnCosts] = field(default_factory=dict)
    regrouping: RegroupingResult | None = None

    def predict(
        self, spec: PolicySpec, *, with_bounds: bool = True, serving: Serving | None = None
    ) -> Result:
        """Predict one policy, on the recorded batches or on requests as they arrive.

        Raises UsageError if the trace or the machine lacks what the policy needs.
        """
        self.require(spec)
        if serving is None and (units := self.in_units(spec)) is not self:
            return units.predict(spec, with_bounds=with_bounds)
        source: Workload | Source = self.workload
        context = self._context(spec)
        if serving is not None:
            require_arrivals(spec)
            # A closed loop does not depend on the clock: its batches are known ahead, bounds and all.
            source = serving.closed_workload() if serving.is_closed else serving
            context = replace(
                context,
                batch_size=serving.settings.max_batch,
                warnings=(*self.warnings, *serving.warnings),
            )
        source = rerouted_source(source, spec.routing)
        totals, engine = run(source, spec, self.shape, self._charged(spec))
        if self.path_costs is not None and "paths" in spec.needs():
            memory = replace(totals.memory, predictor=self.path_costs.num_bytes)
            totals = replace(totals, memory=memory)
        if serving is not None and serving.is_closed:
            serving.retime(totals.steps.total_s)
        served = serving.result() if serving is not None else None
        result = replace(
            summarize(totals, context, arrivals=served),
            engine=engine,
            routing=routing_result(source),
            regrouping=self.regrouping,
        )
        if not with_bounds or not isinstance(source, Workload):
            return result
        ready = replace(self, workload=source)
        return replace(
            result,
            bounds=ready.bounds(spec, result),
            worth=ready.worth(spec, result),
            accuracy=result.accuracy or ready.accuracy(spec),
        )

    def accuracy(self, spec: PolicySpec) -> Accuracy | None:
        """Recall and precision of a policy's predictor; None without one, or where only a run's log can tell."""
        if not spec.predicts or engine_for(spec) != "compiled":
            return None
        from .compiled.tapes import tape_of

        return taped_accuracy(self.workload, *tape_of(self.workload, spec))

    def worth(self, spec: PolicySpec, result: Result) -> PrefetchWorth | None:
        """What the predictor of a policy is worth; None if there is none, or if it is perfect already."""
        if not spec.predicts or spec.predictor.name == "oracle":
            return None
        horizon = max(1, int(spec.predictor.params.get("horizon", spec.lookahead_depth or 1)))
        without, perfect = (
            self.predict(replace(spec, predictor=predictor), with_bounds=False)
            for predictor in (
                Member(name="none"),
                Member(name="oracle", params={"horizon": horizon}),
            )
        )
        return worth_of(result, without, perfect)

    def charging(self, spec: PolicySpec) -> Forecaster:
        """Predictions that charge every policy the decision time of `spec`, so that they differ by what is decided."""
        costs = self._with_decisions(spec)
        return replace(self, costs=costs, decision_is_measured=True)

    def in_units(self, spec: PolicySpec) -> Forecaster:
        """Predictions of the batches that the policy's scheduler makes of those recorded; itself if it makes none."""
        units = None if self.regrouping is not None else in_units(self.workload, spec)
        if units is None:
            return self
        latency = self.path_costs.latency if self.path_costs and "paths" in spec.needs() else None
        workload, result = charged(
            units,
            with_kv_move(self.costs, self.shape),
            self.shape,
            latency.unit_s if latency else None,
        )
        notes = notes_on(self.costs, is_declared=self.is_declared)
        return replace(
            self, workload=workload, regrouping=result, warnings=(*self.warnings, *notes)
        )

    def record(self, spec: PolicySpec) -> RunRecord:
        """The raw rows of a prediction, decision log included (by the reference engine)."""
        self.require(spec)
        if (units := self.in_units(spec)) is not self:
            return units.record(spec)
        workload = rerouted(self.workload, spec.routing)
        return simulate(workload, spec, self.shape, self._charged(spec))

    def bounds(self, spec: PolicySpec, result: Result) -> Bounds:
        """What no policy of this size can beat under the same costs."""
        if (units := self.in_units(spec)) is not self:
            return units.bounds(spec, result)
        belady_spec = clairvoyant(spec)
        ready = replace(self, workload=rerouted(self.workload, spec.routing))
        belady, _ = run(ready.workload, belady_spec, self.shape, self.costs)
        bound = summarize(belady, self._context(belady_spec))
        compute_s = ready.compute_s()
        tokens = result.tokens_per_s * result.time.total_s
        misses = bound.prefill.misses + bound.decode.misses
        link_s = max(compute_s, misses * self.costs.copy_s)
        best = tokens / link_s if link_s else 0.0
        return Bounds(
            all_resident_tokens_per_s=tokens / compute_s if compute_s else 0.0,
            belady_tokens_per_s=bound.tokens_per_s,
            link_tokens_per_s=best,
            belady_hit_rate=bound.hit_rate,
            share_of_best=result.tokens_per_s / best if best else 0.0,
        )

    def compute_s(self) -> float:
        """Seconds of the whole workload with every expert resident and no policy at work."""
        steps, total = self.workload.steps, 0.0
        sizes = np.diff(self.workload.ptr)
        step_of = np.repeat(np.arange(len(steps)), np.diff(self.workload.event_ptr))
        for name in ("prefill", "decode"):
            phase = self.costs.phase(name)
            is_phase = steps.is_decode == (name == "decode")
            batch, tokens = steps.batch[is_phase], steps.tokens[is_phase]
            head = [np.ones(len(batch)), batch, tokens]
            total += float(np.asarray(phase.head.weights) @ np.sum(head, axis=1))
            events = is_phase[step_of]
            tokens, context = steps.tokens[step_of[events]], steps.context[step_of[events]]
            one, none = np.ones(len(tokens)), np.zeros(len(tokens))
            mixer = [one, tokens, tokens * context, none, none]
            total += float(np.asarray(phase.mixer.weights) @ np.sum(mixer, axis=1))
            experts = np.stack([one, tokens, sizes[events], none, none, none])
            total += float(np.maximum(0.0, np.asarray(phase.experts.weights) @ experts).sum())
        return total

    def times(self) -> dict[str, dict[str, float] | None]:
        """What members may be taught of the machine, by need; None for what it does not know."""
        return {
            "cpu_times": self.costs.cpu_times(),
            "layer_times": layer_times(self.costs, self.workload),
        }

    def require(self, spec: PolicySpec) -> None:
        """Raise UsageError if the trace did not record what a policy needs."""
        depth = spec.lookahead_depth
        if self.workload.lookahead < depth:
            raise UsageError(
                f"predictor {spec.predictor.name!r} needs look-ahead ids to depth {depth}, but the trace "
                f"recorded {self.workload.lookahead}. Trace again with --lookahead {depth}."
            )
        if "layer_times" in spec.needs() and layer_times(self.costs, self.workload) is None:
            raise UsageError(
                f"predictor {spec.predictor.name!r} weighs the time of a copy against that of a layer, but on this "
                "machine they take none."
            )
        if "gate_weights" in spec.needs() and self.workload.weights is None:
            raise UsageError(
                f"{spec.label} needs gate weights, but the trace did not record them. "
                "Trace again with --weights."
            )
        if "token_table" in spec.needs() and not has_token_ids(self.workload):
            raise UsageError(
                f"predictor {spec.predictor.name!r} needs token ids, but the trace did not record them."
            )
        if "paths" in spec.needs() and self.workload.rows.path is None:
            raise UsageError(
                f"{asks_paths(spec)} needs predicted paths: the folder of a trained path predictor "
                "(--paths DIR, made with `expertflow-trace train-predictor TRACE --out DIR`), and the batches of a "
                "recorded trace (--arrivals regroups them)."
            )
        if "cpu_times" in spec.needs() and not self.costs.has_cpu:
            raise UsageError(
                f"misses {spec.misses.name!r} needs the time of an expert on the CPU, which nobody measured "
                "or declared for this machine. Use --misses load, calibrate with --cpu-experts, or declare it with "
                "--cpu-expert."
            )

    def _charged(self, spec: PolicySpec) -> CostModel:
        costs = self._with_decisions(spec)
        if spec.may_settle(self.shape.total_experts):
            costs = costs.without_decisions()
        if spec.reroutes and not self.is_declared:
            costs = costs.with_routing(*self._routing_s(spec))
        if (own := self.own_costs.get(spec.code)) is not None:
            return own.charged(costs)
        if self.path_costs is not None and "paths" in predictors.get(spec.predictor.name).needs:
            # In units it is asked once before the turns, and charged there.
            asked = self.path_costs if self.regrouping is None else self.path_costs.of_prompts()
            return asked.charged(costs, self._predictor_s(spec))
        if not spec.predicts:
            return costs
        latency_s = float(spec.predictor.params.get("latency_s", 0.0)) + self._predictor_s(spec)
        return costs.with_predictor_latency(latency_s, has_gates="lookahead" in spec.needs())

    def _routing_s(self, spec: PolicySpec) -> tuple[float, float]:
        """The routing's own time by event of each phase, which no machine was measured with."""
        names = [("routing", str(spec.routing), phase) for phase in ("prefill", "decode")]
        if names[0] not in self.decisions_s:
            measured = measure_routing_s(self.workload, spec.routing)
            self.decisions_s.update(zip(names, measured, strict=True))
        prefill_s, decode_s = (self.decisions_s[name] for name in names)
        return prefill_s, decode_s

    def _predictor_s(self, spec: PolicySpec) -> float:
        """The predictor's own time by event, where the rows behind `costs` do not hold it.

        Those of a calibrated machine were measured with gates applied early, and votes counted; others are timed here.
        On a declared machine no decision is charged. Predictors that know the future take what they declare.
        """
        needs = predictors.get(spec.predictor.name).needs
        if (
            not self.decision_is_measured
            or self.is_declared
            or "future" in needs
            or needs == {"lookahead"}
        ):
            return 0.0
        name = ("predictor", str(spec.predictor))
        if name not in self.decisions_s:
            self.decisions_s[name] = measure_predictor_s(self.workload, spec)
        return self.decisions_s[name]

    def _with_decisions(self, spec: PolicySpec) -> CostModel:
        if self.decision_is_measured:
            return self.costs
        if spec.code not in self.decisions_s:
            self.decisions_s[spec.code] = measure_decision_s(self.workload, spec, self.shape)
        return self.costs.with_policy_costs(self.decisions_s[spec.code], self.submit_s)

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
            warnings=(*self.warnings, *self._warnings(spec)),
        )

    def _warnings(self, spec: PolicySpec) -> tuple[str, ...]:
        if not getattr(misses.get(spec.misses.name), "residents_first", False):
            return ()
        if self.costs.has_waves:
            return ()
        return (
            f"misses {spec.misses.name!r} computes most events in two waves; what the second costs in decode passes "
            "was not measured on this machine, so the speed is optimistic. Calibrate it anew.",
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
    if machine is None and not trace.has_times:
        raise UsageError(
            f"{trace.path} was imported without times, so there is nothing to predict speed from. Declare a "
            "machine with --gpu (and --link), or pass a calibrated one with --machine."
        )
    workload = workload_of(trace)
    profile = trace.hardware.link
    device = f"{trace.hardware.name} ({trace.hardware.device})"
    name, origin = profile.name, profile.origin
    notes: tuple[str, ...] = ()
    if machine is None:
        costs = costs_of(trace)
    else:
        check_shape(machine.shape, trace.shape)
        costs, device = machine.costs, machine.device
        name, origin = machine.link, machine.link_origin
        notes = machine.provenance.notes
    if link is not None:
        costs, name, origin = costs.with_link(link), link.text, link.origin
        notes = (*notes, link.note) if link.note else notes
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
        is_declared=machine is not None and machine.is_declared,
        provenance=provenance(seed, trace.manifest.provenance.text),
        warnings=(*trace.manifest.warnings, *notes),
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
    seconds: list[float] = []
    for step, number in itertools.islice(workload.walk(), _TIMED_EVENTS):
        event = workload.event(number, is_prefill=step.phase == "prefill")
        signals = workload.signals(number, spec.lookahead_depth, routed=spec.reads_routing)
        began = time.perf_counter()
        core.demand(step.step, event.layer, event.experts, event.facts)
        loads = core.predict(step.step, event.layer, signals)
        core.release(step.step, event.layer)
        for load in loads:
            core.loaded(step.step, load.key)
        seconds.append(time.perf_counter() - began)
    return _trimmed_mean(seconds)


def measure_predictor_s(workload: Workload, spec: PolicySpec) -> float:
    """Time a predictor's own code on the first events: mean seconds per event on this machine."""
    predictor = predictors.build(spec.predictor.name, dict(spec.predictor.params))
    seconds: list[float] = []
    for _, number in itertools.islice(workload.walk(), _TIMED_EVENTS):
        signals = workload.signals(number, spec.lookahead_depth, routed=spec.reads_routing)
        began = time.perf_counter()
        predictor.predict(int(workload.layer[number]), signals)
        seconds.append(time.perf_counter() - began)
    return _trimmed_mean(seconds)


def _trimmed_mean(seconds: Sequence[float]) -> float:
    ordered = sorted(seconds)
    kept = ordered[: max(1, int(0.95 * len(ordered)))]
    return sum(kept) / len(kept) if kept else 0.0

"""Seconds, from a machine's own measurements: the time model of a replay.

Every coefficient is fitted to rows that were measured (a trace's `steps`, or the runtime's own in `verify`),
on the physical scale. Nothing is a constant of ours; what was not measured is zero and said so in
`CostModel.notes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..tracer.quantities import LinkSpec
from ..tracer.schema import WHOLE_STEP
from ..tracer.types import LinkProfile, MemoryPoint, ModelShape, Phase
from .activations import Activations, fit_activations
from .least_squares import non_negative

_OUTLIER = 5.0
"""Rows this many times above their phase's median are clipped: one preemption is not a trend."""


class Traffic(NamedTuple):
    """Loads that one event asked for."""

    demand: int
    prefetch: int


NO_TRAFFIC = Traffic(0, 0)


@dataclass(frozen=True, slots=True)
class Linear:
    """A fitted cost: the dot product of non-negative weights and features, in seconds."""

    weights: tuple[float, ...]
    residual: float = 0.0
    """Median relative error over the rows it was fitted to."""

    def __call__(self, *features: float) -> float:
        """Seconds for these features."""
        # Added from left to right, as the compiled engine does: `sum` compensates from Python 3.12 on.
        seconds = 0.0
        for weight, feature in zip(self.weights, features, strict=True):
            seconds += weight * feature
        return seconds

    def scaled(self, factor: float) -> Linear:
        """So many times the seconds."""
        return replace(self, weights=tuple(weight * factor for weight in self.weights))


NOT_MEASURED = Linear((0.0, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseCosts:
    """Costs of one phase. Features are given at each use in CostModel."""

    mixer: Linear
    experts: Linear
    head: Linear
    decision: Linear
    readback_s: float
    lookahead: Linear
    pass_lookahead_s: float = 0.0
    """What predicting adds to the first layer of a pass: predictors that are asked once for all layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """The machine of a replay.

    Expert times are fitted for one walk over the model's own number of experts; `group_s` is what each
    slot more (or less) in a pool adds. `copy_s` and `wake_s` describe the link as the engine sees it:
    seconds per copy of one expert, and per wait. `memory` are measured peaks of working tensors; per token,
    `gathered_bytes_per_token` is the size of the tensor in which waves gather their rows, `state_bytes` that of a
    hidden state, `layer_kv_bytes` the KV cache from one MoE layer to the next. `cpu_expert` is the
    time of one expert on the CPU by (1, tokens); all zero if nobody measured or declared it. So is `kv_move`, of
    copying keys and values on the device, by (rows, bytes).
    """

    prefill: PhaseCosts
    decode: PhaseCosts
    expert_bytes: int
    copy_s: float
    busy_copy_s: float
    wake_s: float
    chunk_bytes: int
    num_experts: int
    group_s: float = 0.0
    gathered_bytes_per_token: int = 0
    state_bytes: int = 0
    layer_kv_bytes: float = 0.0
    memory: tuple[MemoryPoint, ...] = ()
    cpu_expert: Linear = NOT_MEASURED
    kv_move: Linear = NOT_MEASURED

    def phase(self, phase: Phase) -> PhaseCosts:
        """The costs of a phase."""
        return self.prefill if phase == "prefill" else self.decode

    def mixer_s(self, phase: Phase, tokens: int, context: int, traffic: Traffic) -> float:
        """Attention, norms and router of one layer; `traffic` is that of the event before."""
        return self.phase(phase).mixer(1, tokens, tokens * context, *traffic)

    def experts_s(
        self,
        phase: Phase,
        tokens: int,
        distinct: int,
        traffic: Traffic,
        waves: int,
        groups: int,
    ) -> float:
        """One layer's expert computation.

        `traffic` is the event's own: demand loads leave cold weights, prefetches take turns with compute.
        `groups` is the size of the layer's pool, which the kernel walks once per wave.
        """
        fitted = self.phase(phase).experts(1, tokens, distinct, *traffic, waves - 1)
        return max(0.0, fitted + self.group_s * (waves * groups - self.num_experts))

    def head_s(self, phase: Phase, batch: int, tokens: int) -> float:
        """Everything of a forward pass outside its layers."""
        return self.phase(phase).head(1, batch, tokens)

    def decision_s(self, phase: Phase, distinct: int, loads: int) -> float:
        """The policy's and the copy queue's own time for one event."""
        return self.phase(phase).decision(1, distinct, loads)

    def lookahead_s(
        self, phase: Phase, tokens: int, loads: int, *, is_first: bool = False
    ) -> float:
        """Computing predictions and asking for `loads` prefetches; `is_first` of a pass."""
        costs = self.phase(phase)
        seconds = costs.lookahead(1, tokens, loads)
        return seconds + costs.pass_lookahead_s if is_first else seconds

    @property
    def chunks(self) -> int:
        """Pieces in which one expert is copied; a demand copy can go between two of them."""
        return max(1, -(-self.expert_bytes // self.chunk_bytes))

    @property
    def has_cpu(self) -> bool:
        """Whether the time of an expert on the CPU is known."""
        return any(self.cpu_expert.weights)

    @property
    def has_waves(self) -> bool:
        """Whether it is known what one more wave costs in a decode pass."""
        return self.decode.experts.weights[5] > 0.0

    def cpu_times(self) -> dict[str, float] | None:
        """What members that compute misses on the CPU need to know; None if it is not known."""
        if not self.has_cpu:
            return None
        expert_s, token_s = self.cpu_expert.weights
        return {"copy_s": self.copy_s, "expert_s": expert_s, "token_s": token_s}

    def activations(self, phase: Phase) -> Activations:
        """Peaks of working tensors in passes of a phase, from the measured points."""
        return fit_activations(
            self.memory,
            phase,
            partial=self.gathered_bytes_per_token,
            state=self.state_bytes,
            layer_kv=self.layer_kv_bytes,
        )

    def with_link(self, link: LinkSpec) -> CostModel:
        """The same machine behind another link."""
        copy_s = link.copy_s(self.expert_bytes)
        return replace(self, copy_s=copy_s, busy_copy_s=copy_s * link.busy_factor)

    def with_predictor_latency(self, latency_s: float, *, has_gates: bool = False) -> CostModel:
        """Charge a predictor's time for every event: beside gates applied early, or in place of them.

        Asking for prefetches costs what it did.
        """

        def charged(costs: PhaseCosts) -> PhaseCosts:
            event_s, token_s, load_s = costs.lookahead.weights
            gates = (event_s, token_s) if has_gates else (0.0, 0.0)
            weights = (gates[0] + latency_s, gates[1], load_s)
            return replace(costs, lookahead=replace(costs.lookahead, weights=weights))

        return replace(self, prefill=charged(self.prefill), decode=charged(self.decode))

    def with_routing(self, prefill_s: float, decode_s: float) -> CostModel:
        """Charge a routing's own time for every event of a phase."""

        def charged(costs: PhaseCosts, event_s: float) -> PhaseCosts:
            own_s, *others = costs.decision.weights
            return replace(costs, decision=Linear((own_s + event_s, *others)))

        return replace(
            self,
            prefill=charged(self.prefill, prefill_s),
            decode=charged(self.decode, decode_s),
        )

    def scaled(self, *, link: float = 1.0, compute: float = 1.0) -> CostModel:
        """The same machine with every copy, or all computation, so many times as slow."""

        def slower(costs: PhaseCosts) -> PhaseCosts:
            return replace(
                costs,
                mixer=costs.mixer.scaled(compute),
                experts=costs.experts.scaled(compute),
                head=costs.head.scaled(compute),
            )

        return replace(
            self,
            prefill=slower(self.prefill),
            decode=slower(self.decode),
            group_s=self.group_s * compute,
            copy_s=self.copy_s * link,
            busy_copy_s=self.busy_copy_s * link,
        )

    def without_decisions(self) -> CostModel:
        """Charge no decision but that of asking for a load: every other event finds all it needs for good."""

        def charged(costs: PhaseCosts) -> PhaseCosts:
            return replace(costs, decision=Linear((0.0, 0.0, costs.decision.weights[2])))

        return replace(self, prefill=charged(self.prefill), decode=charged(self.decode))

    def with_policy_costs(self, decision_s: float, submit_s: float) -> CostModel:
        """Charge a policy's measured time where the rows were recorded without one."""

        def charged(costs: PhaseCosts) -> PhaseCosts:
            if any(costs.decision.weights):
                return costs
            return replace(costs, decision=Linear((decision_s, 0.0, submit_s)))

        return replace(self, prefill=charged(self.prefill), decode=charged(self.decode))


def free_machine(shape: ModelShape) -> CostModel:
    """A machine on which everything takes no time: for questions that only ask who hits."""
    nothing = Linear((0.0, 0.0, 0.0))
    phase = PhaseCosts(
        mixer=Linear((0.0,) * 5),
        experts=Linear((0.0,) * 6),
        head=nothing,
        decision=nothing,
        readback_s=0.0,
        lookahead=nothing,
    )
    return CostModel(
        prefill=phase,
        decode=phase,
        expert_bytes=max(1, shape.expert_bytes),
        copy_s=0.0,
        busy_copy_s=0.0,
        wake_s=0.0,
        chunk_bytes=max(1, shape.expert_bytes),
        num_experts=shape.num_experts,
    )


def fit_costs(
    steps: Mapping[str, Sequence[Any]],
    demand_loads: Mapping[tuple[int, int], int],
    prefetch_loads: Mapping[tuple[int, int], int],
    *,
    link: LinkProfile,
    shape: ModelShape,
    pinned: bool,
    group_s: float = 0.0,
    memory: tuple[MemoryPoint, ...] = (),
) -> CostModel:
    """Fit a machine to measured rows.

    `steps` are columns of the steps table, with NaN in `lookahead_s` where no predictor was at work; the
    loads are counted by (step, layer). Link seconds come from the profile's curves at the size of one
    expert.
    """
    rows = _Rows(steps, demand_loads, prefetch_loads)
    size = shape.expert_bytes
    state_bytes = shape.hidden_size * _dtype_bytes(shape.dtype)
    return CostModel(
        prefill=_fit_phase(rows, "prefill"),
        decode=_fit_phase(rows, "decode"),
        expert_bytes=size,
        copy_s=link.curve(pinned=pinned, busy=False).copy_s(size),
        busy_copy_s=link.curve(pinned=pinned, busy=True).copy_s(size),
        wake_s=link.wake_s,
        chunk_bytes=link.chunk_bytes,
        num_experts=shape.num_experts,
        group_s=group_s,
        gathered_bytes_per_token=shape.top_k * state_bytes,
        state_bytes=state_bytes,
        layer_kv_bytes=shape.kv_bytes_per_token / shape.num_moe_layers,
        memory=memory,
    )


def _dtype_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def as_one_walk(
    steps: Mapping[str, Sequence[Any]],
    pool_slots: Mapping[int, int],
    group_s: float,
    num_experts: int,
) -> dict[str, Sequence[Any]]:
    """Rows measured on pools of other sizes, as if each call had walked the model's own experts once.

    `pool_slots` is by layer; rows of whole passes are left as they are, less what their layers lost.
    """
    extra = [
        group_s * (waves * pool_slots[layer] - num_experts) if layer != WHOLE_STEP else 0.0
        for layer, waves in zip(steps["layer"], steps["waves"], strict=True)
    ]
    changed: dict[str, Sequence[Any]] = dict(steps)
    by_step: dict[int, float] = {}
    for step, seconds in zip(steps["step"], extra, strict=True):
        by_step[step] = by_step.get(step, 0.0) + seconds
    changed["experts_s"] = [max(0.0, s - e) for s, e in zip(steps["experts_s"], extra, strict=True)]
    changed["total_s"] = [
        total - (by_step[step] if layer == WHOLE_STEP else e)
        for total, e, step, layer in zip(
            steps["total_s"], extra, steps["step"], steps["layer"], strict=True
        )
    ]
    return changed


class _Rows:
    """The steps table as arrays, with loads joined."""

    def __init__(
        self,
        steps: Mapping[str, Sequence[Any]],
        demand: Mapping[tuple[int, int], int],
        prefetch: Mapping[tuple[int, int], int],
    ) -> None:
        self.columns = {
            name: np.asarray(values, dtype=np.float64)
            for name, values in steps.items()
            if name != "phase"
        }
        self.phase = np.asarray(steps["phase"], dtype=object)
        self.is_whole = self.columns["layer"] == WHOLE_STEP
        places = list(zip(steps["step"], steps["layer"], strict=True))
        self.demand = np.asarray([demand.get(place, 0) for place in places], dtype=np.float64)
        self.prefetch = np.asarray([prefetch.get(place, 0) for place in places], dtype=np.float64)
        # A layer's mixer runs while (or after) the loads of the event before it.
        # Rows of whole passes stand between a pass's last layer and the next one's first.
        is_layer = ~self.is_whole
        self.demand_before = np.zeros(len(places))
        self.demand_before[is_layer] = np.r_[0.0, self.demand[is_layer]][:-1]
        self.prefetch_before = np.zeros(len(places))
        self.prefetch_before[is_layer] = np.r_[0.0, self.prefetch[is_layer]][:-1]

    def layers(self, phase: str) -> np.ndarray:
        return (self.phase == phase) & ~self.is_whole

    def whole(self, phase: str) -> np.ndarray:
        return (self.phase == phase) & self.is_whole

    def head_s(self, phase: str) -> np.ndarray:
        """Whole pass minus its layers."""
        whole = self.whole(phase)
        steps = self.columns["step"][whole].astype(int)
        inside = np.zeros(int(self.columns["step"].max()) + 1)
        layers = self.layers(phase)
        np.add.at(inside, self.columns["step"][layers].astype(int), self.columns["total_s"][layers])
        return np.maximum(0.0, self.columns["total_s"][whole] - inside[steps])


def _fit_phase(rows: _Rows, phase: Phase) -> PhaseCosts:
    layers, whole = rows.layers(phase), rows.whole(phase)
    if not layers.any():
        zero = Linear((0.0,) * 3)
        return PhaseCosts(
            mixer=Linear((0.0,) * 5),
            experts=Linear((0.0,) * 6),
            head=zero,
            decision=zero,
            readback_s=0.0,
            lookahead=zero,
        )
    column = {name: values[layers] for name, values in rows.columns.items()}
    one = np.ones(int(layers.sum()))
    tokens, distinct, loads = column["tokens"], column["distinct"], rows.demand[layers]
    prefetch = rows.prefetch[layers]
    batch, fed = rows.columns["batch"][whole], rows.columns["tokens"][whole]
    return PhaseCosts(
        mixer=_fit(
            [
                one,
                tokens,
                tokens * column["context"],
                rows.demand_before[layers],
                rows.prefetch_before[layers],
            ],
            column["mixer_s"],
        ),
        experts=_fit(
            [one, tokens, distinct, loads, prefetch, column["waves"] - 1], column["experts_s"]
        ),
        head=_fit([np.ones(int(whole.sum())), batch, fed], rows.head_s(phase)),
        decision=_fit([one, distinct, loads], column["decision_s"]),
        readback_s=float(_clipped(column["readback_s"]).mean()),
        lookahead=_fit_where(
            ~np.isnan(column["lookahead_s"]), [one, tokens, prefetch], column["lookahead_s"]
        ),
    )


def _fit(features: Sequence[np.ndarray], seconds: np.ndarray) -> Linear:
    """Least squares with non-negative weights; a feature that never varies folds into the first."""
    target = _clipped(seconds)
    matrix = np.column_stack(features)
    varies = np.ptp(matrix, axis=0) > 0
    varies[0] = True
    weights = np.zeros(matrix.shape[1])
    weights[varies] = non_negative(matrix[:, varies], target)
    fitted = matrix @ weights
    scale = np.median(target)
    residual = float(np.median(np.abs(fitted - target)) / scale) if scale > 0 else 0.0
    return Linear(tuple(weights.tolist()), residual)


def _fit_where(known: np.ndarray, features: Sequence[np.ndarray], seconds: np.ndarray) -> Linear:
    if not known.any():
        return Linear((0.0,) * len(features))
    return _fit([feature[known] for feature in features], seconds[known])


def _clipped(seconds: np.ndarray) -> np.ndarray:
    middle = float(np.median(seconds))
    return np.minimum(seconds, _OUTLIER * middle) if middle > 0 else seconds

"""One replay: predicted from a calibration on other sequences, then run and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...simulator.account import RunRecord
from ...simulator.forecast import Forecaster
from ...simulator.policy.spec import PolicySpec
from ...simulator.result import MemoryResult, Result, VerifiedRun
from ...simulator.workload import Workload
from ...tracer.generate import Generated
from ...tracer.load import LoadedModel, choose_device
from ...tracer.placement import choose_tier, use_threads
from ...tracer.probe import provenance
from ...tracer.quantities import LinkSpec, format_bytes
from ..calibrate import Calibration
from ..forecasts import forecaster_of
from ..room import Room
from ..verdict import Pair, judge
from .build import LABEL, expert_room, replay_dtype, unfilled_model
from .machine import ReplayMachine, replay_notes
from .plan import ReplayPlan, plan_replay, replay_workload
from .room import replay_room
from .routing import TokenRouting, read_routing
from .shapes import shape_config
from .stretch import stretched

Advance = Callable[[int], None]
CALIBRATION_RUNS = 6
"""Short runs behind a forecast, at most; for progress bars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRequest:
    """What to replay: a model by the name or folder of its config, and routing from a trace or another tool's file.

    `memory` is what the device may hold, as text; None: what it has free.
    """

    config: str
    trace: Path | None = None
    routing: Path | None = None
    batch_size: int = 1
    new_tokens: int = 32
    prompt_tokens: int | None = 64
    limit: int | None = 12
    device: str = "auto"
    dtype: str = "auto"
    link: str | None = None
    tier: str = "ram"
    threads: int | None = None
    pin: bool = True
    seed: int = 0
    memory: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a replay gave: measured, and predicted with the checks between them, if that was asked for."""

    measured: Result
    predicted: Result | None = None
    checked: VerifiedRun | None = None


class Replay:
    """A machine under replayed routing, with the prompts it is judged on and others to calibrate on and to learn from.

    `limit` uses the first of the plan's sequences only; `slots` are the most that a calibration may take, None: one for
    every expert.
    """

    def __init__(
        self,
        machine: ReplayMachine,
        *,
        batch_size: int,
        seed: int = 0,
        limit: int | None = None,
        slots: int | None = None,
    ) -> None:
        self.machine = machine
        self._slots = slots
        self.batch_size = batch_size
        self.judged, self.learned = machine.plan.divide(limit)
        self.workload = self._workload(self.judged)
        self._seed = seed

    @property
    def plan(self) -> ReplayPlan:
        """The sequences and their routing."""
        return self.machine.plan

    def lesson(self) -> Workload:
        """Routing to learn popularity and the like from: not that of the judged prompts."""
        return self._workload(self.learned)

    def forecaster(self, advance: Advance) -> tuple[Forecaster, Calibration]:
        """Calibrate this process, and be ready to predict what the judged prompts will take."""
        calibration = Calibration(
            self.machine,
            self.learned,
            batch_size=self.batch_size,
            max_new_tokens=self.plan.new_tokens,
            slots=self._slots,
        )
        return self.ready(calibration, advance), calibration

    def ready(self, calibration: Calibration, advance: Advance) -> Forecaster:
        """Predictions for this process as it is now."""
        notes = replay_notes(self.plan)
        found = forecaster_of(self.machine, self.workload, calibration.measure(advance))
        return replace(
            found,
            device=f"{found.device}, {LABEL}",
            provenance=provenance(self._seed, "own-generation", notes=notes),
            warnings=notes[:1],
        )

    def run(
        self, spec: PolicySpec, memory: MemoryResult | None = None
    ) -> tuple[Result, RunRecord, list[Generated]]:
        """Run the judged prompts under a policy."""
        record, outputs = self.machine.run(
            spec,
            self.judged,
            batch_size=self.batch_size,
            max_new_tokens=self.plan.new_tokens,
            memory=memory,
        )
        result = self.machine.result(record, spec, batch_size=self.batch_size)
        return result, record, outputs

    def _workload(self, prompts: Any) -> Workload:
        return replay_workload(self.plan, prompts, self.batch_size)


def planned(
    loaded: LoadedModel,
    routing: TokenRouting,
    *,
    limit: int | None,
    new_tokens: int,
    prompt_tokens: int | None,
) -> ReplayPlan:
    """Routing stretched to a model's shape, and the sequences to run. Raises UsageError if they are too short."""
    shape = loaded.shape
    fitted = stretched(
        routing, layers=shape.num_moe_layers, experts=shape.num_experts, top_k=shape.top_k
    )
    return plan_replay(
        fitted,
        limit=limit,
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        vocab_size=shape.vocab_size,
    )


def open_replay(
    request: ReplayRequest,
    *,
    say: Callable[[str], None],
    advance: Advance,
    require: Callable[[Room], object] = lambda room: room.require(1),
) -> Replay:
    """Read the routing, make the model, and draw its experts. `advance` counts experts.

    `require` is asked before experts are drawn, whether the run to come has the room it needs; by default for the least
    that any policy takes. Raises ResourceError if not.
    """
    device = choose_device(request.device)
    tier = choose_tier(request.tier)
    use_threads(request.threads, device)
    link = LinkSpec.parse(request.link) if request.link else None
    routing = read_routing(request.trace, request.routing)
    loaded = unfilled(request, device)
    plan = planned(
        loaded,
        routing,
        limit=request.limit,
        new_tokens=request.new_tokens,
        prompt_tokens=request.prompt_tokens,
    )
    say(
        f"{loaded.shape.model_id} on {device}: {loaded.shape.total_experts} experts, "
        f"{format_bytes(expert_room(loaded))}; routing of {routing.source}"
    )
    room = replay_room(
        loaded,
        plan,
        device,
        batch_size=request.batch_size,
        tier=tier,
        memory=request.memory,
    )
    require(room)
    machine = ReplayMachine(
        loaded,
        plan,
        device,
        link=link,
        tier=tier,
        pin=request.pin,
        seed=request.seed,
        advance=advance,
        room=room,
    )
    return Replay(
        machine, batch_size=request.batch_size, seed=request.seed, slots=room.most_slots()
    )


def unfilled(request: ReplayRequest, device: torch.device) -> LoadedModel:
    """The model without weights: its shape is known."""
    name = Path(request.config).name if Path(request.config).exists() else request.config
    config = shape_config(request.config)
    return unfilled_model(config, name=name, dtype=replay_dtype(request.dtype, device))


def replay(
    opened: Replay,
    spec: PolicySpec,
    *,
    predicts: bool,
    advance: Advance,
) -> Replayed:
    """Predict a policy, unless that is not wanted, and run it."""
    predicted: Result | None = None
    if predicts:
        forecaster, _ = opened.forecaster(advance)
        predicted = forecaster.predict(spec)
    measured, _, _ = opened.run(spec)
    advance(1)
    if predicted is None:
        return Replayed(measured=measured)
    # Nothing to compare the text with: nobody else computes with these weights.
    checked = judge(spec.label, [Pair(predicted, measured)], True, {})
    return Replayed(measured=measured, predicted=predicted, checked=checked)

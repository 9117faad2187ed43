"""A model under replayed routing on one device, ready to run under any policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...simulator.account import RunRecord
from ...simulator.policy.registry import predictors
from ...simulator.policy.spec import PolicySpec
from ...simulator.result import ArrivalResult, Result
from ...tracer.blocks import HostBlocks, Tier
from ...tracer.errors import UsageError
from ...tracer.generate import StepTokens
from ...tracer.load import LoadedModel
from ...tracer.quantities import LinkSpec
from ...tracer.timing import StepInfo
from ..machine import Machine
from ..room import Room
from ..session import Session
from .build import LABEL, fill_others, random_blocks
from .live import EarlyChoice, LiveReplay
from .plan import ReplayPlan, has_lookahead
from .room import replay_room

_TOKEN_NEEDS = frozenset({"paths", "token_table"})


class ReplayMachine(Machine):
    """See the module docstring. `loaded` is an unfilled model (build.py), whose experts are drawn here.

    Raises ResourceError before that if no policy could run in its `room`, which is summed up if it has not been.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        plan: ReplayPlan,
        device: torch.device,
        *,
        link: LinkSpec | None = None,
        tier: Tier = "ram",
        pin: bool = True,
        seed: int = 0,
        advance: Callable[[int], None] = lambda _: None,
        room: Room | None = None,
    ) -> None:
        # Drawing takes minutes, and policies come later: one slot is the least that any of them takes.
        (room or replay_room(loaded, plan, device, tier=tier)).require(1)
        blocks = random_blocks(
            loaded,
            device,
            tier=tier,
            pin=pin and device.type == "cuda" and tier == "ram",
            seed=seed,
            advance=advance,
        )
        fill_others(loaded, device, seed)
        if not has_lookahead(plan.routing, 1):  # gates that cannot be asked early, for all who look
            layers = [replace(layer, gate=None) for layer in loaded.layers]
            loaded = replace(loaded, layers=layers)
        super().__init__(
            loaded, device, link=link, tier=tier, trace_id=plan.routing.source, blocks=blocks
        )
        self.plan = plan

    @contextmanager
    def session(self, spec: PolicySpec) -> Iterator[Session]:
        """The model under a policy and the recorded routing, while the context is open. Raises UsageError."""
        session = ReplaySession(
            self.loaded, self.blocks, spec, self.device, link=self.link, plan=self.plan
        )
        try:
            yield session
        finally:
            session.close()

    def result(
        self,
        record: RunRecord,
        spec: PolicySpec,
        *,
        batch_size: int,
        same_tokens: bool | None = None,
        arrivals: ArrivalResult | None = None,
    ) -> Result:
        """Add a run up and check that its log replays; labelled as what it is."""
        found = super().result(
            record, spec, batch_size=batch_size, same_tokens=same_tokens, arrivals=arrivals
        )
        return labelled(found, self.plan)


def labelled(result: Result, plan: ReplayPlan) -> Result:
    """Say of a result, wherever it may be read, that its routing was replayed and its weights are random."""
    notes = replay_notes(plan)
    provenance = replace(result.provenance, notes=(*result.provenance.notes, *notes))
    return replace(
        result,
        device=f"{result.device}, {LABEL}",
        warnings=(*result.warnings, notes[0]),
        provenance=provenance,
    )


def replay_notes(plan: ReplayPlan) -> tuple[str, ...]:
    """What a replay is, and where its routing comes from."""
    return (
        f"Routing replay, random weights: the model chose neither its experts nor its text; routing of "
        f"{plan.routing.source}.",
        *plan.routing.notes,
    )


class ReplaySession(Session):
    """A session that tells the replay which tokens each pass feeds, and answers for the gates."""

    def __init__(
        self,
        loaded: LoadedModel,
        blocks: HostBlocks,
        spec: PolicySpec,
        device: torch.device,
        *,
        link: LinkSpec | None,
        plan: ReplayPlan,
    ) -> None:
        _require_replayable(spec, plan)
        super().__init__(loaded, blocks, spec, device, link=link)
        self._live = LiveReplay(loaded.layers, plan, device)

    def begin_step(self, info: StepInfo, tokens: StepTokens | None = None) -> None:
        """A forward pass starts."""
        assert tokens is not None, "a replay is driven by a loop that says what it feeds"
        self._live.begin(tokens)
        super().begin_step(info, tokens)

    def end_step(self) -> float:
        """A forward pass has ended; returns its seconds."""
        self._live.end()
        return super().end_step()

    def gate(self, layer: int) -> Any:
        """What answers for the router of a later layer; None past the last, and where nothing was recorded."""
        gate: nn.Module | None = super().gate(layer)
        found: EarlyChoice | None = self._live.early(layer, gate) if gate is not None else None
        return found

    def close(self) -> None:
        """Give the model its experts function and its routers back, and stop copying."""
        self._live.close()
        super().close()


def _require_replayable(spec: PolicySpec, plan: ReplayPlan) -> None:
    """Refuse policies that ask for what a replay does not have. Raises UsageError."""
    if spec.reroutes:
        raise UsageError(
            f"routing {str(spec.routing)!r} reads what the gates say, and in a replay they say nothing that fits the "
            "recorded choice. Use --routing as_routed."
        )
    wants = predictors.get(spec.predictor.name).needs | spec.needs()
    if wants & _TOKEN_NEEDS:
        raise UsageError(
            f"{spec.label} goes by the text, and a replay has none: its token ids are arbitrary. Choose none, "
            "gate_lookahead, previous_token, previous_layer, popular or markov."
        )
    if spec.lookahead_depth and not has_lookahead(plan.routing, spec.lookahead_depth):
        raise UsageError(
            f"predictor {spec.predictor.name!r} asks gates {spec.lookahead_depth} layers ahead, and what they say "
            f"was not recorded in {plan.routing.source}. Record it with --lookahead {spec.lookahead_depth}, or choose "
            "another predictor."
        )

"""The runtime's side of the model seam: what one layer's events demand, and how they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..simulator.policy.base import NO_PATH, NO_SIGNALS, Signals, Wave
from ..tracer.hooks import ExpertLayer, gate_choice, stock_function
from ..tracer.slotwise import SlotCompute, combine
from ..tracer.store import NO_EXPERT
from .cpu_experts import CpuExperts, HandedOver

if TYPE_CHECKING:
    from .session import Session


_FEW = 64
"""So many choices are counted sooner without numpy."""


class OffloadedExperts:
    """Handler of one MoE layer. See tracer.hooks; what is done with an event is in driver.py."""

    def __init__(self, session: Session, layer: ExpertLayer) -> None:
        self._session = session
        self._layer = layer.index
        pool = session.pool(layer.index)
        self.compute = SlotCompute(
            session.store.stand_in(layer, pool),
            stock_function(layer.module, session.implementation),
            num_experts=session.shape.num_experts,
            first_slot=pool.slots.start,
            is_batched=session.implementation == "batched_mm",
        )
        self._has_settled = False
        self.cpu: CpuExperts | None = None
        if session.cpu is not None:
            self.cpu = CpuExperts(
                layer, session.store.blocks, session.cpu, session.device, session.implementation
            )

    @torch.inference_mode()
    def __call__(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Compute one layer's experts: [tokens, hidden]."""
        session, timer = self._session, self._session.timer
        timer.enter()
        chosen = top_k_index.cpu().numpy()
        timer.lap("readback_s")
        if session.settled:
            return self._settled(hidden_states, top_k_index, chosen, top_k_weights)
        if session.chosen is not None:
            session.chosen[self._layer] = chosen
        wanted = chosen
        if session.routing is not None:
            routed = session.routing.route(self._layer, top_k_index, top_k_weights, chosen)
            wanted, chosen, top_k_weights = routed.chosen, routed.computed, routed.weights
        real = wanted if session.routing is None else wanted[wanted != NO_EXPERT]
        experts, counts = _counted(real)
        weights = self._weights(top_k_weights, chosen)
        if session.loads_whole_layers:
            experts, counts, weights = self._all(experts, counts, weights)
        work = _Event(self, hidden_states, wanted, chosen, top_k_weights)
        answer = session.driver.event(self._layer, experts, counts, weights, work)
        timer.lap("decision_s")
        output = work.output()
        if work.is_gathered:
            timer.lap("experts_s")
        timer.leave(self._layer, distinct=len(experts), waves=len(answer.waves))
        return output

    def _settled(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        chosen: np.ndarray,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Every expert is in its slot for good: compute, and note what the core will be told later."""
        session, timer = self._session, self._session.timer
        if not self._has_settled:
            self._has_settled = True
            self.compute.settle(session.slots(self._layer), hidden_states.device)
        output = self.compute.settled(hidden_states, top_k_index, top_k_weights)
        timer.lap("experts_s")
        distinct = session.settled.note(self._layer, chosen)
        timer.lap("decision_s")
        timer.leave(self._layer, distinct=distinct, waves=1)
        return output

    def _all(
        self, experts: list[int], counts: list[int], weights: list[float]
    ) -> tuple[list[int], list[int], list[float]]:
        """All experts of the layer, with no token and no weight for those that nobody chose."""
        everybody = list(range(self._session.shape.num_experts))
        tokens = dict(zip(experts, counts, strict=True))
        shares = dict(zip(experts, weights, strict=True)) if weights else {}
        return (
            everybody,
            [tokens.get(expert, 0) for expert in everybody],
            [shares.get(expert, 0.0) for expert in everybody] if weights else [],
        )

    def _weights(self, top_k_weights: torch.Tensor, chosen: np.ndarray) -> list[float]:
        """Summed gate weights of the distinct experts, ascending, if the policy asks for them."""
        if not self._session.needs_weights:
            return []
        # Rounded as in a trace, so that a policy decides here what it decided in the simulator.
        weights = top_k_weights.float().cpu().numpy().astype(np.float16).reshape(chosen.shape)
        _, inverse = np.unique(chosen, return_inverse=True)
        return np.bincount(inverse.ravel(), weights.ravel()).tolist()

    def signals(self, hidden_states: torch.Tensor, chosen: np.ndarray) -> Signals:
        """What predictors may know now that the layer has been routed."""
        session = self._session
        found: dict[int, list[list[int]]] = {}
        for ahead in range(1, session.lookahead + 1):
            gate = session.gate(self._layer + ahead)
            if gate is not None:
                found[ahead] = gate_choice(gate, hidden_states, session.shape.top_k).tolist()
        path = NO_PATH if session.paths is None else session.paths.ahead(self._layer)
        if session.reads_routing and session.tokens is not None:
            tokens = session.tokens
            return Signals(found, _without_holes(chosen), tokens.sequence, tokens.token_id, path)
        return Signals(found, path=path) if found or path else NO_SIGNALS


class _Event:
    """One event's tokens: computed at once if all is in the slots, else gathered from waves and from the CPU."""

    __slots__ = (
        "_chosen",
        "_handed",
        "_owner",
        "_partial",
        "_states",
        "_wanted",
        "_weights",
        "_whole",
    )

    def __init__(
        self,
        owner: OffloadedExperts,
        hidden_states: torch.Tensor,
        wanted: np.ndarray,
        chosen: np.ndarray,
        top_k_weights: torch.Tensor,
    ) -> None:
        self._owner = owner
        self._states = hidden_states
        self._wanted = wanted
        self._chosen = chosen
        self._weights = top_k_weights
        self._handed: HandedOver | None = None
        self._partial: torch.Tensor | None = None
        self._whole = hidden_states

    def hand_over(self, experts: Sequence[int]) -> None:
        """See driver.EventWork."""
        assert self._owner.cpu is not None
        self._handed = self._owner.cpu.hand_over(experts, self._states, self._chosen)

    def signals(self) -> Signals:
        """See driver.EventWork."""
        return self._owner.signals(self._states, self._wanted)

    def wave(self, wave: Wave, *, is_all: bool) -> None:
        """See driver.EventWork."""
        compute, states, chosen = self._owner.compute, self._states, self._chosen
        if is_all:
            self._whole = compute.whole(wave.experts, wave.slots, states, chosen, self._weights)
        elif wave.experts:
            self._partial = compute.wave(wave.experts, wave.slots, states, chosen, self._partial)

    def take_back(self) -> None:
        """See driver.EventWork."""
        assert self._handed is not None
        self._partial = self._handed.gathered(self._partial)

    @property
    def is_gathered(self) -> bool:
        """Whether its rows have yet to be combined."""
        return self._partial is not None

    def output(self) -> torch.Tensor:
        """The layer's: [tokens, hidden]."""
        if self._partial is None:
            return self._whole
        return combine(self._partial, self._states, self._weights)


def _counted(chosen: np.ndarray) -> tuple[list[int], list[int]]:
    """The distinct experts, ascending, and how many tokens chose each."""
    if chosen.size > _FEW:
        experts, counts = np.unique(chosen, return_counts=True)
        return experts.tolist(), counts.tolist()
    found: dict[int, int] = {}
    for expert in chosen.ravel().tolist():
        found[expert] = found.get(expert, 0) + 1
    ordered = sorted(found)
    return ordered, [found[expert] for expert in ordered]


def _without_holes(chosen: np.ndarray) -> list[list[int]]:
    """The experts of each token; a routing may leave some with fewer than top_k."""
    if (chosen != NO_EXPERT).all():
        return chosen.tolist()
    return [ids[ids != NO_EXPERT].tolist() for ids in chosen]

"""The runtime's side of the model seam: answers one layer's events under the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..simulator.policy.base import NO_PATH, NO_SIGNALS, Demand, Signals
from ..tracer.copies import Copy
from ..tracer.hooks import ExpertLayer, gate_choice, stock_function
from ..tracer.slotwise import SlotCompute, combine
from ..tracer.store import NO_EXPERT

if TYPE_CHECKING:
    from .session import Session


class OffloadedExperts:
    """Handler of one MoE layer: decide, load, wait, compute, release. See tracer.hooks."""

    def __init__(self, session: Session, layer: ExpertLayer) -> None:
        self._session = session
        self._layer = layer.index
        pool = session.pool(layer.index)
        self._compute = SlotCompute(
            session.store.stand_in(layer, pool),
            stock_function(layer.module, session.implementation),
            num_experts=session.shape.num_experts,
            first_slot=pool.slots.start,
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
        if session.chosen is not None:
            session.chosen[self._layer] = chosen
        wanted = chosen
        if session.routing is not None:
            routed = session.routing.route(self._layer, top_k_index, top_k_weights, chosen)
            wanted, chosen, top_k_weights = routed.chosen, routed.computed, routed.weights
        real = wanted if session.routing is None else wanted[wanted != NO_EXPERT]
        experts, counts = np.unique(real, return_counts=True)
        weights = self._weights(top_k_weights, chosen)
        if session.loads_whole_layers:
            experts, counts, weights = self._all(experts, counts, weights)
        demand = session.demand(self._layer, experts.tolist(), counts.tolist(), weights)
        output = self._run(demand, hidden_states, wanted, chosen, top_k_weights)
        session.release(self._layer)
        timer.lap("decision_s")
        timer.leave(self._layer, distinct=len(experts), waves=len(demand.waves))
        return output

    def _run(
        self,
        demand: Demand,
        hidden_states: torch.Tensor,
        wanted: np.ndarray,
        chosen: np.ndarray,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        session, timer, compute = self._session, self._session.timer, self._compute
        partial: torch.Tensor | None = None
        output = hidden_states
        needed: list[Copy] = []
        for wave in demand.waves:
            copies = session.submit(wave.loads)
            timer.lap("decision_s")
            if wave is demand.waves[-1]:
                session.prefetch(self._layer, self._signals(hidden_states, wanted))
                timer.lap("lookahead_s")
            needed += [*session.store.hurry(wave.late), *copies]
            if wave.waits:
                session.store.wait(needed)
                needed = []
            timer.lap("stall_s")
            if len(demand.waves) == 1:
                output = compute.whole(
                    wave.experts, wave.slots, hidden_states, chosen, top_k_weights
                )
            else:
                partial = compute.wave(wave.experts, wave.slots, hidden_states, chosen, partial)
            timer.lap("experts_s")
        if partial is not None:
            output = combine(partial, hidden_states, top_k_weights)
            timer.lap("experts_s")
        return output

    def _all(
        self, experts: np.ndarray, counts: np.ndarray, weights: list[float]
    ) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """All experts of the layer, with no token and no weight for those that nobody chose."""
        width = self._session.shape.num_experts
        tokens = np.zeros(width, counts.dtype)
        tokens[experts] = counts
        shares = np.zeros(width)
        shares[experts] = weights or 0.0
        return np.arange(width), tokens, shares.tolist() if weights else []

    def _weights(self, top_k_weights: torch.Tensor, chosen: np.ndarray) -> list[float]:
        """Summed gate weights of the distinct experts, ascending, if the policy asks for them."""
        if not self._session.needs_weights:
            return []
        # Rounded as in a trace, so that a policy decides here what it decided in the simulator.
        weights = top_k_weights.float().cpu().numpy().astype(np.float16).reshape(chosen.shape)
        _, inverse = np.unique(chosen, return_inverse=True)
        return np.bincount(inverse.ravel(), weights.ravel()).tolist()

    def _signals(self, hidden_states: torch.Tensor, chosen: np.ndarray) -> Signals:
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


def _without_holes(chosen: np.ndarray) -> list[list[int]]:
    """The experts of each token; a routing may leave some with fewer than top_k."""
    if (chosen != NO_EXPERT).all():
        return chosen.tolist()
    return [ids[ids != NO_EXPERT].tolist() for ids in chosen]

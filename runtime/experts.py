"""The runtime's side of the model seam: one layer's experts, computed on the slot arena.

The library's own kernels do the arithmetic, on a stand-in whose weights are slots. An event that fits runs
in one call, bit for bit the stock one with other row numbers. An event in waves computes each expert's
rows in exactly one wave, unweighted, and combines them at the end as the stock kernel does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..simulator.policy.base import NO_SIGNALS, Signals, Wave
from ..tracer.hooks import ExpertLayer, gate_choice, stock_function

if TYPE_CHECKING:
    from .session import Session


class OffloadedExperts:
    """Handler of one MoE layer. See tracer.hooks.ExpertsHandler."""

    def __init__(self, session: Session, layer: ExpertLayer) -> None:
        self._session = session
        self._layer = layer
        self._pool = session.pool(layer.index)
        self._stand_in = session.store.stand_in(layer, self._pool)
        self._stock = stock_function(layer.module, session.implementation)
        self._rows = np.zeros(session.shape.num_experts, dtype=np.int64)

    @torch.inference_mode()
    def __call__(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Answer one event: decide, load, wait, compute, release."""
        session, timer = self._session, self._session.timer
        timer.enter()
        chosen = top_k_index.cpu().numpy()
        timer.lap("readback_s")
        experts = np.unique(chosen).tolist()
        demand = session.demand(self._layer.index, experts)
        copies = session.submit(demand.waves[0].loads)
        timer.lap("decision_s")
        last = len(demand.waves) - 1
        if last == 0:
            session.prefetch(self._layer.index, self._signals(hidden_states))
            timer.lap("lookahead_s")
        partial: torch.Tensor | None = None
        output = hidden_states
        for number, wave in enumerate(demand.waves):
            if number > 0:
                copies = session.submit(wave.loads)
                timer.lap("decision_s")
                if number == last:
                    session.prefetch(self._layer.index, self._signals(hidden_states))
                    timer.lap("lookahead_s")
            session.store.wait(copies, wave.late)
            timer.lap("stall_s")
            if last == 0:
                output = self._whole(wave, hidden_states, chosen, top_k_weights)
            else:
                partial = self._wave(wave, hidden_states, chosen, partial)
            timer.lap("experts_s")
        if partial is not None:
            output = self._combine(partial, hidden_states, top_k_weights)
            timer.lap("experts_s")
        session.release(self._layer.index)
        timer.lap("decision_s")
        timer.leave(self._layer.index, distinct=len(experts), waves=len(demand.waves))
        return output

    def _signals(self, hidden_states: torch.Tensor) -> Signals:
        depth = self._session.lookahead
        if depth == 0:
            return NO_SIGNALS
        found: dict[int, list[list[int]]] = {}
        for ahead in range(1, depth + 1):
            gate = self._session.gate(self._layer.index + ahead)
            if gate is not None:
                ids = gate_choice(gate, hidden_states, self._session.shape.top_k)
                found[ahead] = ids.tolist()
        return Signals(found)

    def _slot_rows(self, wave: Wave) -> np.ndarray:
        # Row of each expert in the pool's stacked weights; only this wave's entries are read.
        self._rows[list(wave.experts)] = np.asarray(wave.slots) - self._pool.slots.start
        return self._rows

    def _whole(
        self,
        wave: Wave,
        hidden_states: torch.Tensor,
        chosen: np.ndarray,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        rows = torch.from_numpy(self._slot_rows(wave)[chosen])
        rows = rows.to(hidden_states.device, non_blocking=True)
        return self._stock(self._stand_in, hidden_states, rows, top_k_weights)

    def _wave(
        self,
        wave: Wave,
        hidden_states: torch.Tensor,
        chosen: np.ndarray,
        partial: torch.Tensor | None,
    ) -> torch.Tensor:
        flat = chosen.reshape(-1)
        pairs = np.flatnonzero(np.isin(flat, wave.experts))
        rows = self._slot_rows(wave)[flat[pairs]][:, None]
        device = hidden_states.device
        place = torch.from_numpy(pairs).to(device, non_blocking=True)
        states = hidden_states[place // chosen.shape[1]]
        ones = torch.ones(len(pairs), 1, dtype=hidden_states.dtype, device=device)
        computed = self._stock(
            self._stand_in, states, torch.from_numpy(rows).to(device, non_blocking=True), ones
        )
        if partial is None:
            partial = computed.new_empty(flat.size, computed.shape[-1])
        partial[place] = computed
        return partial

    @staticmethod
    def _combine(
        partial: torch.Tensor, hidden_states: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        tokens, top_k = top_k_weights.shape
        weighted = partial * top_k_weights.reshape(-1, 1)
        summed = weighted.view(tokens, top_k, -1).sum(dim=1)
        return summed.to(hidden_states.dtype)



"""Computes one layer's experts from slots, with the library's own kernels.

An event that fits runs in one call: bit for bit the stock one, with slot rows in place of expert numbers.
An event in waves computes each expert's rows in exactly one wave, unweighted, and combines them at the
end as the stock kernel does; rows of one expert stay together, so the arithmetic is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .blocks import StandIn


class SlotCompute:
    """One layer on its slots. `first_slot` is the arena number of the stand-in's row 0."""

    def __init__(
        self,
        stand_in: StandIn,
        stock: Callable[..., torch.Tensor],
        *,
        num_experts: int,
        first_slot: int,
    ) -> None:
        self._stand_in = stand_in
        self._stock = stock
        self._first_slot = first_slot
        # Row of each expert in the stacked slots; only entries just written are read.
        self._rows = np.zeros(num_experts, dtype=np.int64)

    def whole(
        self,
        experts: Sequence[int],
        slots: Sequence[int],
        hidden_states: torch.Tensor,
        chosen: np.ndarray,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """All experts of the event are in their slots: [tokens, hidden]."""
        rows = self._placed(experts, slots)[chosen]
        return self._stock(
            self._stand_in, hidden_states, _send(rows, hidden_states.device), top_k_weights
        )

    def wave(
        self,
        experts: Sequence[int],
        slots: Sequence[int],
        hidden_states: torch.Tensor,
        chosen: np.ndarray,
        partial: torch.Tensor | None,
    ) -> torch.Tensor:
        """Add this wave's rows to `partial`, unweighted: [tokens × top_k, hidden]."""
        flat = chosen.reshape(-1)
        pairs = np.flatnonzero(np.isin(flat, list(experts)))
        device = hidden_states.device
        place = _send(pairs, device)
        states = hidden_states[place // chosen.shape[1]]
        rows = _send(self._placed(experts, slots)[flat[pairs]][:, None], device)
        ones = torch.ones(len(pairs), 1, dtype=hidden_states.dtype, device=device)
        computed = self._stock(self._stand_in, states, rows, ones)
        if partial is None:
            partial = computed.new_empty(flat.size, computed.shape[-1])
        partial[place] = computed
        return partial

    def _placed(self, experts: Sequence[int], slots: Sequence[int]) -> np.ndarray:
        self._rows[list(experts)] = np.asarray(slots) - self._first_slot
        return self._rows


def combine(
    partial: torch.Tensor, hidden_states: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weight and sum the rows of all waves: [tokens, hidden]."""
    tokens, top_k = top_k_weights.shape
    weighted = partial * top_k_weights.reshape(-1, 1)
    return weighted.view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


def _send(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(numbers).to(device, non_blocking=True)

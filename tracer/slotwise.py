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
    """One layer on its slots. `first_slot` is the arena number of the stand-in's row 0.

    `is_batched`: the stock kernel is one batched product over rows; see `unweighted`.
    """

    def __init__(
        self,
        stand_in: StandIn,
        stock: Callable[..., torch.Tensor],
        *,
        num_experts: int,
        first_slot: int,
        is_batched: bool = False,
    ) -> None:
        self._stand_in = stand_in
        self._is_batched = is_batched
        self._stock = stock
        self._first_slot = first_slot
        # Row of each expert in the stacked slots; only entries just written are read.
        self._rows = np.zeros(num_experts, dtype=np.int64)
        self._table = torch.zeros(0, dtype=torch.int64)

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
            self._stand_in, hidden_states, send(rows, hidden_states.device), top_k_weights
        )

    def settle(self, slots: Sequence[int], device: torch.device) -> None:
        """From here on expert e of the layer is in slots[e], for `settled`."""
        self._table = torch.tensor(slots, device=device) - self._first_slot

    def settled(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """All experts of the layer are where `settle` said: [tokens, hidden]."""
        return self._stock(self._stand_in, hidden_states, self._table[top_k_index], top_k_weights)

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
        place = send(pairs, device)
        states = hidden_states[place // chosen.shape[1]]
        rows = send(self._placed(experts, slots)[flat[pairs]][:, None], device)
        is_lone = self._is_batched and flat.size > 1
        computed = unweighted(self._stock, self._stand_in, states, rows, is_batched=is_lone)
        if partial is None:
            partial = computed.new_empty(flat.size, computed.shape[-1])
        partial[place] = computed
        return partial

    def _placed(self, experts: Sequence[int], slots: Sequence[int]) -> np.ndarray:
        self._rows[list(experts)] = np.asarray(slots) - self._first_slot
        return self._rows


def unweighted(
    stock: Callable[..., torch.Tensor],
    stand_in: StandIn,
    states: torch.Tensor,
    rows: torch.Tensor,
    *,
    is_batched: bool,
) -> torch.Tensor:
    """Each state through the expert in its row, as among other rows of one call: [n, hidden].

    torch computes a batch of one by another kernel than a larger one, which sums in another order. With `is_batched` a
    lone row is therefore computed twice, and comes out as it does among others.
    """
    count = len(states)
    if is_batched and count == 1:
        states, rows = states.expand(2, -1), rows.expand(2, -1)
    ones = torch.ones(len(states), 1, dtype=states.dtype, device=states.device)
    return stock(stand_in, states, rows, ones)[:count]


def combine(
    partial: torch.Tensor, hidden_states: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weight and sum the rows of all waves: [tokens, hidden]."""
    tokens, top_k = top_k_weights.shape
    weighted = partial * top_k_weights.reshape(-1, 1)
    return weighted.view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


def send(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Indices made on the host, on their way to the device."""
    return torch.from_numpy(numbers).to(device, non_blocking=True)

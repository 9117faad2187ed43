"""DBRX: stacked experts of its own layout, and a loop of its own over them."""

from __future__ import annotations

from typing import Any

import torch

from ..hooks import GatedExperts


class _Routed:
    router: Any
    experts: Any
    route_tokens_to_experts: Any

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output of the block: [batch, tokens, hidden]."""
        weights, chosen = self.route_tokens_to_experts(self.router(hidden_states))
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.experts(states, chosen, weights).reshape(hidden_states.shape)


def adapt(block: Any, model: Any) -> None:
    """Bring the block's experts into the library's layout."""
    own = block.experts.mlp
    shape = (own.moe_num_experts, own.ffn_hidden_size, own.hidden_size)
    gate, up, down = (weight.detach().view(shape) for weight in (own.w1, own.v1, own.w2))
    weights = {
        "gate_up_proj": torch.cat([gate, up], dim=1),
        "down_proj": down.transpose(1, 2).contiguous(),
    }
    block.experts = GatedExperts(model.config, weights, own.activation_fn, block.top_k)
    block.__class__ = type(type(block).__name__, (_Routed, type(block)), {})

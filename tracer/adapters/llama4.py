"""Llama 4: the library runs every expert on every token, most of them on zeros. Here only the chosen one runs.

The gate's score scales what an expert reads, not what it gives, so the recorded weights are all 1.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ResourceError
from ..hooks import TransposedExperts


class _Routed:
    router: Any
    experts: Any
    shared_expert: Any

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of the block and the router's logits: [tokens, hidden] and [tokens, experts]."""
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(states)
        chosen = logits.topk(1, dim=-1).indices
        scaled = states * scores.gather(1, chosen)
        output = self.experts(scaled, chosen, torch.ones_like(scaled[:, :1]))
        return self.shared_expert(states) + output, logits


def adapt(block: Any, model: Any) -> None:
    """Stack the block's experts. Raises ResourceError if a token has more than one."""
    if block.top_k != 1:
        raise ResourceError(
            f"{type(model).__name__} uses {block.top_k} experts per token and scales what each of them reads, which "
            "the experts functions of the library cannot do. Allowed: Llama 4 with one expert per token."
        )
    own = block.experts
    weights = {"gate_up_proj": own.gate_up_proj.detach(), "down_proj": own.down_proj.detach()}
    config = model.config.get_text_config()
    block.experts = TransposedExperts(config, weights, own.act_fn, 1)
    block.__class__ = type(type(block).__name__, (_Routed, type(block)), {})

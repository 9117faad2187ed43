"""NLLB-MoE: one module per expert, and a router that answers with masks.

The library's own experts loop takes the router's mask for expert numbers and runs experts 0 and 1 whatever
was chosen (seen in transformers 5.17 to 5.23). Here the two experts that the router chose are run, as the model
was trained. A choice that was dropped (padding, capacity) has weight 0.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ResourceError
from ..hooks import BiasedExperts

_NOTE = (
    "transformers runs experts 0 and 1 of NLLB-MoE whatever its router chooses; here the chosen ones run, so "
    "the text differs from the library's."
)


class _Routed:
    router: Any
    experts: Any
    kept_share: float

    def forward(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Output of the block: [batch, tokens, hidden]."""
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, logits = self.router(states, padding_mask)
        chosen = logits.topk(2, dim=-1).indices
        output = self.experts(states, chosen, weights.gather(1, chosen)) * self.kept_share
        return output.reshape(hidden_states.shape)


def adapt(block: Any, model: Any) -> str:
    """Stack the block's experts. Raises ResourceError if the second expert is drawn at random."""
    policy = block.router.second_expert_policy
    if policy != "all":
        raise ResourceError(
            f"{type(model).__name__} draws its second expert at random (second_expert_policy is {policy!r}), so a "
            "trace could not be repeated. Set it to 'all' in config.json."
        )
    experts = [block.experts[f"expert_{number}"] for number in range(block.num_experts)]
    weights = {
        name: torch.stack([getattr(getattr(one, layer), kind).detach() for one in experts])
        for name, layer, kind in (
            ("up_proj", "fc1", "weight"),
            ("up_proj_bias", "fc1", "bias"),
            ("down_proj", "fc2", "weight"),
            ("down_proj_bias", "fc2", "bias"),
        )
    }
    # The library makes up for token dropout in training by this factor outside it.
    block.kept_share = 1.0 - block.experts.moe_token_dropout
    block.experts = BiasedExperts(model.config, weights, experts[0].act, 2)
    block.__class__ = type(type(block).__name__, (_Routed, type(block)), {})
    return _NOTE

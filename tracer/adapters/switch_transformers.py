"""Switch Transformers: one module per expert, and a router that answers with masks.

A token over an expert's capacity goes on without one. It is recorded with the expert the router chose and weight 0:
that expert is full, so its weights are demanded with or without this token.
"""

from __future__ import annotations

from typing import Any

import torch

from ..hooks import PlainExperts


class _Routed:
    router: Any
    experts: Any

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output of the block: [batch, tokens, hidden]."""
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        # What the router answers, and in which order, differs between versions of the library.
        answer = self.router(hidden_states)
        [mask] = (part for part in answer if not part.is_floating_point())
        mask = mask.reshape(-1, self.router.num_experts)
        weights = next(part for part in answer if part.is_floating_point() and part.shape[-1] == 1)
        is_kept = mask.any(dim=-1, keepdim=True)
        chosen = mask.argmax(dim=-1, keepdim=True)
        if not is_kept.all():
            logits = self.router.classifier(states.to(self.router.dtype))
            chosen = torch.where(is_kept, chosen, logits.argmax(dim=-1, keepdim=True))
        output = self.experts(states, chosen, weights.reshape(-1, 1) * is_kept)
        return output.reshape(hidden_states.shape)


def adapt(block: Any, model: Any) -> None:
    """Stack the block's experts."""
    experts = list(block.experts.values())
    weights = {
        "up_proj": torch.stack([expert.wi.weight.detach() for expert in experts]),
        "down_proj": torch.stack([expert.wo.weight.detach() for expert in experts]),
    }
    block.experts = PlainExperts(model.config, weights, experts[0].act, 1)
    block.__class__ = type(type(block).__name__, (_Routed, type(block)), {})

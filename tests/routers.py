"""Every family's router written out again, from its documentation and weights alone.

Nothing here calls the library's routers or reads what they return: a router's input is taken by a hook, and the choice
is computed anew. So a trace that agrees with this has recorded what the model means, whatever lies in between.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Score = Callable[[torch.Tensor], torch.Tensor]


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(dim=-1)


def _sqrt_softplus(logits: torch.Tensor) -> torch.Tensor:
    return nn.functional.softplus(logits).sqrt()


SCORES: dict[str, Score] = {
    "Ernie": _softmax,
    "Mistral4": _softmax,
    "MistralLarge4": _softmax,
    "DeepseekV2": _softmax,
    "DeepseekOcr2": _softmax,
    "UnlimitedOcr": _softmax,
    "DeepseekV4": _sqrt_softplus,
    "Kolibri1": lambda logits: logits,
}
"""By the beginning of a router's class name; the others score by sigmoid where a bias or groups make a difference."""

_OTHER = re.compile("Forget|Residual|Vision")


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of the text's MoE layers, in module order."""
    return [
        module
        for name, module in model.named_modules()
        if _is_router(name, type(module)) and "vision" not in name
    ]


def _is_router(name: str, kind: type[nn.Module]) -> bool:
    if kind is nn.Linear:  # some versions have no more than that
        return name.endswith(".router")
    is_router = kind.__name__.endswith(("Router", "Gate", "TopKGating"))
    return is_router and not _OTHER.search(kind.__name__)


class Listener:
    """Keeps the input of every call of every router: by router, in order of calls."""

    def __init__(self, model: nn.Module) -> None:
        self.routers = routers(model)
        self.calls: list[list[torch.Tensor]] = [[] for _ in self.routers]
        self._hooks = [
            router.register_forward_pre_hook(self._keep(place), with_kwargs=True)
            for place, router in enumerate(self.routers)
        ]

    def close(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, place: int) -> Callable[..., None]:
        def keep(module: Any, args: Any, kwargs: Any) -> None:
            given = [*args, *kwargs.values()]
            states = given[0].detach().clone().reshape(-1, given[0].shape[-1])
            extra = next((one for one in given[1:] if isinstance(one, torch.Tensor)), None)
            with torch.no_grad():
                self.calls[place].append(choice(module, states, extra))

        return keep


def choice(router: Any, states: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
    """Experts of each state, ascending: [tokens, top_k]. `extra` is a bias, or token ids for a router that hashes."""
    table = getattr(router, "tid2eid", None)
    if table is not None:
        assert extra is not None
        return table[extra.reshape(-1)].sort(dim=1).values
    logits = _logits(router, states)
    bias = _bias(router, extra)
    groups = getattr(router, "num_group", None) or 1
    if getattr(router, "topk_method", "") == "greedy":
        groups = 1
    if bias is not None or groups > 1:
        logits = _score(router)(logits)
    if bias is not None:
        logits = logits + bias
    if groups > 1:
        logits = _in_open_groups(router, logits, groups)
    return logits.topk(_top_k(router), dim=-1).indices.sort(dim=1).values


def _logits(router: Any, states: torch.Tensor) -> torch.Tensor:
    name = type(router).__name__
    if name.endswith("TextRouter") and "Gemma" in name:
        square = states.pow(2).mean(dim=-1, keepdim=True)
        states = states * torch.rsqrt(square + router.eps)
        states = states * router.scale * states.shape[-1] ** -0.5
    linear = next(
        (
            getattr(router, one)
            for one in ("gate", "wg", "layer", "classifier", "proj")
            if hasattr(router, one)
        ),
        router,
    )
    logits = states.float() @ linear.weight.float().T
    own = getattr(linear, "bias", None)
    logits = logits if own is None else logits + own
    if name.startswith("MuseSpark"):
        logits = logits * router.output_multiplier
    return logits[:, : router.num_experts] if name.startswith("Inkling") else logits


def _bias(router: Any, extra: torch.Tensor | None) -> torch.Tensor | None:
    statics = getattr(router, "moe_statics", None)
    if statics is not None:
        return statics.e_score_correction_bias.reshape(-1)
    own = getattr(router, "e_score_correction_bias", None)
    if own is not None:
        return own
    is_bias = extra is not None and extra.dim() == 1 and extra.is_floating_point()
    return extra if is_bias else None


def _score(router: Any) -> Score:
    name = type(router).__name__
    return next((score for start, score in SCORES.items() if name.startswith(start)), torch.sigmoid)


def _in_open_groups(router: Any, scores: torch.Tensor, groups: int) -> torch.Tensor:
    """Only experts of the groups that are best by their two best experts (DeepSeek-V2: by their best) stay."""
    grouped = scores.unflatten(1, (groups, -1))
    best = 1 if hasattr(router, "topk_method") else 2
    rank = grouped.topk(best, dim=2).values.sum(dim=2)
    kept = rank.topk(router.topk_group, dim=1).indices
    is_open = torch.zeros(rank.shape, dtype=torch.bool).scatter_(1, kept, True)
    return grouped.masked_fill(~is_open[:, :, None], float("-inf")).flatten(1)


def _top_k(router: Any) -> int:
    name = type(router).__name__
    if "Top1" in name:
        return 1
    if "Top2" in name:
        return 2
    if hasattr(router, "top_k"):
        return router.top_k
    return router.config.top_k_experts if "Gemma" in name else 2

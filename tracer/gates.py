"""What gates say beyond the experts they choose: scores of all experts, seen by forward hooks.

Many families compute router logits and drop them, so they are taken where the gate returns them. Families differ in
what they make of them (softmax over all or over the chosen, sigmoid, scaled or not); that is found out from the
weights which the gate gave, never from the family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import UsageError
from .hooks import ExpertLayer

_TOLERANCE = 0.05
"""Spread of log(weight / score) that rounding to bfloat16 may explain."""

Affinity = Callable[[torch.Tensor], torch.Tensor]

_AFFINITIES: tuple[Affinity, ...] = (
    lambda logits: torch.log_softmax(logits, dim=-1),
    torch.nn.functional.logsigmoid,
    # Some gates return probabilities for logits.
    lambda shares: torch.log(shares.clamp_min(1e-30)),
)


class GateTap:
    """Keeps what each layer's gate said last. Close it when done.

    Gates of later layers may be asked early, for look-ahead; when a layer's own experts are called, its gate was the
    last to be asked of that layer. Raises UsageError if a gate cannot be found.
    """

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self._said: dict[int, torch.Tensor] = {}
        self._affinities: dict[int, Sequence[Affinity]] = {}
        self._hooks: list[Any] = []
        for layer in layers:
            if layer.gate is None:
                self.close()
                raise UsageError(
                    f"The gate of layer {layer.index} ({layer.name}) could not be found, so its scores cannot be "
                    "seen. Leave --scores out, and use routing as_routed."
                )
            hook = self._hook(layer.index, int(layer.module.num_experts))  # type: ignore[arg-type]
            self._hooks.append(layer.gate.register_forward_hook(hook))

    def scores(
        self, layer: int, chosen: torch.Tensor, weights: torch.Tensor, experts: int
    ) -> np.ndarray:
        """Natural logs of what the gate gave each expert, up to a constant per token: float32 [tokens, experts].

        `chosen` and `weights` [tokens, top_k] are what it answered. Where a gate chooses by something else as well (a
        bias, groups of experts), these are the scores behind its weights. Raises UsageError if they cannot be told.
        """
        said = self._said.pop(layer, None)
        if said is None or said.numel() != chosen.shape[0] * experts:
            raise UsageError(
                f"The gate of layer {layer} gives no score for each of {experts} experts, so they cannot be used. "
                "Leave --scores out, and use routing as_routed."
            )
        logits = said.reshape(-1, experts).float()
        fitting = self._affinities.get(layer, _AFFINITIES)
        if len(fitting) > 1:  # equal scores fit any; go on until one is left
            fitting = self._affinities[layer] = _fitting(fitting, logits, chosen, weights.float())
        if not fitting:
            raise UsageError(
                f"The gate of layer {layer} weighs experts in a way that is not known, so its scores cannot be used. "
                "Leave --scores out, and use routing as_routed."
            )
        return fitting[0](logits).cpu().numpy()

    def close(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, layer: int, experts: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            for part in parts:
                if part.is_floating_point() and part.shape[-1] == experts:
                    self._said[layer] = part.detach()
                    return

        return keep


def ranked(scores: np.ndarray, chosen: np.ndarray, most: int) -> np.ndarray:
    """Experts by score, ties by id, those a gate chose before all others: [tokens, most].

    `scores` [tokens, experts]; `chosen` [tokens, top_k], of which `most` is no less.
    """
    lifted = scores.astype(np.float64)
    above = np.ptp(lifted) + 1.0 if lifted.size else 0.0
    own = np.take_along_axis(lifted, chosen, axis=1) + above
    np.put_along_axis(lifted, chosen, own, axis=1)
    return np.argsort(-lifted, axis=1, kind="stable")[:, :most]


def _fitting(
    known: Sequence[Affinity],
    logits: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> list[Affinity]:
    """Those of the known ways from logits to weights that explain the weights of these tokens."""

    def fits(affinity: Affinity) -> bool:
        apart = weights.clamp_min(1e-30).log() - affinity(logits).gather(1, chosen)
        return bool((apart.amax(1) - apart.amin(1) <= _TOLERANCE).all())

    return [affinity for affinity in known if fits(affinity)]

"""Recorded choices in a running model: every MoE layer is called with them in place of its router's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...tracer.arrays import NO_EXPERT
from ...tracer.errors import UsageError
from ...tracer.generate import StepTokens
from ...tracer.hooks import ExpertLayer, gate_choice
from .plan import ReplayPlan

_PLACES = slice(1, 3)
"""Where an experts module takes the choice and its weights: behind the hidden states, in every family."""


class LiveReplay:
    """Hooks on the experts modules of a model, runtime or stock alike. The gates still run, as part of a pass.

    `begin` says which tokens come next. Where nobody does (`is_strict` False), the router's own choice stands.
    Close it when done.
    """

    def __init__(
        self, layers: Sequence[ExpertLayer], plan: ReplayPlan, device: torch.device
    ) -> None:
        self.layer = -1
        self.is_strict = True
        self._plan, self._device = plan, device
        self._top_k = plan.routing.top_k
        self._ids: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None
        self._ahead: dict[int, torch.Tensor] = {}
        self._rows = np.empty(0, np.int64)
        self._hooks = [
            layer.module.register_forward_pre_hook(self._hook(layer), with_kwargs=True)
            for layer in layers
        ]

    def begin(self, tokens: StepTokens) -> None:
        """These tokens are fed next, in all layers. Their choices are sent to the device at once."""
        routing = self._plan.routing
        self._rows = self._plan.rows(tokens)
        self._ids = self._send(routing.experts[self._rows].astype(np.int64))
        self._ahead.clear()
        if routing.weights is not None:
            self._weights = self._send(routing.weights[self._rows])

    def end(self) -> None:
        """The pass is over; who runs another must say with which tokens."""
        self._ids = self._weights = None

    def early(self, layer: int, gate: nn.Module | None) -> EarlyChoice | None:
        """What the gate of a later layer said of the tokens in hand, as recorded; None where nobody asked it."""
        depth = layer - self.layer
        ids = self._plan.routing.lookahead.get(depth)
        if ids is None or (ids[self._rows, self.layer] == NO_EXPERT).any():
            return None
        if (
            depth not in self._ahead
        ):  # all layers' at once, so that an event waits for its gate alone
            self._ahead[depth] = self._send(ids[self._rows].astype(np.int64))
        return EarlyChoice(gate, self._ahead[depth][self.layer])

    def close(self) -> None:
        """Give the model its routers back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _send(self, values: np.ndarray) -> torch.Tensor:
        """[tokens, layers, top_k] as [layers, tokens, top_k] on the device."""
        return torch.from_numpy(np.ascontiguousarray(values.transpose(1, 0, 2))).to(self._device)

    def _hook(self, layer: ExpertLayer) -> Callable[..., Any]:
        names = list(inspect.signature(layer.module.forward).parameters)[_PLACES]

        def replace_choice(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            self.layer = layer.index
            given = [*args[_PLACES], *(kwargs[name] for name in names if name in kwargs)]
            found = self._choice(layer.index, *given)
            if found is None:
                return None
            placed = args[_PLACES]
            named = dict(zip(names[len(placed) :], found[len(placed) :], strict=True))
            return (*args[:1], *found[: len(placed)], *args[_PLACES.stop :]), {**kwargs, **named}

        return replace_choice

    def _choice(
        self, layer: int, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self._ids is None:
            if self.is_strict:
                raise UsageError(
                    "A pass ran outside of the replay: nobody said which tokens it feeds. Run it through ReplayMachine."
                )
            return None
        chosen = self._ids[layer]
        if chosen.shape != ids.shape:
            raise UsageError(
                f"Layer {layer} routes {tuple(ids.shape)} choices of experts, and the replay has "
                f"{tuple(chosen.shape)}. Its tokens are not those that are replayed."
            )
        if self._weights is None:
            shares = torch.full_like(weights, 1 / self._top_k)
        else:
            shares = self._weights[layer].to(weights.dtype)
        return chosen.to(ids.dtype), shares


class EarlyChoice:
    """Stands for a gate that is asked early: it computes as the gate does, and answers as recorded."""

    def __init__(self, gate: nn.Module | None, ids: torch.Tensor) -> None:
        self._gate, self._ids = gate, ids

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """See hooks.gate_choice: [tokens, top_k]."""
        if self._gate is not None:
            gate_choice(self._gate, hidden_states, self._ids.shape[1])
        return self._ids

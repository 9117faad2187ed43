"""A policy's routing at work in a running model: the same object as in the simulator, on live gate scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..simulator.policy.base import GateScores
from ..simulator.policy.spec import PolicySpec
from ..simulator.reroute import Change
from ..simulator.result import RoutingResult
from ..tracer.gates import GateTap, ranked
from ..tracer.load import LoadedModel
from ..tracer.store import NO_EXPERT


@dataclass(frozen=True, slots=True)
class Rerouted:
    """One layer's tokens after routing: all [tokens, top_k].

    `chosen` are the experts, NO_EXPERT where a token has fewer than top_k of them; in `computed` such a place repeats
    an expert of the token, and its weight is 0, as kernels want as many for every token.
    """

    chosen: np.ndarray
    computed: np.ndarray
    weights: torch.Tensor


class LiveRouting:
    """Hears what the gates say, asks the routing, and counts what it changed. Close it when done.

    Raises UsageError if a gate cannot be found, and later if one weighs experts in a way that is not known.
    """

    def __init__(self, loaded: LoadedModel, spec: PolicySpec) -> None:
        self._live = spec.build_routing()
        self._member = spec.routing
        self._experts = loaded.shape.num_experts
        self._tap = GateTap(loaded.layers)
        self._change = Change()

    def route(
        self,
        layer: int,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        chosen: np.ndarray,
    ) -> Rerouted:
        """What becomes of a router's choice. `chosen` is `top_k_index` on the host."""
        scores = self._tap.scores(layer, top_k_index, top_k_weights, self._experts)
        order = ranked(scores, chosen, self._experts)
        weights = top_k_weights.float().cpu().numpy().copy()  # the gate keeps its own
        said = GateScores(
            order.tolist(),
            np.take_along_axis(scores, order, 1).tolist(),
            _by_rank(weights, chosen, order),
            self._experts,
        )
        routed = self._live.route(said)
        own = chosen.tolist()
        self._change.add(said, routed, own)
        wanted, computed = chosen.copy(), chosen.copy()
        for token, ids in enumerate(routed.ids):
            if set(ids) == set(own[token]):
                continue
            # A token's weights keep their sum to the last digit the router gave, not the rounded one it votes with.
            shares = np.asarray(routed.weights[token])
            shares *= weights[token].sum() / shares.sum()
            wanted[token], computed[token], weights[token] = NO_EXPERT, ids[0], 0.0
            wanted[token, : len(ids)] = computed[token, : len(ids)] = ids
            weights[token, : len(ids)] = shares
        sent = torch.from_numpy(weights).to(top_k_weights.device, top_k_weights.dtype)
        return Rerouted(wanted, computed, sent)

    def result(self) -> RoutingResult:
        """What it did so far."""
        scores = f"live scores of {self._experts} experts per token"
        return self._change.result(self._member, scores, is_approximate=False)

    def close(self) -> None:
        """Stop listening."""
        self._tap.close()


def _by_rank(weights: np.ndarray, chosen: np.ndarray, order: np.ndarray) -> list[list[float]]:
    """Weights in the order of rank, rounded as in a trace, so that votes here are those of the simulator."""
    by_expert = np.zeros(order.shape, dtype=np.float64)
    np.put_along_axis(by_expert, chosen, weights.astype(np.float16).astype(np.float64), 1)
    return np.take_along_axis(by_expert, order[:, : chosen.shape[1]], 1).tolist()

"""How demand is spread over the experts of each layer, and how domains differ in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from ..arrays import RoutingArrays
from .records import DomainDistance, LayerStats

_ROWS_AT_A_TIME = 1 << 20


def count_demand(
    routing: RoutingArrays,
    layers: int,
    experts: int,
    group: np.ndarray | None = None,
    groups: int = 1,
) -> np.ndarray:
    """How often each expert was chosen, padding left out: [groups, layers, experts].

    `group` [rows] sorts rows into groups; -1 leaves a row out.
    """
    total = np.zeros(groups * layers * experts, dtype=np.int64)
    for first in range(0, len(routing.step), _ROWS_AT_A_TIME):
        part = slice(first, first + _ROWS_AT_A_TIME)
        kept = ~routing.is_pad[part]
        line = routing.layer[part].astype(np.int64)
        if group is not None:
            kept &= group[part] >= 0
            line += group[part].astype(np.int64) * layers
        key = line[kept, None] * experts + routing.experts[part][kept]
        total += np.bincount(key.reshape(-1), minlength=len(total))
    return total.reshape(groups, layers, experts)


def layer_stats(demand: np.ndarray) -> tuple[LayerStats, ...]:
    """Describe the demand [layers, experts] of each layer."""
    experts = demand.shape[1]
    top = math.ceil(experts / 10)
    ordered = np.sort(demand, axis=1)
    sums = np.maximum(ordered.sum(axis=1), 1)
    rank = np.arange(1, experts + 1)
    gini = 2 * (ordered * rank).sum(axis=1) / (experts * sums) - (experts + 1) / experts
    gini = np.where(ordered.sum(axis=1) > 0, gini, 0.0)
    share = ordered / sums[:, None]
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy = -(share * logs).sum(axis=1) / (math.log(experts) if experts > 1 else 1.0)
    top_share = share[:, experts - top :].sum(axis=1)
    return tuple(
        LayerStats(layer=layer, top_share=float(t), gini=float(g), entropy=float(e))
        for layer, (t, g, e) in enumerate(zip(top_share, gini, entropy, strict=True))
    )


def shares_of(demand: np.ndarray) -> np.ndarray:
    """Demand as shares of each layer's."""
    return demand / np.maximum(demand.sum(axis=-1, keepdims=True), 1)


def domain_distances(
    routing: RoutingArrays, layers: int, experts: int, domain_of: Mapping[int, str]
) -> tuple[tuple[DomainDistance, ...], float | None]:
    """The distance of every two domains, and the mean distance between two halves of one."""
    names = sorted({name for name in domain_of.values() if name})
    if len(names) < 2:
        return (), None
    last = max(int(routing.sequence.max(initial=0)), *domain_of)
    # Two halves per domain, by turns, so that the distance has its own noise beside it.
    half_of = np.full(last + 1, -1)
    seen = dict.fromkeys(names, 0)
    number_of = {name: number for number, name in enumerate(names)}
    for sequence, name in sorted(domain_of.items()):
        if name:
            half_of[sequence] = 2 * number_of[name] + seen[name] % 2
            seen[name] += 1
    halves = count_demand(routing, layers, experts, half_of[routing.sequence], 2 * len(names))
    whole = halves[0::2] + halves[1::2]
    distances = tuple(
        DomainDistance(
            first=names[a], second=names[b], distance=_total_variation(whole[a], whole[b])
        )
        for a, b in itertools.combinations(range(len(names)), 2)
    )
    within = [
        _total_variation(halves[2 * number], halves[2 * number + 1])
        for number, name in enumerate(names)
        if seen[name] > 1
    ]
    return distances, float(np.mean(within)) if within else None


def _total_variation(first: np.ndarray, second: np.ndarray) -> float:
    return float(0.5 * np.abs(shares_of(first) - shares_of(second)).sum(axis=1).mean())

"""What the routing of a trace says about caching: skew, reuse, distinct experts, domains."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from .store import RoutingArrays, Trace
from .types import Phase

SHARES = (0.25, 0.5, 0.75)
TIGHT_RATIO = 0.8
"""From this r on, nearly all slots turn over in every event and few hits are left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStats:
    """Prefill or decode alone.

    `mean_distinct` counts experts per layer event, padding included, as the link sees it. `reuse`
    is the share of a token's experts that the token before it in the same sequence had too, in
    the same layer; None if no two such tokens were recorded.
    """

    phase: Phase
    steps: int
    tokens: int
    mean_distinct: float
    reuse: float | None
    reuse_by_layer: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioStats:
    """r at one share of experts resident: mean distinct experts per event over slots per layer."""

    share: float
    slots_per_layer: int
    ratio: float
    reading: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainDistance:
    """Total variation between the popularity of experts in two domains, mean over layers."""

    first: str
    second: str
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingStats:
    """What `info` shows of the routing. Shares and distances lie between 0 and 1.

    `top_share` is the share of demand that goes to the most popular tenth of a layer's experts, and
    `top_share_even` what it would be if all were equally popular. `entropy` is 1 for even
    popularity. `reuse_chance` is `reuse` under independent, even routing. `reuse_distance` is the
    median number of events of a layer from one use of an expert to the next (1: the next event).
    `within_domain` is the distance between two halves of one domain: what sampling alone gives.
    """

    top_share: float
    top_share_even: float
    entropy: float
    reuse_chance: float
    prefill: PhaseStats
    decode: PhaseStats
    reuse_distance: float | None
    domains: tuple[DomainDistance, ...]
    within_domain: float | None
    ratios: tuple[RatioStats, ...]


def routing_stats(trace: Trace) -> RoutingStats:
    """Read the routing of `trace` once and describe it."""
    routing = trace.routing_arrays()
    labels = trace.table("sequences", ["sequence", "domain"]).to_pydict()
    domain_of = dict(zip(labels["sequence"], labels["domain"], strict=True))
    return describe_routing(routing, trace.shape.num_moe_layers, trace.shape.num_experts, domain_of)


def describe_routing(
    routing: RoutingArrays, layers: int, experts: int, domain_of: dict[int, str] | None = None
) -> RoutingStats:
    """Describe routing arrays of a model with `layers` MoE layers of `experts` experts."""
    top_k = routing.experts.shape[1]
    popularity = _popularity(routing, ~routing.is_pad, layers, experts)
    top = max(1, math.ceil(experts / 10))
    counts = np.sort(popularity, axis=1)[:, ::-1]
    demand = np.maximum(counts.sum(axis=1), 1)
    events = _Events.of(routing, layers, experts)
    reuse = _adjacent_reuse(routing, layers)
    decode = _phase("decode", routing, events, reuse, layers)
    prefill = _phase("prefill", routing, events, reuse, layers)
    distances, within = _domains(routing, layers, experts, domain_of or {})
    loads = decode.mean_distinct or prefill.mean_distinct
    return RoutingStats(
        top_share=float((counts[:, :top].sum(axis=1) / demand).mean()),
        top_share_even=top / experts,
        entropy=_entropy(popularity),
        reuse_chance=top_k / experts,
        prefill=prefill,
        decode=decode,
        reuse_distance=_reuse_distance(events, bool(routing.phase_is_decode.any()), layers),
        domains=distances,
        within_domain=within,
        ratios=tuple(_ratio(share, loads, experts) for share in SHARES),
    )


@dataclass(frozen=True, slots=True)
class _Events:
    """Distinct (step, layer, expert) of the trace: what the link would have to bring."""

    step: np.ndarray
    layer: np.ndarray
    expert: np.ndarray
    is_decode: np.ndarray

    @classmethod
    def of(cls, routing: RoutingArrays, layers: int, experts: int) -> _Events:
        event = routing.step.astype(np.int64) * layers + routing.layer
        key = np.sort((event[:, None] * experts + routing.experts).reshape(-1))
        key = key[np.diff(key, prepend=-1) != 0]
        event, expert = np.divmod(key, experts)
        step, layer = np.divmod(event, layers)
        decodes = np.zeros(int(routing.step.max(initial=-1)) + 1, dtype=bool)
        decodes[routing.step[routing.phase_is_decode]] = True
        return cls(step, layer, expert, decodes[step])


def _popularity(routing: RoutingArrays, is_in: np.ndarray, layers: int, experts: int) -> np.ndarray:
    """Count how often each expert was chosen in the rows `is_in`: [layers, experts]."""
    key = routing.layer[is_in, None].astype(np.int64) * experts + routing.experts[is_in]
    return np.bincount(key.reshape(-1), minlength=layers * experts).reshape(layers, experts)


def _entropy(popularity: np.ndarray) -> float:
    share = popularity / np.maximum(popularity.sum(axis=1, keepdims=True), 1)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    width = math.log(share.shape[1]) if share.shape[1] > 1 else 1.0
    return float(-(share * logs).sum(axis=1).mean() / width)


@dataclass(frozen=True, slots=True)
class _Reuse:
    """Pairs of consecutive tokens: layer, the later one's phase, the share they have in common."""

    layer: np.ndarray
    is_decode: np.ndarray
    share: np.ndarray


def _adjacent_reuse(routing: RoutingArrays, layers: int) -> _Reuse:
    real = np.flatnonzero(~routing.is_pad)
    span = int(routing.position.max(initial=0)) + 2  # one number of room: lines never touch
    line = routing.sequence[real].astype(np.int64) * layers + routing.layer[real]
    key = line * span + routing.position[real]
    order = np.argsort(key, kind="stable")
    is_pair = np.diff(key[order]) == 1
    rows = real[order]
    before, after = rows[:-1][is_pair], rows[1:][is_pair]
    old, new = routing.experts[before], routing.experts[after]
    common = np.zeros(len(after), dtype=np.int64)
    for column in range(new.shape[1]):
        common += (new[:, column : column + 1] == old).any(axis=1)
    return _Reuse(
        routing.layer[after], routing.phase_is_decode[after], common / max(1, new.shape[1])
    )


def _phase(
    phase: Phase, routing: RoutingArrays, events: _Events, reuse: _Reuse, layers: int
) -> PhaseStats:
    is_decode = phase == "decode"
    in_phase = routing.phase_is_decode == is_decode
    steps = len(np.unique(routing.step[in_phase]))
    is_first_layer = in_phase & (routing.layer == 0) & ~routing.is_pad
    pairs = reuse.is_decode == is_decode
    sums = np.bincount(reuse.layer[pairs], weights=reuse.share[pairs], minlength=layers)
    counts = np.bincount(reuse.layer[pairs], minlength=layers)
    has_pairs = bool(counts.any())
    return PhaseStats(
        phase=phase,
        steps=steps,
        tokens=int(is_first_layer.sum()),
        mean_distinct=float((events.is_decode == is_decode).sum() / max(1, steps * layers)),
        reuse=float(sums.sum() / counts.sum()) if has_pairs else None,
        reuse_by_layer=tuple((sums / np.maximum(counts, 1)).tolist()) if has_pairs else (),
    )


def _reuse_distance(events: _Events, has_decode: bool, layers: int) -> float | None:
    """Median distance in events; decode alone if there is any, its steps counted by themselves."""
    is_in = events.is_decode == has_decode
    if not is_in.any():
        return None
    numbers = np.cumsum(np.bincount(events.step[is_in]) > 0)  # steps of this phase, without gaps
    span = int(numbers[-1]) + 1
    # Two blocks are never closer than `span`, so distances across blocks can be told apart.
    block = events.expert[is_in] * layers + events.layer[is_in]
    key = np.sort(block * (2 * span) + numbers[events.step[is_in]])
    gaps = np.diff(key)
    gaps = gaps[np.diff(key // (2 * span)) == 0]
    return float(np.median(gaps)) if gaps.size else None


def _domains(
    routing: RoutingArrays, layers: int, experts: int, domain_of: dict[int, str]
) -> tuple[tuple[DomainDistance, ...], float | None]:
    names = sorted({name for name in domain_of.values() if name})
    if len(names) < 2:
        return (), None
    last = max(int(routing.sequence.max(initial=0)), *domain_of)
    # Two halves per domain, by turns, so that the distance has its own noise beside it.
    half_of = np.full(last + 1, -1)
    seen = dict.fromkeys(names, 0)
    for sequence, name in sorted(domain_of.items()):
        if name:
            half_of[sequence] = 2 * names.index(name) + seen[name] % 2
            seen[name] += 1
    half = half_of[routing.sequence]
    halves = [
        _popularity(routing, ~routing.is_pad & (half == number), layers, experts)
        for number in range(2 * len(names))
    ]
    whole = [halves[2 * number] + halves[2 * number + 1] for number in range(len(names))]
    pairs = itertools.combinations(range(len(names)), 2)
    distances = tuple(
        DomainDistance(
            first=names[a], second=names[b], distance=_total_variation(whole[a], whole[b])
        )
        for a, b in pairs
    )
    within = [
        _total_variation(halves[2 * number], halves[2 * number + 1])
        for number, name in enumerate(names)
        if seen[name] > 1
    ]
    return distances, float(np.mean(within)) if within else None


def _total_variation(first: np.ndarray, second: np.ndarray) -> float:
    shares = [
        counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) for counts in (first, second)
    ]
    return float(0.5 * np.abs(shares[0] - shares[1]).sum(axis=1).mean())


def _ratio(share: float, distinct: float, experts: int) -> RatioStats:
    slots = max(1, int(share * experts))
    ratio = distinct / slots
    if ratio > 1:
        verdict = "so one event overflows the slots and a cache cannot hit by recency"
    elif ratio >= TIGHT_RATIO:
        verdict = "so nearly every slot turns over per event and hits will be few"
    else:
        verdict = "so a cache can hit"
    reading = (
        f"at {share:.0%} of experts resident ({slots} slots per layer) an event needs "
        f"{distinct:.1f} experts: r = {ratio:.2f}, {verdict}"
    )
    return RatioStats(share=share, slots_per_layer=slots, ratio=ratio, reading=reading)

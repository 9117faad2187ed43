"""Puts the statistics of one trace together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..arrays import RoutingArrays
from ..store import Trace
from ..types import Phase
from .across_layers import coactivation, lookahead_stats, transition_stats
from .batching import batch_stats
from .findings import findings_of, ratio_reading
from .pace import pace_stats
from .popularity import count_demand, domain_distances, layer_stats, shares_of
from .prefixes import prefix_stats
from .records import PhaseStats, RatioStats, RoutingStats
from .reuse import StackDistances, adjacent_reuse, reuse_gap, stack_distances
from .sample import Events, TokenGrid, of_sequences, of_steps, row_limit
from .segments import cache_coverage, segment_stats

SHARES = (0.25, 0.5, 0.75)
"""Shares of experts resident that r and LRU hits are told for."""
QUANTILES = (0.25, 0.5, 0.75, 0.9)


def routing_stats(trace: Trace) -> RoutingStats:
    """Read the routing of `trace` once and describe it, with what its times and prompts add."""
    routing = trace.routing_arrays()
    labels = trace.table("sequences", ["sequence", "domain", "prompt_sha256"]).to_pydict()
    domain_of = dict(zip(labels["sequence"], labels["domain"], strict=True))
    stats = describe_routing(
        routing,
        trace.shape.num_moe_layers,
        trace.shape.num_experts,
        domain_of,
        labels["prompt_sha256"],
    )
    stats = replace(stats, pace=pace_stats(trace, stats.decode.mean_distinct))
    return replace(stats, findings=findings_of(stats, trace.shape.num_experts, trace.shape.top_k))


def describe_routing(
    routing: RoutingArrays,
    layers: int,
    experts: int,
    domain_of: Mapping[int, str] | None = None,
    prompt_hashes: Sequence[str] = (),
) -> RoutingStats:
    """Describe routing arrays of a model with `layers` MoE layers of `experts` experts.

    Popularity and domains count every row. The rest looks at whole steps or whole sequences spread over the trace
    if it has more than a million rows.
    """
    top_k = routing.experts.shape[1]
    demand = count_demand(routing, layers, experts)[0]
    by_layer = layer_stats(demand)
    shares = shares_of(demand)
    limit = row_limit(experts)
    events = Events.of(routing, layers, experts, of_steps(routing, limit))
    grid = TokenGrid.of(routing, layers, of_sequences(routing, limit))
    prefill, decode = (_phase(phase, routing, events, grid) for phase in ("prefill", "decode"))
    has_decode = bool(routing.phase_is_decode.any())
    distances = stack_distances(events, is_decode=has_decode)
    domains, within = domain_distances(routing, layers, experts, domain_of or {})
    stats = RoutingStats(
        tokens=prefill.tokens + decode.tokens,
        sampled_tokens=grid.num_tokens,
        top_share=float(np.mean([layer.top_share for layer in by_layer])),
        top_share_even=max(1, -(-experts // 10)) / experts,
        gini=float(np.mean([layer.gini for layer in by_layer])),
        entropy=float(np.mean([layer.entropy for layer in by_layer])),
        layers=by_layer,
        reuse_chance=top_k / experts,
        reuse_popular=float(top_k * (shares**2).sum(axis=1).mean()),
        prefill=prefill,
        decode=decode,
        reuse_distance=reuse_gap(events, is_decode=has_decode),
        stack_distances=distances.quantiles(QUANTILES),
        domains=domains,
        within_domain=within,
        ratios=_ratios(decode if has_decode else prefill, events, distances, has_decode),
        transitions=transition_stats(grid, experts),
        lookahead=lookahead_stats(grid),
        coactive=coactivation(grid, experts),
        segments=segment_stats(grid, experts),
        coverage=cache_coverage(grid, experts),
        batches=batch_stats(grid, shares),
        prefixes=prefix_stats(routing, prompt_hashes),
        pace=None,
        findings=(),
    )
    return replace(stats, findings=findings_of(stats, experts, top_k))


def _phase(phase: Phase, routing: RoutingArrays, events: Events, grid: TokenGrid) -> PhaseStats:
    is_decode = phase == "decode"
    in_phase = routing.phase_is_decode == is_decode
    sizes = events.sizes(is_decode=is_decode)
    reuse = adjacent_reuse(grid, is_decode=is_decode)
    return PhaseStats(
        phase=phase,
        steps=len(np.unique(routing.step[in_phase])),
        tokens=int((in_phase & (routing.layer == 0) & ~routing.is_pad).sum()),
        mean_distinct=float(sizes.mean()) if sizes.size else 0.0,
        reuse=reuse.mean,
        reuse_by_layer=reuse.by_layer,
    )


def _ratios(
    phase: PhaseStats, events: Events, distances: StackDistances, is_decode: bool
) -> tuple[RatioStats, ...]:
    experts = events.used.shape[2]
    largest = int(events.sizes(is_decode=is_decode).max(initial=0))
    found: list[RatioStats] = []
    for share in SHARES:
        slots = max(1, int(share * experts))
        ratio = phase.mean_distinct / slots
        hits = distances.hits(slots) if largest <= slots and distances.demands else None
        reading = ratio_reading(share, slots, phase.mean_distinct, ratio)
        found.append(
            RatioStats(
                share=share, slots_per_layer=slots, ratio=ratio, lru_hits=hits, reading=reading
            )
        )
    return tuple(found)

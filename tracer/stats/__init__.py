"""What the routing of a trace says in advance about caching, prefetch and batching (docs/statistics.md)."""

from __future__ import annotations

from .describe import describe_routing, routing_stats
from .records import (
    BatchStats,
    CacheCoverage,
    Coactivation,
    DomainDistance,
    Finding,
    LayerStats,
    LookaheadStats,
    PaceStats,
    PhaseStats,
    PrefixStats,
    RatioStats,
    RoutingStats,
    SegmentStats,
    TransitionStats,
)

__all__ = [
    "BatchStats",
    "CacheCoverage",
    "Coactivation",
    "DomainDistance",
    "Finding",
    "LayerStats",
    "LookaheadStats",
    "PaceStats",
    "PhaseStats",
    "PrefixStats",
    "RatioStats",
    "RoutingStats",
    "SegmentStats",
    "TransitionStats",
    "describe_routing",
    "routing_stats",
]

"""Hit rate over cache size: which caches are worth their memory, and where none is.

Demand loads only, so no clock is needed. LRU is measured at all sizes in one pass; the others are replayed size by
size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..tracer.types import ModelShape
from .costs import free_machine
from .curves import global_curve, layer_curves
from .engines import run
from .policy.registry import caches
from .policy.spec import PolicySpec, make_spec
from .result import CapacityPoint
from .workload import Workload

SHARES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
CACHES = ("lru", "lfu", "static", "belady")


def capacity_curve(
    workload: Workload,
    shape: ModelShape,
    popularity: Sequence[Sequence[int]],
    *,
    names: Sequence[str] = CACHES,
    allocation: str = "equal",
    shares: Sequence[float] = SHARES,
    advance: Callable[[int], None] = lambda _: None,
) -> list[CapacityPoint]:
    """Decode hit rate of each cache at each size (share of all experts), with r and the floor."""
    mean, floor = workload.mean_distinct("decode"), _floor(workload, allocation)
    points: list[CapacityPoint] = []
    for name in names:
        for share in shares:
            slots = max(1, round(share * shape.total_experts))
            spec = make_spec(slots=slots, cache=name, allocation=allocation, popularity=popularity)
            points.append(
                CapacityPoint(
                    cache=name,
                    allocation=allocation,
                    slots=slots,
                    share=share,
                    hit_rate=decode_hit_rate(workload, spec, shape),
                    is_bound="future" in caches.get(name).needs,
                    ratio=mean / (slots / shape.num_moe_layers),
                    is_below_floor=slots < floor,
                )
            )
            advance(1)
    return points


def lru_rates(workload: Workload, *, scope: str) -> dict[str, np.ndarray]:
    """Decode hit rate of an LRU at every number of slots, in one pass: by layer, or `global` for one pool.

    Index c of each array is the rate with c slots: of that layer alone (scope `layer`), or of all together.
    """
    is_decode = workload.event_is_decode()
    sizes = np.diff(workload.ptr)
    if scope == "global":
        demanded = max(1, int(sizes[is_decode].sum()))
        return {"global": global_curve(workload, decode_only=True) / demanded}
    rates: dict[str, np.ndarray] = {}
    for layer, hits in enumerate(layer_curves(workload, decode_only=True)):
        demanded = max(1, int(sizes[is_decode & (workload.layer == layer)].sum()))
        rates[str(layer)] = np.asarray(hits) / demanded
    return rates


def _floor(workload: Workload, allocation: str) -> int:
    """Fewest slots with which every decode event fits its pool."""
    sizes = np.diff(workload.ptr)[workload.event_is_decode()]
    largest = int(sizes.max(initial=0))
    return largest if allocation == "global" else largest * workload.num_layers


def decode_hit_rate(workload: Workload, spec: PolicySpec, shape: ModelShape) -> float:
    """Share of distinct experts demanded in decode that were resident; demand loads only."""
    totals, _ = run(workload, spec, shape, free_machine(shape))
    is_decode = totals.steps.is_decode
    hits = int(totals.steps.hits[is_decode].sum())
    demanded = hits + int(totals.steps.misses[is_decode].sum())
    return hits / demanded if demanded else 0.0

"""Hit rate over cache size: which caches are worth their memory, and where none is.

Demand loads only, so no clock is needed: the decision core is walked event by event.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..tracer.types import ModelShape
from .policy.future import Future
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
) -> list[CapacityPoint]:
    """Decode hit rate of each cache at each size (share of all experts)."""
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
                )
            )
    return points


def decode_hit_rate(workload: Workload, spec: PolicySpec, shape: ModelShape) -> float:
    """Share of distinct experts demanded in decode that were resident; demand loads only."""
    future = Future(workload.events()) if "future" in spec.needs() else None
    core = spec.build(shape, future=future)
    core.warm()
    hits = demanded = 0
    for step in workload.steps:
        for event in step.events:
            answer = core.demand(step.step, event.layer, event.experts)
            core.release(step.step, event.layer)
            if step.phase == "decode":
                hits += answer.hits
                demanded += len(event.experts)
    return hits / demanded if demanded else 0.0

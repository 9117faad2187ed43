"""LRU hit curves: hits at every number of slots, by layer or for one pool of all layers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .workload import Workload, ranges


def layer_curves(workload: Workload, *, decode_only: bool = False) -> list[list[int]]:
    """Hits of an event-atomic LRU of c slots of its own per layer: curves[layer][c], c = 0 to num_experts.

    Capacities below a layer's largest event, which runs in waves there, count as none: an LRU that small hits
    by accident only.
    """
    counted = workload.event_is_decode() if decode_only else np.ones(workload.num_events, bool)
    curves: list[list[int]] = []
    for layer in range(workload.num_layers):
        events = np.flatnonzero(workload.layer == layer)
        sizes = workload.ptr[events + 1] - workload.ptr[events]
        ptr = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
        experts = workload.experts[ranges(workload.ptr, events)]
        hits = _stack_hits(ptr, experts, counted[events], workload.num_experts)
        hits[: int(sizes.max(initial=0))] = 0
        curves.append(hits.tolist())
    return curves


def global_curve(workload: Workload, *, decode_only: bool = False) -> np.ndarray:
    """Hits of an event-atomic LRU of c slots shared by all layers: [num_layers × num_experts + 1]."""
    counted = workload.event_is_decode() if decode_only else np.ones(workload.num_events, bool)
    total = workload.num_layers * workload.num_experts
    hits = _stack_hits(workload.ptr, workload.keys(), counted, total)
    hits[: int(np.diff(workload.ptr).max(initial=0))] = 0
    return hits


def _stack_hits(
    ptr: np.ndarray, keys: np.ndarray, counted: np.ndarray, num_keys: int
) -> np.ndarray:
    try:
        from .compiled.curves import stack_hits
    except ImportError:
        return _plain_stack_hits(ptr, keys, counted, num_keys)
    return stack_hits(ptr, keys, counted, num_keys)


def _plain_stack_hits(
    ptr: np.ndarray, keys: np.ndarray, counted: np.ndarray, num_keys: int
) -> np.ndarray:
    """The same without Numba: a list in order of recency, newest last."""
    order: list[int] = []
    at = np.zeros(num_keys + 1, np.int64)
    bounds: Iterable[tuple[int, int]] = zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)
    for (first, last), is_counted in zip(bounds, counted.tolist(), strict=True):
        event = keys[first:last].tolist()
        for key in event if is_counted else ():
            if key in order:
                at[len(order) - 1 - order.index(key)] += 1
        for key in event:
            if key in order:
                order.remove(key)
            order.append(key)
    return np.concatenate(([0], np.cumsum(at[:-1])))

"""A workload in which every layer wants all of its experts: what layer streaming makes of it."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np

from ..tracer.errors import UsageError
from .policy.spec import PolicySpec
from .source import Recorded, Source
from .workload import Workload

_KEPT: WeakKeyDictionary[Workload, Workload] = WeakKeyDictionary()


def as_demanded(source: Workload | Source, spec: PolicySpec) -> Workload | Source:
    """What a policy demands of a source: the same, or all experts of every layer if it loads whole layers.

    Raises UsageError for requests that arrive under such a policy.
    """
    return whole_layers(source) if spec.loads_whole_layers else source


def whole_layers(source: Workload | Source) -> Workload:
    """The recorded passes with all experts in every event, those that nobody chose by no token; whole ones as they are.

    Raises UsageError for requests that arrive.
    """
    workload = source.workload if isinstance(source, Recorded) else source
    if not isinstance(workload, Workload):
        raise UsageError(
            "Layer streaming follows the recorded batches only; leave --arrivals out, or choose another predictor."
        )
    if len(workload.experts) == workload.num_events * workload.num_experts:
        return workload
    if workload not in _KEPT:
        _KEPT[workload] = _filled(workload)
    return _KEPT[workload]


def _filled(workload: Workload) -> Workload:
    events, width = workload.num_events, workload.num_experts
    place = np.repeat(np.arange(events) * width, np.diff(workload.ptr)) + workload.experts
    counts = np.zeros(events * width, workload.counts.dtype)
    counts[place] = workload.counts
    weights = None
    if workload.weights is not None:
        weights = np.zeros(events * width, workload.weights.dtype)
        weights[place] = workload.weights
    return replace(
        workload,
        ptr=np.arange(events + 1, dtype=workload.ptr.dtype) * width,
        experts=np.tile(np.arange(width, dtype=workload.experts.dtype), events),
        counts=counts,
        weights=weights,
    )

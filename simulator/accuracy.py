"""How often a predictor is right, whatever comes of it: recall and precision of what it said before each event."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tracer.types import ExpertKey
from .policy.log import Entry
from .result import Accuracy
from .workload import Workload


def logged_accuracy(log: Sequence[Entry]) -> Accuracy | None:
    """Accuracy in the decode steps of a decision log; None if nothing was predicted.

    An event is held against all that was said of its layer since that layer's last event; it is the distinct experts
    that count.
    """
    said: dict[int, set[ExpertKey]] = {}
    event: tuple[int, int] | None = None
    expected: set[ExpertKey] = set()
    right = demanded = predicted = 0
    for entry in log:
        if entry.kind == "predict":
            said.setdefault(entry.layer, set()).add(ExpertKey(entry.layer, entry.expert))
        if entry.kind != "event":
            continue
        if event != (entry.step, entry.layer):
            event, expected = (entry.step, entry.layer), said.pop(entry.layer, set())
            predicted += 0 if entry.is_prefill else len(expected)
        if not entry.is_prefill:
            demanded += 1
            right += ExpertKey(entry.layer, entry.expert) in expected
    return _accuracy(right, demanded, predicted)


def taped_accuracy(workload: Workload, ptr: np.ndarray, keys: np.ndarray) -> Accuracy | None:
    """The same from all that a predictor says over a workload: `keys[ptr[j]:ptr[j + 1]]` at event j."""
    width, events = workload.num_experts, workload.num_events
    asked_at = np.repeat(np.arange(events), np.diff(ptr))
    layer = keys // width
    target = np.full(len(layer), events)
    for number in range(workload.num_layers):
        of_layer = np.flatnonzero(workload.layer == number)
        is_meant = layer == number
        place = np.searchsorted(of_layer, asked_at[is_meant], side="right")
        target[is_meant] = np.append(of_layer, events)[place]
    is_decode = np.append(workload.event_is_decode(), False)
    total = np.int64(workload.num_layers * width)
    said = np.unique(target[is_decode[target]] * total + keys[is_decode[target]])
    event = np.repeat(np.arange(events), np.diff(workload.ptr))
    needed = (event * total + workload.keys())[is_decode[event]]
    return _accuracy(int(np.isin(needed, said).sum()), len(needed), len(said))


def _accuracy(right: int, demanded: int, predicted: int) -> Accuracy | None:
    if not demanded or not predicted:
        return None
    return Accuracy(recall=right / demanded, precision=right / predicted)

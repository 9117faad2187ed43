"""Splits a workload by batch into a part to learn from and a part to be judged on.

A static placement judged on the text it was counted on looks better than it is; popularity differs between
prompts. Alternate batches keep every domain on both sides.
"""

from __future__ import annotations

import numpy as np

from .workload import Workload


def split_by_batch(workload: Workload) -> tuple[Workload, Workload]:
    """Learn on even batches, judge on odd ones. With a single batch both are that batch."""
    batch = batch_numbers(workload)
    if batch[-1] < 1:
        return workload, workload
    return (
        workload.select(np.flatnonzero(batch % 2 == 0)),
        workload.select(np.flatnonzero(batch % 2 == 1)),
    )


def batch_numbers(workload: Workload) -> np.ndarray:
    """The batch of each step, from 0.

    A batch starts with a prefill step or, where no prompts were recorded, with sequences not seen before.
    """
    return np.cumsum(_starts_batch(workload)) - 1


def _starts_batch(workload: Workload) -> np.ndarray:
    steps = workload.steps
    if not steps.is_decode.all():
        starts = ~steps.is_decode
    else:
        _, first = np.unique(steps.members, return_index=True)
        place = np.searchsorted(steps.member_ptr, first, side="right") - 1
        starts = np.zeros(len(steps), dtype=bool)
        starts[place] = True
    starts[0] = True
    return starts

"""Splits a workload by batch into a part to learn from and a part to be judged on.

A static placement judged on the text it was counted on looks better than it is; popularity differs between
prompts. Alternate batches keep every domain on both sides.
"""

from __future__ import annotations

from dataclasses import replace

from .workload import StepDemand, Workload


def split_by_batch(workload: Workload) -> tuple[Workload, Workload]:
    """Learn on even batches, judge on odd ones. With a single batch both are that batch."""
    groups: list[list[StepDemand]] = []
    for step in workload.steps:
        if step.phase == "prefill" or not groups:
            groups.append([])
        groups[-1].append(step)
    if len(groups) < 2:
        return workload, workload
    return _part(workload, groups[0::2]), _part(workload, groups[1::2])


def _part(workload: Workload, groups: list[list[StepDemand]]) -> Workload:
    steps = tuple(step for group in groups for step in group)
    present = {sequence for step in steps for sequence in step.sequences}
    prompts = {s: n for s, n in workload.prompt_tokens.items() if s in present}
    return replace(workload, steps=steps, prompt_tokens=prompts)

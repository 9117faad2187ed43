"""Which sequences of a trace go where: a split for training and judging, or a sample.

The unit is the prompt: all sequences whose prompts have the same hash go together, so that nothing is judged on
what it was trained on. By domain, all of a domain's go together; with whole batches, all that ran together do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from .errors import UsageError
from .store import Trace

By = Literal["prompt", "domain"]
WAYS: tuple[By, ...] = ("prompt", "domain")


def split_sequences(
    trace: Trace, share: float, *, by: str = "prompt", seed: int = 0, whole_batches: bool = False
) -> tuple[list[int], list[int]]:
    """Sequences to train on, about `share` of all, and the others, drawn by `seed`.

    Raises UsageError for an unknown `by`, a share outside 0 to 1, or a trace that cannot be divided so.
    """
    if by not in WAYS:
        raise UsageError(f"--by {by!r} is not known; allowed: {', '.join(WAYS)}.")
    _require_share(share)
    groups = _groups(trace, by_domain=by == "domain", whole_batches=whole_batches)
    if len(groups) < 2:
        what = {"prompt": "prompt", "domain": "domain"}[by] + (
            " and batch" if whole_batches else ""
        )
        raise UsageError(
            f"{trace.path} cannot be split by {what}: all its sequences belong together. "
            "Split it another way, or record more prompts."
        )
    first = _filled(groups, share * sum(map(len, groups)), seed, keep_one=True)
    chosen = set(first)
    return first, sorted(n for group in groups for n in group if n not in chosen)


def sample_sequences(
    trace: Trace,
    *,
    sequences: int | None = None,
    share: float | None = None,
    seed: int = 0,
    whole_batches: bool = False,
) -> list[int]:
    """About so many sequences, or such a share of them, drawn by `seed`; prompts of one hash are drawn singly.

    Raises UsageError unless exactly one of `sequences` and `share` is given and can be had.
    """
    if (sequences is None) == (share is None):
        raise UsageError("Give either --sequences or --share, not both and not neither.")
    batch_of = _column(trace, "batch")
    if sequences is not None and not 1 <= sequences <= len(batch_of):
        raise UsageError(
            f"--sequences {sequences} cannot be had: {trace.path} holds {len(batch_of)} sequences."
        )
    if share is not None:
        _require_share(share)
    wanted = float(sequences) if sequences is not None else (share or 0.0) * len(batch_of)
    marks = [batch_of] if whole_batches else []
    return _filled(_joined(sorted(batch_of), marks), max(1.0, wanted), seed)


def _require_share(share: float) -> None:
    if not 0 < share < 1:
        raise UsageError(
            f"--share {share:g} is not possible; give a number between 0 and 1, such as 0.8."
        )


def _groups(trace: Trace, *, by_domain: bool, whole_batches: bool) -> list[list[int]]:
    marks = [_column(trace, "prompt_sha256")]
    if by_domain:
        marks.append(_column(trace, "domain"))
    if whole_batches:
        marks.append(_column(trace, "batch"))
    return _joined(sorted(marks[0]), marks)


def _column(trace: Trace, name: str) -> dict[int, object]:
    rows = trace.table("sequences", ["sequence", name]).to_pydict()
    return dict(zip(rows["sequence"], rows[name], strict=True))


def _joined(sequences: Sequence[int], marks: Sequence[dict[int, object]]) -> list[list[int]]:
    """Groups of sequences that share any mark, directly or through others; empty marks join nothing."""
    parent = {number: number for number in sequences}

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for mark_of in marks:
        first: dict[object, int] = {}
        for number in sequences:
            if mark_of[number] != "":
                parent[root(number)] = root(first.setdefault(mark_of[number], number))
    groups: dict[int, list[int]] = {}
    for number in sequences:
        groups.setdefault(root(number), []).append(number)
    return list(groups.values())


def _filled(
    groups: Sequence[list[int]], wanted: float, seed: int, *, keep_one: bool = False
) -> list[int]:
    """Whole groups in random order until `wanted` sequences are nearest; at least one group, and if asked not all."""
    order = list(groups)
    random.Random(seed).shuffle(order)
    most = len(order) - 1 if keep_one else len(order)
    taken = list(order[0])
    for group in order[1:most]:
        if abs(len(taken) + len(group) - wanted) < abs(len(taken) - wanted):
            taken += group
    return sorted(taken)

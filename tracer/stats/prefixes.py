"""Prompts that begin alike: templates repeat the same routing and make it look more local than it is."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence

import numpy as np

from ..arrays import RoutingArrays
from .records import PrefixStats

MIN_PREFIX_TOKENS = 8
"""Shorter beginnings in common are a start token or chance, no template."""


def prefix_stats(routing: RoutingArrays, hashes: Sequence[str]) -> PrefixStats:
    """Look for prompts, in order, that begin as an earlier one did; `hashes` are those of the prompts' texts."""
    known = [text for text in hashes if text]
    repeated = len(known) - len(set(known))
    prompts = _prompts(routing)
    if prompts is None:
        return PrefixStats(
            prompts=len(hashes), repeated_prompts=repeated, shared=None, longest_tokens=0
        )
    lengths = shared_prefixes(prompts)
    counted = [length for length in lengths if length >= MIN_PREFIX_TOKENS]
    total = sum(len(prompt) for prompt in prompts)
    same = sum(length == len(prompt) for length, prompt in zip(lengths, prompts, strict=True))
    return PrefixStats(
        prompts=max(len(hashes), len(prompts)),
        repeated_prompts=repeated if known else same,
        shared=sum(counted) / max(1, total),
        longest_tokens=max(counted, default=0),
    )


def shared_prefixes(prompts: Sequence[np.ndarray]) -> list[int]:
    """Tokens that each prompt has in common with the beginning of some earlier one."""
    # In sorted order the nearest neighbours share the longest prefix; big-endian bytes sort as ids do.
    ordered: list[bytes] = []
    found: list[int] = []
    for prompt in prompts:
        key = prompt.astype(">u4").tobytes()
        place = bisect(ordered, key)
        near = ordered[max(0, place - 1) : place + 1]
        found.append(max((_common_tokens(key, other) for other in near), default=0))
        ordered.insert(place, key)
    return found


def _common_tokens(first: bytes, second: bytes) -> int:
    size = min(len(first), len(second)) // 4
    differ = np.frombuffer(first, ">u4", size) != np.frombuffer(second, ">u4", size)
    return int(np.argmax(differ)) if differ.any() else size


def _prompts(routing: RoutingArrays) -> list[np.ndarray] | None:
    """Token ids of each prompt, by number; None if they were not recorded."""
    rows = np.flatnonzero((routing.layer == 0) & ~routing.is_pad & ~routing.phase_is_decode)
    if not rows.size or (routing.token_id[rows] < 0).any():
        return None
    rows = rows[np.lexsort((routing.position[rows], routing.sequence[rows]))]
    bounds = np.flatnonzero(np.diff(routing.sequence[rows])) + 1
    return np.split(routing.token_id[rows], bounds)

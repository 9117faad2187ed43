"""How many distinct experts an event would need if more sequences ran together."""

from __future__ import annotations

import numpy as np

from .records import BatchStats
from .sample import TokenGrid

BATCHES = (2, 4, 8, 16, 32, 64)
MIN_GROUPS = 8
"""Virtual batches that a mean needs at least."""


def even_union(experts: int, top_k: int, tokens: int) -> float:
    """Distinct experts that `tokens` tokens need if each draws top-k of them evenly: E(1 - (1 - k/E)^n)."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def batch_stats(grid: TokenGrid, shares: np.ndarray) -> tuple[BatchStats, ...]:
    """Merge sequences into virtual batches of growing size; `shares` [layers, experts] is popularity."""
    tokens = grid.take(grid.is_decode) if grid.is_decode.any() else grid
    layers, top_k = grid.experts.shape[1:]
    experts = shares.shape[1]
    if not tokens.num_tokens:
        return ()
    index = _place_in_sequence(tokens.sequence)
    order = np.lexsort((tokens.sequence, index))
    alive = np.bincount(index)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(alive) - alive, alive)
    ids = tokens.experts[order]
    chance = np.minimum(shares * top_k, 1.0)
    found: list[BatchStats] = []
    for size in BATCHES:
        groups = alive // size
        if groups.sum() < MIN_GROUPS:
            break
        of_index = np.repeat(np.arange(len(alive)), alive)
        kept = rank < groups[of_index] * size
        group = (np.cumsum(groups) - groups)[of_index] + rank // size
        used = np.zeros((int(groups.sum()), layers, experts), dtype=bool)
        used[group[kept, None, None], np.arange(layers)[None, :, None], ids[kept]] = True
        found.append(
            BatchStats(
                sequences=size,
                distinct=float(used.sum() / used[..., 0].size),
                even=even_union(experts, top_k, size),
                by_popularity=float((1 - (1 - chance) ** size).sum(axis=1).mean()),
                groups=len(used),
            )
        )
    return tuple(found)


def _place_in_sequence(sequence: np.ndarray) -> np.ndarray:
    place = np.arange(len(sequence))
    return place - np.maximum.accumulate(np.where(np.diff(sequence, prepend=-1) != 0, place, 0))

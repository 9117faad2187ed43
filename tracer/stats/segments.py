"""Local routing consistency: how well few experts serve a run of neighbouring tokens.

Both measures are those of Liang et al., "Not All Models Suit Expert Offloading", arXiv 2505.16056, by the
definitions in the authors' published code (ljcleo/moe-lrc); the code here is our own.
"""

from __future__ import annotations

import numpy as np

from .records import CacheCoverage, SegmentStats
from .sample import TokenGrid

SEGMENT_TOKENS = (4, 16, 64)
AHEAD_TOKENS = 16
"""The segment length that the paper reports most, and that the cache here looks ahead."""
MULTIPLES = (1, 2, 3)
"""Slots as multiples of top-k: the paper finds 2 near the clairvoyant optimum."""
PIECE_TOKENS = 512
"""The longest run that one cache serves: many short runs side by side take few array operations."""
_CELLS = 1 << 23
"""Tokens times layers times experts that these measures look at: they cost the most, and settle soonest."""


def segment_stats(grid: TokenGrid, experts: int) -> tuple[SegmentStats, ...]:
    """Segment routing best performance at each length that the trace has segments of."""
    tokens = _some(grid, experts)
    run = _place_in_run(tokens.follows)
    found: list[SegmentStats] = []
    for length in SEGMENT_TOKENS:
        ends = np.flatnonzero(run >= length - 1)
        if ends.size:
            found.append(_best_fixed_set(tokens, experts, length, ends))
    return tuple(found)


def cache_coverage(grid: TokenGrid, experts: int) -> tuple[CacheCoverage, ...]:
    """Segment cache best hit rate at each multiple of top-k that leaves something out."""
    tokens = _some(grid, experts)
    if not tokens.num_tokens:
        return ()
    demand, is_there = _pieces(tokens, experts)
    top_k = tokens.experts.shape[2]
    return tuple(
        CacheCoverage(
            multiple=multiple,
            slots_per_layer=multiple * top_k,
            hits=_segment_cache(demand, is_there, multiple * top_k),
        )
        for multiple in MULTIPLES
        if multiple * top_k < experts
    )


def _some(grid: TokenGrid, experts: int) -> TokenGrid:
    return grid.head(max(1, _CELLS // (grid.experts.shape[1] * experts)))


def _place_in_run(follows: np.ndarray) -> np.ndarray:
    """How many tokens of the same run come before each token."""
    place = np.arange(len(follows))
    return place - np.maximum.accumulate(np.where(follows, 0, place))


def _best_fixed_set(tokens: TokenGrid, experts: int, length: int, ends: np.ndarray) -> SegmentStats:
    """F1 of "all experts chosen at least n times in the segment", at the n that serves all segments best."""
    histogram = np.zeros(length + 1, dtype=np.int64)
    layers = tokens.experts.shape[1]
    for layer in range(layers):
        chosen = np.zeros((tokens.num_tokens + 1, experts), dtype=np.int32)
        chosen[np.arange(1, tokens.num_tokens + 1)[:, None], tokens.experts[:, layer]] = 1
        np.cumsum(chosen, axis=0, out=chosen)
        counts = chosen[ends + 1] - chosen[ends + 1 - length]
        histogram += np.bincount(counts.reshape(-1), minlength=length + 1)
    sizes = np.cumsum(histogram[::-1])[::-1]  # sets hold this many experts at threshold n, in all
    matches = np.cumsum((histogram * np.arange(length + 1))[::-1])[::-1]
    score = 2 * matches / np.maximum(sizes * length + matches[0], 1)
    best = int(np.argmax(score))
    segments = len(ends) * layers
    return SegmentStats(
        tokens=length, srp=float(score[best]), experts=float(sizes[best] / segments)
    )


def _pieces(tokens: TokenGrid, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs cut into pieces that begin together: demand bool [time, pieces, layers, experts], and who still runs."""
    run = _place_in_run(tokens.follows)
    time = run % PIECE_TOKENS
    piece = np.cumsum(time == 0) - 1
    spread = (int(time.max()) + 1, int(piece[-1]) + 1, tokens.experts.shape[1], experts)
    demand = np.zeros(spread, dtype=bool)
    layer = np.arange(spread[2])[None, :, None]
    demand[time[:, None, None], piece[:, None, None], layer, tokens.experts] = True
    is_there = np.zeros(spread[:2], dtype=bool)
    is_there[time, piece] = True
    return demand, is_there


def _segment_cache(demand: np.ndarray, is_there: np.ndarray, slots: int) -> float:
    """Hit rate of caches that evict what the rest of the segment needs least, then what is least recent."""
    times, pieces, layers, experts = demand.shape
    lanes = demand.reshape(times, pieces * layers, experts)
    ahead = np.zeros(lanes.shape[1:], dtype=np.int64)
    for time in range(min(AHEAD_TOKENS, times)):
        ahead += lanes[time]
    resident = np.zeros(lanes.shape[1:], dtype=bool)
    recent = np.zeros(lanes.shape[1:], dtype=np.int64)
    evicted = 0
    for time in range(times):
        now = lanes[time]
        ahead -= now
        recent[now] = time + 1
        resident |= now
        over = np.maximum(resident.sum(axis=1) - slots, 0)
        evicted += int(over.sum())
        _evict(resident, now, ahead * (times + 2) + recent, over)
        if time + AHEAD_TOKENS < times:
            ahead += lanes[time + AHEAD_TOKENS]
    top_k = int(lanes[0].sum(axis=1).max())
    return 1 - evicted / max(1, int(is_there.sum()) * layers * top_k)


def _evict(resident: np.ndarray, now: np.ndarray, worth: np.ndarray, over: np.ndarray) -> None:
    most = int(over.max(initial=0))
    if not most:
        return
    worth = np.where(resident & ~now, worth, np.iinfo(np.int64).max)
    order = np.argpartition(worth, most - 1, axis=1)[:, :most]
    order = np.take_along_axis(
        order, np.argsort(np.take_along_axis(worth, order, axis=1), axis=1), axis=1
    )
    lane, place = np.nonzero(np.arange(most) < over[:, None])
    resident[lane, order[lane, place]] = False

"""How soon experts come back: from one token to the next, and in LRU stack distances of layer events."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .sample import Events, TokenGrid

_STEPS_AT_A_TIME = 1024
_PAIRS_AT_A_TIME = 1 << 16


@dataclass(frozen=True, slots=True)
class AdjacentReuse:
    """Experts that neighbouring tokens have in common: sums [layers] of shares, and the number of pairs."""

    sums: np.ndarray
    pairs: int

    @property
    def by_layer(self) -> tuple[float, ...]:
        """The mean share of each layer; nothing if there are no pairs."""
        return tuple((self.sums / self.pairs).tolist()) if self.pairs else ()

    @property
    def mean(self) -> float | None:
        """The mean over all layers, None if there are no pairs."""
        return float(self.sums.mean() / self.pairs) if self.pairs else None


def adjacent_reuse(grid: TokenGrid, *, is_decode: bool) -> AdjacentReuse:
    """Compare each token of a phase with the one before it in its sequence."""
    layers, top_k = grid.experts.shape[1:]
    after = np.flatnonzero(grid.follows & (grid.is_decode == is_decode))
    sums = np.zeros(layers)
    for first in range(0, len(after), _PAIRS_AT_A_TIME):
        chosen = after[first : first + _PAIRS_AT_A_TIME]
        new, old = grid.experts[chosen], grid.experts[chosen - 1]
        for place in range(top_k):
            sums += (new[..., place, None] == old).any(axis=2).sum(axis=0)
    return AdjacentReuse(sums / max(1, top_k), len(after))


def reuse_gap(events: Events, *, is_decode: bool) -> float | None:
    """Median number of a layer's events, of one phase, from one use of an expert to the next."""
    used = events.used[events.is_decode == is_decode]
    layer, expert, step = np.nonzero(np.ascontiguousarray(used.transpose(1, 2, 0)))
    is_same = (np.diff(layer) == 0) & (np.diff(expert) == 0)
    gaps = np.diff(step)[is_same]
    return float(np.median(gaps)) if gaps.size else None


@dataclass(frozen=True, slots=True)
class StackDistances:
    """Slots that an LRU of a layer's own needs for each demand of one phase to hit.

    `counts[d]` demands need exactly d slots; `cold` were never used before. Events are atomic and experts of one
    event are as recent as each other, ties by number (docs/adr/0009).
    """

    counts: np.ndarray
    cold: int

    @property
    def demands(self) -> int:
        """All demands."""
        return int(self.counts.sum()) + self.cold

    def hits(self, slots: int) -> float:
        """Hit rate with so many slots per layer."""
        return float(self.counts[: slots + 1].sum() / max(1, self.demands))

    def quantiles(self, shares: tuple[float, ...]) -> tuple[float, ...]:
        """Slots by share of the demands that are not first uses; nothing if there are none."""
        done = np.cumsum(self.counts)
        if not done[-1]:
            return ()
        return tuple(float(np.searchsorted(done, share * done[-1])) for share in shares)


def stack_distances(events: Events, *, is_decode: bool) -> StackDistances:
    """Distances of one phase's demands; the other phase's events pass through the LRU uncounted."""
    steps, layers, experts = events.used.shape
    counts, cold = np.zeros(experts + 1, dtype=np.int64), 0
    recent = np.full((1, layers, experts), -1, dtype=np.int64)  # step * experts + expert
    for first in range(0, steps, _STEPS_AT_A_TIME):
        part = slice(first, min(first + _STEPS_AT_A_TIME, steps))
        used = events.used[part]
        stamp = np.arange(part.start, part.stop)[:, None, None] * experts + np.arange(experts)
        seen = np.concatenate([recent, np.where(used, stamp, -1)])
        np.maximum.accumulate(seen, axis=0, out=seen)
        before, recent = seen[:-1], seen[-1:]
        demanded = np.nonzero(used & (events.is_decode[part] == is_decode)[:, None, None])
        distances = _ranks(before, demanded)
        counts += np.bincount(distances, minlength=experts + 1)
        cold += int((distances == 0).sum())
    counts[0] = 0
    return StackDistances(counts, cold)


def _ranks(before: np.ndarray, demanded: tuple[np.ndarray, ...]) -> np.ndarray:
    """Place of each demand in its layer's order of recency, from 1; 0 if it was never used."""
    step, layer, expert = demanded
    ranks = np.zeros(len(step), dtype=np.int64)
    for first in range(0, len(step), _PAIRS_AT_A_TIME):
        part = slice(first, first + _PAIRS_AT_A_TIME)
        order = before[step[part], layer[part]]
        own = order[np.arange(len(order)), expert[part]]
        ranks[part] = np.where(own < 0, 0, 1 + (order > own[:, None]).sum(axis=1))
    return ranks

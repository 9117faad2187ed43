"""What a token's experts say about its other experts: of the next layer, and of the same one."""

from __future__ import annotations

import numpy as np

from ..arrays import NO_EXPERT
from .records import Coactivation, LookaheadStats, TransitionStats
from .sample import TokenGrid

TRANSITION_TOKENS = 1 << 14
"""Tokens that transitions are learnt on and judged by, half each."""
MIN_TOGETHER = 5
"""Tokens that must be expected to choose a pair by popularity alone before its lift says anything."""
SHOWN_PAIRS = 5


def transition_stats(grid: TokenGrid, experts: int) -> TransitionStats | None:
    """Predict each next layer from the one before it; None for one layer, or too few tokens to learn from."""
    tokens = grid.head(TRANSITION_TOKENS)
    layers, top_k = tokens.experts.shape[1:]
    known, judged = _halves(tokens)
    if layers < 2 or min(len(known), len(judged)) < experts:
        return None
    found = popular = 0
    for layer in range(layers - 1):
        table = _together(known[:, layer], known[:, layer + 1], experts)
        table = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        truth = judged[:, layer + 1]
        score = np.zeros((len(judged), experts))
        for place in range(top_k):
            score += table[judged[:, layer, place]]
        found += _common(_best(score, top_k), truth)
        often = np.bincount(known[:, layer + 1].reshape(-1), minlength=experts)
        popular += _common(np.broadcast_to(_best(often[None], top_k), truth.shape), truth)
    asked = len(judged) * (layers - 1) * top_k
    return TransitionStats(accuracy=found / asked, popular=popular / asked, even=top_k / experts)


def lookahead_stats(grid: TokenGrid) -> tuple[LookaheadStats, ...]:
    """Judge every recorded depth of look-ahead."""
    layers = grid.experts.shape[1]
    found: list[LookaheadStats] = []
    for depth, ids in sorted(grid.lookahead.items()):
        said, truth = ids[:, : max(0, layers - depth)], grid.experts[:, depth:]
        is_there = (said != NO_EXPERT).any(axis=2)
        if is_there.any():
            right = _common(said[is_there], truth[is_there])
            found.append(LookaheadStats(depth=depth, accuracy=right / truth[is_there].size))
    return tuple(found)


def coactivation(
    grid: TokenGrid, experts: int, shown: int = SHOWN_PAIRS
) -> tuple[Coactivation, ...]:
    """The pairs of one layer with the greatest lift, over all layers."""
    tokens = grid.head(TRANSITION_TOKENS)
    number = tokens.num_tokens
    found: list[Coactivation] = []
    for layer in range(tokens.experts.shape[1]):
        ids = tokens.experts[:, layer]
        together = _together(ids, ids, experts)
        alone = np.diag(together)
        expected = np.outer(alone, alone) / max(1, number)
        is_pair = np.triu(np.ones((experts, experts), dtype=bool), 1) & (expected >= MIN_TOGETHER)
        lift = np.where(is_pair, together / np.maximum(expected, 1e-12), 0.0)
        for place in np.argsort(-lift, axis=None, kind="stable")[:shown]:
            first, second = divmod(int(place), experts)
            if lift[first, second] > 0:
                found.append(
                    Coactivation(
                        layer=layer,
                        first=first,
                        second=second,
                        lift=float(lift[first, second]),
                        share=float(together[first, second] / number),
                    )
                )
    return tuple(sorted(found, key=lambda pair: -pair.lift)[:shown])


def _halves(tokens: TokenGrid) -> tuple[np.ndarray, np.ndarray]:
    """Experts of the tokens to learn from and to judge by: sequences by turns, or one sequence cut in two."""
    sequences, number = np.unique(tokens.sequence, return_inverse=True)
    if len(sequences) < 2:
        middle = tokens.num_tokens // 2
        return tokens.experts[:middle], tokens.experts[middle:]
    is_known = number % 2 == 0
    return tokens.experts[is_known], tokens.experts[~is_known]


def _together(first: np.ndarray, second: np.ndarray, experts: int) -> np.ndarray:
    """How many tokens have expert a in `first` [tokens, k] and b in `second`: [experts, experts]."""
    counts = np.zeros(experts * experts, dtype=np.int64)
    for place in range(first.shape[1]):
        key = first[:, place, None].astype(np.int64) * experts + second
        counts += np.bincount(key.reshape(-1), minlength=experts * experts)
    return counts.reshape(experts, experts)


def _best(score: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-score, axis=1, kind="stable")[:, :count]


def _common(said: np.ndarray, truth: np.ndarray) -> int:
    """How many of `truth` [rows, k] are among `said` [rows, k]."""
    return sum(
        int((truth[:, place, None] == said).any(axis=1).sum()) for place in range(truth.shape[1])
    )

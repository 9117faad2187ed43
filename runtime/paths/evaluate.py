"""How good predicted paths are: recall and precision by layer, of single tokens and of merged batches.

Recall ignores what is named in vain, so precision stands next to it everywhere. Simple predictors that need no
training are judged on the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...tracer.store import NO_EXPERT
from .data import Routed, Split

MERGED = (1, 2, 4, 8, 16)
"""Batch sizes at which sets of tokens are joined."""


def widths(top_k: int, num_experts: int) -> dict[str, int]:
    """Experts named per token and layer, by name: k, 1.5k (rounded up) and 2k."""
    sizes = {"k": top_k, "1.5k": math.ceil(1.5 * top_k), "2k": 2 * top_k}
    return {name: min(size, num_experts) for name, size in sizes.items()}


def decode_tokens(found: Routed, sequences: np.ndarray) -> np.ndarray:
    """Tokens of these sequences that were fed after the prompt."""
    tokens = found.tokens_of(sequences)
    return tokens[found.is_decode()[tokens]]


def recall_at(ranked: np.ndarray, experts: np.ndarray, most: int) -> np.ndarray:
    """Share of each token's experts among the first `most` named: [tokens, layers], NaN where nothing is known.

    `ranked` [tokens, layers, ≥ most], `experts` [tokens, layers, top_k].
    """
    found = (experts[..., :, None] == ranked[..., None, :most]) & (experts != NO_EXPERT)[..., None]
    recall = found.any(axis=-1).mean(axis=-1)
    return np.where((experts != NO_EXPERT).all(axis=-1), recall, np.nan)


def scores(ranked: np.ndarray, experts: np.ndarray, num_experts: int) -> dict[str, Any]:
    """Recall and precision at k, 1.5k and 2k: means over tokens by layer, and over layers."""
    top_k = experts.shape[-1]
    found: dict[str, Any] = {"tokens": len(experts)}
    for name, most in widths(top_k, num_experts).items():
        recall = _by_layer(recall_at(ranked, experts, most))
        found[name] = {
            "recall": _mean(recall),
            "precision": _mean(recall * top_k / most),
            "recall_by_layer": recall.round(4).tolist(),
        }
    return found


def merged_scores(
    found: Routed, ranked: np.ndarray, sequences: np.ndarray, seed: int
) -> dict[str, Any]:
    """Recall and precision of the experts of whole batches: tokens at the same decode step of different prompts.

    The paper's B_acc is the recall. Batches are drawn once; those that cannot be filled are left out.
    """
    order = np.random.default_rng(seed).permutation(sequences)
    longest = int((found.first[1:] - found.decode)[order].max(initial=0))
    result: dict[str, Any] = {}
    for size in MERGED:
        groups: list[np.ndarray] = []
        for step in range(longest):
            tokens = found.decode[order] + step
            tokens = tokens[tokens < found.first[order + 1]]
            full = len(tokens) // size * size
            groups.append(tokens[:full].reshape(-1, size))
        batches = np.concatenate(groups) if groups else np.empty((0, size), np.int64)
        if not len(batches):
            continue
        truth = _sets(found.experts, batches, found.top_k, found.num_experts)
        row: dict[str, Any] = {"batches": len(batches), "distinct": _mean(truth.sum(axis=-1))}
        for name, most in widths(found.top_k, found.num_experts).items():
            named = _sets(ranked, batches, most, found.num_experts)
            hits = (truth & named).sum(axis=-1)
            row[name] = {
                "recall": _mean(hits / np.maximum(1, truth.sum(axis=-1))),
                "precision": _mean(hits / np.maximum(1, named.sum(axis=-1))),
            }
        result[str(size)] = row
    return result


def baselines(found: Routed, split: Split) -> Mapping[str, np.ndarray]:
    """Rankings of predictors without a network, for all tokens: [tokens, layers, 2k].

    What they count, they count over training prompts.
    """
    most = widths(found.top_k, found.num_experts)["2k"]
    tokens = found.tokens_of(split.sequences["train"])
    popularity = _counts(found, tokens, np.zeros(len(tokens), np.int64), 1)[0]
    # Below one, so that it only breaks ties of whole counts.
    popular = popularity / (popularity.max() + 1.0)
    return {
        "previous_token": _previous_token(found, popular, most),
        "token_table": _token_table(found, tokens, popular, most),
        "popularity": np.broadcast_to(
            _largest(popular[None], most), (len(found.token), found.num_layers, most)
        ),
    }


def chance(top_k: int, num_experts: int) -> dict[str, float]:
    """Recall of naming experts at random."""
    return {name: most / num_experts for name, most in widths(top_k, num_experts).items()}


def _previous_token(found: Routed, popular: np.ndarray, most: int) -> np.ndarray:
    """The last token's experts, then those of the tokens before it, then popular ones."""
    tokens = np.arange(len(found.token))
    first = found.first[found.sequence_of()]
    ranked = np.empty((len(tokens), found.num_layers, most), np.uint16)
    for part in _parts(len(tokens), found):
        score = np.repeat(popular[None], len(part), axis=0)
        for back in (3, 2, 1):
            place = part - back
            is_there = place >= first[part]
            _mark(score, is_there, found.experts[np.maximum(place, 0)], 4.0 - back)
        ranked[part] = _largest(score, most)
    return ranked


def _token_table(found: Routed, tokens: np.ndarray, popular: np.ndarray, most: int) -> np.ndarray:
    """What the same token id used in training, most often first."""
    ids, place = np.unique(found.token[tokens], return_inverse=True)
    table = _largest(_counts(found, tokens, place, len(ids)) + popular, most)
    table = np.concatenate((table, _largest(popular[None], most)))
    where = np.minimum(np.searchsorted(ids, found.token), len(ids) - 1)
    where[ids[where] != found.token] = len(ids)
    return table[where]


def _counts(found: Routed, tokens: np.ndarray, place: np.ndarray, rows: int) -> np.ndarray:
    """Demands by row, layer and expert: [rows, layers, experts]."""
    layers, experts = found.num_layers, found.num_experts
    counts = np.zeros((rows, layers, experts + 1), np.float32)
    chosen = np.minimum(
        found.experts[tokens].astype(np.int64), experts
    )  # unknown: one past the last
    layer = np.arange(layers)[None, :, None]
    np.add.at(counts, (place[:, None, None], layer, chosen), 1.0)
    return counts[..., :experts]


def _mark(score: np.ndarray, is_there: np.ndarray, experts: np.ndarray, value: float) -> None:
    known = is_there[:, None, None] & (experts != NO_EXPERT)
    row, layer, place = np.nonzero(known)
    score[row, layer, experts[row, layer, place]] = value


def _largest(score: np.ndarray, most: int) -> np.ndarray:
    return np.argsort(-score, axis=-1, kind="stable")[..., :most].astype(np.uint16)


def _parts(count: int, found: Routed) -> list[np.ndarray]:
    size = max(1, 20_000_000 // (found.num_layers * found.num_experts))
    return [np.arange(start, min(count, start + size)) for start in range(0, count, size)]


def _sets(ids: np.ndarray, batches: np.ndarray, most: int, num_experts: int) -> np.ndarray:
    """Experts of any token of each batch: [batches, layers, experts]."""
    layers = ids.shape[1]
    found = np.zeros((len(batches), layers, num_experts + 1), dtype=bool)
    row = np.arange(len(batches))[:, None, None]
    layer = np.arange(layers)[None, :, None]
    for column in batches.T:
        named = np.minimum(ids[column][..., :most].astype(np.int64), num_experts)
        found[row, layer, named] = True
    return found[..., :num_experts]


def _by_layer(recall: np.ndarray) -> np.ndarray:
    """Means over tokens, layer by layer; layers of which nothing is known are left at 0."""
    known = ~np.isnan(recall)
    return np.nansum(recall, axis=0) / np.maximum(1, known.sum(axis=0))


def _mean(values: np.ndarray) -> float:
    return round(float(np.nanmean(values)), 4) if np.size(values) else 0.0

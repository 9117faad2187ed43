"""Lays recorded routing out over a model of another shape: the same way each time, and no statistics invented.

Layers beyond the recorded ones and choices beyond the recorded top-k are taken from other sequences of the same
recording, so that each block of layers and each block of experts keeps the reuse, popularity and look-ahead that
was recorded, and blocks know nothing of each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...tracer.arrays import NO_EXPERT
from ...tracer.errors import UsageError
from .routing import TokenRouting

_ROTATION = 7919
"""Tokens by which a sequence is turned when it must serve a second time: prime, so that it seldom meets itself."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """A block of experts: ids from `start` on, `width` of them, of which each token chooses `picks`."""

    start: int
    width: int
    picks: int


def stretched(routing: TokenRouting, *, layers: int, experts: int, top_k: int) -> TokenRouting:
    """The routing of a model with so many MoE layers and experts.

    Layer l repeats recorded layer l mod n, and expert ids fall into as many equal blocks as top-k needs. Each (group of
    layers, block) follows the tokens of another sequence. A recorded expert j stands at j mod the block's width; where
    two meet, the second moves to the next free one. Raises UsageError if that cannot be.
    """
    if (routing.num_layers, routing.num_experts, routing.top_k) == (layers, experts, top_k):
        return routing
    tiles = _tiles(routing, experts, top_k)
    found = np.empty((len(routing.experts), layers, top_k), np.uint16)
    weights = None if routing.weights is None else np.empty(found.shape, np.float32)
    ahead = {depth: np.full(found.shape, NO_EXPERT, np.uint16) for depth in routing.lookahead}
    order = _by_rank(tiles)
    for layer in range(layers):
        group, source = divmod(layer, routing.num_layers)
        rows = [_rows(routing, group * len(tiles) + place) for place in range(len(tiles))]
        found[:, layer] = _placed(routing.experts, rows, source, tiles)[:, order]
        if weights is not None:
            weights[:, layer] = _gates(routing, rows, source, tiles)[:, order]
        for depth, ids in routing.lookahead.items():
            is_known = source + depth < routing.num_layers and layer + depth < layers
            if is_known and (ids[:, source] != NO_EXPERT).all():
                ahead[depth][:, layer] = _placed(ids, rows, source, tiles)[:, order]
    return replace(
        routing,
        experts=found,
        weights=weights,
        lookahead=ahead,
        num_experts=experts,
        notes=(*routing.notes, *_notes(routing, layers, experts, top_k, tiles)),
    )


def _tiles(routing: TokenRouting, experts: int, top_k: int) -> list[_Tile]:
    count = -(-top_k // routing.top_k)
    ends = [experts * (place + 1) // count for place in range(count)]
    starts = [0, *ends[:-1]]
    tiles = [
        _Tile(start, end - start, top_k // count + (place < top_k % count))
        for place, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    for tile in tiles:
        if tile.picks > tile.width:
            raise UsageError(
                f"top {top_k} of {experts} experts cannot be laid out in blocks of {tile.width}. Replay routing "
                "that was recorded with a top-k nearer to the model's."
            )
    return tiles


def _by_rank(tiles: list[_Tile]) -> np.ndarray:
    """Columns of all tiles in order of rank, so that the likeliest experts come first."""
    ranks = [rank for tile in tiles for rank in range(tile.picks)]
    return np.argsort(ranks, kind="stable")


def _rows(routing: TokenRouting, shift: int) -> np.ndarray:
    """The token that stands in for each: at the same place in the sequence `shift` further on, around if need be."""
    count, lengths = len(routing.lengths), routing.lengths
    sequence = np.repeat(np.arange(count), lengths)
    other = (sequence + shift) % count
    place = np.arange(len(sequence)) - routing.first[sequence]
    turned = place + shift // count * _ROTATION
    return routing.first[other] + turned % lengths[other]


def _placed(ids: np.ndarray, rows: list[np.ndarray], source: int, tiles: list[_Tile]) -> np.ndarray:
    """Experts of one layer, tile after tile: [tokens, top_k]."""
    parts = []
    for tile, tokens in zip(tiles, rows, strict=True):
        inside = ids[tokens, source, : tile.picks].astype(np.int64) % tile.width
        parts.append(tile.start + _apart(inside, tile.width))
    return np.concatenate(parts, axis=1).astype(np.uint16)


def _apart(ids: np.ndarray, width: int) -> np.ndarray:
    """Move what meets an earlier choice of its token to the next free id below `width`: [tokens, picks]."""
    for rank in range(1, ids.shape[1]):
        while (meets := (ids[:, :rank] == ids[:, rank : rank + 1]).any(axis=1)).any():
            ids[meets, rank] = (ids[meets, rank] + 1) % width
    return ids


def _gates(
    routing: TokenRouting, rows: list[np.ndarray], source: int, tiles: list[_Tile]
) -> np.ndarray:
    """Gate weights of one layer, their sum over a token that of a recorded one: [tokens, top_k]."""
    assert routing.weights is not None
    parts = [
        routing.weights[tokens, source, : tile.picks]
        for tile, tokens in zip(tiles, rows, strict=True)
    ]
    return np.concatenate(parts, axis=1) / len(tiles)


def _notes(
    routing: TokenRouting, layers: int, experts: int, top_k: int, tiles: list[_Tile]
) -> list[str]:
    notes = [
        f"Stretched from {routing.num_layers} layers of {routing.num_experts} experts, top {routing.top_k}, to "
        f"{layers} of {experts}, top {top_k}: groups of layers and blocks of experts follow different sequences."
    ]
    unused = sum(max(0, tile.width - routing.num_experts) for tile in tiles)
    if unused:
        notes.append(
            f"{unused} of {experts} experts of each layer are never chosen: more is held than was recorded."
        )
    needed = -(-layers // routing.num_layers) * len(tiles)
    if needed > len(routing.lengths):
        notes.append(
            f"{needed} sequences were needed and {len(routing.lengths)} were recorded: some serve twice, turned."
        )
    return notes

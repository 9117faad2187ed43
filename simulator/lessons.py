"""What predictors learn from a trace, as tables that fit into policy.json (policy.base.LESSONS).

A table holds at most about 200 000 numbers, so that a policy stays under a megabyte: rare followers, rare tokens and
repeated sequences are left out. They are kept as text (policy.tables), layers separated by `|`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..tracer.errors import UsageError
from ..tracer.store import NO_EXPERT
from .policy.base import LESSONS
from .policy.tables import packed
from .token_table import TokenTable
from .workload import Workload

MOST_NUMBERS = 200_000
"""Numbers in one table at most."""
_FOLLOWERS = 16
_MATRICES = 64
_MAPS = 1000
_SEQUENCES = 2000
"""Sequences that the collection of activation matrices is chosen from at most, evenly over the trace."""
_ROUNDS = 10
_UNKNOWN = -1


def lessons_of(workload: Workload, needs: Iterable[str]) -> dict[str, Any]:
    """The tables among `needs`, by need, learned from a workload. Raises UsageError for what it cannot teach."""
    wanted = sorted(set(needs) & set(LESSONS))
    if not wanted:
        return {}
    tokens = TokenTable.of(workload)
    found = {need: _LEARNERS[need](tokens) for need in wanted if need in _LEARNERS}
    if "forest" in wanted:
        from .forest import learn_forest

        found["forest"] = learn_forest(workload)
    return found


def has_token_ids(workload: Workload) -> bool:
    """Whether the ids of the tokens were recorded (imported traces may lack them)."""
    token = workload.rows.token
    return token is not None and bool((token >= 0).any())


def transitions(tokens: TokenTable) -> list[str]:
    """By layer and expert its followers in the next layer, each with its share of the expert's tokens in thousandths.

    After the last layer comes the first one of the sequence's next token.
    """
    experts, layers, width = tokens.experts, tokens.experts.shape[1], tokens.num_experts
    most = min(width, _FOLLOWERS, max(1, MOST_NUMBERS // (2 * layers * width)))
    is_last = np.zeros(len(experts), bool)
    is_last[tokens.first[1:] - 1] = True
    found: list[str] = []
    for layer in range(layers):
        here, there = experts[:, layer], experts[:, (layer + 1) % layers]
        if layer == layers - 1:
            here, there = here[:-1][~is_last[:-1]], there[1:][~is_last[:-1]]
        shares = _followers(here, there, width)
        found.append(packed(_best_pairs(row, most) for row in shares))
    return found


def token_table(tokens: TokenTable) -> dict[str, str]:
    """By token id the experts it used most often, twice top-k by layer at most; by -1 those of all tokens.

    The most frequent ids, as many as there is room for.
    """
    if tokens.ids is None or not (tokens.ids >= 0).any():
        raise UsageError("The trace did not record token ids, so there is no table of them.")
    _, layers, top_k = tokens.experts.shape
    most = min(2 * top_k, tokens.num_experts)
    ids, frequency = np.unique(tokens.ids[tokens.ids >= 0], return_counts=True)
    order = np.argsort(-frequency, kind="stable")[: MOST_NUMBERS // (layers * top_k)]
    kept = np.sort(ids[order])
    place = np.searchsorted(kept, tokens.ids).clip(max=len(kept) - 1)
    counts = _counts(tokens, np.where(kept[place] == tokens.ids, place, _UNKNOWN), len(kept))
    everybody = _counts(tokens, np.zeros(len(tokens.ids), np.int64), 1)[0]
    table = {str(_UNKNOWN): packed(_best(row, most) for row in everybody)}
    left = MOST_NUMBERS
    for token in ids[order].tolist():
        rows = [_best(row, most) for row in counts[np.searchsorted(kept, token)]]
        left -= sum(map(len, rows))
        if left < 0:
            break
        table[str(token)] = packed(rows)
    return table


def activations(tokens: TokenTable) -> list[str]:
    """Activation matrices that stand for those of all sequences: experts by layer, with shares in thousandths.

    Medoids by cosine: the most different sequences first, then moved to the middle of those nearest to each.
    """
    count, layers = tokens.num_sequences, tokens.experts.shape[1]
    chosen = np.unique(np.linspace(0, count - 1, min(count, _SEQUENCES)).round().astype(np.int64))
    number = np.repeat(np.arange(count), np.diff(tokens.first))
    place = np.searchsorted(chosen, number).clip(max=len(chosen) - 1)
    counts = _counts(tokens, np.where(chosen[place] == number, place, _UNKNOWN), len(chosen))
    lengths = np.maximum(counts.sum(axis=2, keepdims=True), 1) / tokens.experts.shape[2]
    shares = np.rint(1000 * counts / lengths).astype(np.int64)
    most = max(1, min(_MATRICES, MOST_NUMBERS // (2 * layers * tokens.num_experts)))
    kept = _medoids(shares.reshape(len(chosen), -1).astype(np.float64), most)
    return [packed(_best_pairs(row, len(row)) for row in shares[one]) for one in kept]


def maps(tokens: TokenTable) -> list[str]:
    """Paths of single tokens through all layers, evenly over the trace, none twice."""
    _, layers, top_k = tokens.experts.shape
    most = max(1, min(_MAPS, MOST_NUMBERS // (layers * top_k)))
    whole = np.flatnonzero((tokens.experts != NO_EXPERT).all(axis=(1, 2)))
    paths = np.sort(tokens.experts[_evenly(whole, 4 * most)], axis=2)
    _, first = np.unique(paths, axis=0, return_index=True)
    kept = paths[_evenly(np.sort(first), most)]
    if not len(kept):
        raise UsageError("No token of the trace was recorded in all layers, so there are no paths.")
    return [packed(path) for path in kept.tolist()]


_LEARNERS: dict[str, Callable[[TokenTable], Any]] = {
    "transitions": transitions,
    "token_table": token_table,
    "activations": activations,
    "maps": maps,
}


def _followers(here: np.ndarray, there: np.ndarray, width: int) -> np.ndarray:
    """Share of an expert's tokens that go to each expert of the next layer, in thousandths: [experts, experts]."""
    is_known = (here != NO_EXPERT).any(axis=1) & (there != NO_EXPERT).any(axis=1)
    here, there = here[is_known].astype(np.int64), there[is_known].astype(np.int64)
    pairs = np.zeros(width * width, np.int64)
    for first in here.T:
        for second in there.T:
            is_real = (first != NO_EXPERT) & (second != NO_EXPERT)
            pairs += np.bincount(first[is_real] * width + second[is_real], minlength=width * width)
    used = np.bincount(here[here != NO_EXPERT], minlength=width)
    return np.rint(1000 * pairs.reshape(width, width) / np.maximum(used, 1)[:, None]).astype(int)


def _counts(tokens: TokenTable, group: np.ndarray, groups: int) -> np.ndarray:
    """Tokens of each group by layer and expert; group _UNKNOWN is left out: [groups, layers, experts]."""
    layers, width = tokens.experts.shape[1], tokens.num_experts
    counts = np.zeros((groups, layers, width), np.int64)
    is_known = group != _UNKNOWN
    for layer in range(layers):
        experts = tokens.experts[is_known, layer]
        keys = (group[is_known, None] * width + experts)[experts != NO_EXPERT]
        counts[:, layer] = np.bincount(keys, minlength=groups * width).reshape(groups, width)
    return counts


def _best(counts: np.ndarray, most: int) -> list[int]:
    """Numbers with the highest counts above 0, highest first."""
    order = np.argsort(-counts, kind="stable")[:most]
    return order[counts[order] > 0].tolist()


def _best_pairs(shares: np.ndarray, most: int) -> list[int]:
    """The same, each followed by what it has."""
    order = _best(shares, most)
    return np.ravel(np.stack((order, shares[order]), axis=1)).tolist() if order else []


def _evenly(places: np.ndarray, most: int) -> np.ndarray:
    if len(places) <= most:
        return places
    return places[np.arange(most) * len(places) // most]


def _medoids(vectors: np.ndarray, most: int) -> list[int]:
    """Rows that stand for all rows, ascending: k-medoids by cosine from the most different ones."""
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    likeness = units @ units.T
    kept = [int(likeness.sum(axis=1).argmax())]
    while len(kept) < min(most, len(units)):
        nearest = likeness[:, kept].max(axis=1)
        if nearest.min() > 1.0 - 1e-9:
            break  # the others are there already
        kept.append(int(nearest.argmin()))
    for _ in range(_ROUNDS):
        owner = likeness[:, kept].argmax(axis=1)
        moved = [_middle(likeness, np.flatnonzero(owner == n), one) for n, one in enumerate(kept)]
        if moved == kept:
            break
        kept = moved
    return sorted(set(kept))


def _middle(likeness: np.ndarray, members: np.ndarray, default: int) -> int:
    if not len(members):
        return default
    return int(members[likeness[np.ix_(members, members)].sum(axis=1).argmax()])

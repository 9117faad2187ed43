"""Which part of a large trace the costlier statistics look at, and its tokens as one dense array."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import RoutingArrays

SAMPLE_ROWS = 1 << 20
SAMPLE_CELLS = 1 << 26
"""Rows, and rows times experts, that a statistic holds in memory; popularity alone counts every row."""
STEP_RUNS = 8
"""Runs of neighbouring steps that a sample of steps is made of, spread over the trace."""


def row_limit(experts: int) -> int:
    """Rows a sample may have."""
    return max(1, min(SAMPLE_ROWS, SAMPLE_CELLS // experts))


def of_steps(routing: RoutingArrays, limit: int) -> np.ndarray:
    """Rows of whole steps, about `limit` of them: indices in recorded order."""
    rows = len(routing.step)
    if rows <= limit:
        return np.arange(rows)
    counts = np.bincount(routing.step)
    per_run = limit // STEP_RUNS
    done = np.cumsum(counts) - counts  # rows before each step
    within = done % (rows // STEP_RUNS)
    return np.flatnonzero((within < per_run)[routing.step])


def of_sequences(routing: RoutingArrays, limit: int) -> np.ndarray:
    """Rows of whole sequences, about `limit` of them: indices in recorded order.

    Sequences are spread over the trace. One that is longer than the limit is cut at its end.
    """
    rows = len(routing.step)
    if rows <= limit:
        return np.arange(rows)
    counts = np.bincount(routing.sequence)
    present = np.flatnonzero(counts)
    kept = np.zeros(len(counts), dtype=bool)
    kept[present[:: -(-rows // limit)]] = True
    chosen = np.flatnonzero(kept[routing.sequence])
    if len(chosen) <= 2 * limit:
        return chosen
    position = routing.position[chosen]
    end = np.partition(position, limit)[limit]
    return chosen[position < end]


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """Tokens with the experts of every layer, by sequence and position; padding left out.

    `experts` is uint16 [tokens, layers, top_k], `lookahead[d]` alike; the others are [tokens]. A token that lacks
    a layer, or has one twice, is not in it. `follows[i]`: token i comes right after token i - 1.
    """

    sequence: np.ndarray
    position: np.ndarray
    is_decode: np.ndarray
    experts: np.ndarray
    lookahead: dict[int, np.ndarray]
    follows: np.ndarray

    @classmethod
    def of(cls, routing: RoutingArrays, layers: int, chosen: np.ndarray) -> TokenGrid:
        """Gather the rows `chosen` into tokens."""
        rows = chosen[~routing.is_pad[chosen]]
        span = int(routing.position[rows].max(initial=0)) + 2  # one number of room: no touching
        token = routing.sequence[rows].astype(np.int64) * span + routing.position[rows]
        place = token * layers + routing.layer[rows]
        order = np.argsort(place, kind="stable")
        rows, token, place = rows[order], token[order], place[order]
        firsts = np.flatnonzero(np.diff(token, prepend=-1))
        sizes = np.diff(np.append(firsts, len(token)))
        firsts = firsts[sizes == layers]
        whole = firsts[:, None] + np.arange(layers)
        is_once = (place[whole] == place[firsts, None] + np.arange(layers)).all(axis=1)
        table = rows[whole[is_once]]
        first, key = table[:, 0], token[firsts[is_once]]
        return cls(
            sequence=routing.sequence[first],
            position=routing.position[first],
            is_decode=routing.phase_is_decode[first],
            experts=routing.experts[table],
            lookahead={depth: ids[table] for depth, ids in routing.lookahead.items()},
            follows=np.diff(key, prepend=-2) == 1,
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.sequence)

    def take(self, tokens: np.ndarray) -> TokenGrid:
        """Some of the tokens, given as a mask or as ascending indices without look-ahead."""
        chosen = np.flatnonzero(tokens) if tokens.dtype == bool else tokens
        is_next = np.diff(chosen, prepend=-2) == 1
        return TokenGrid(
            sequence=self.sequence[chosen],
            position=self.position[chosen],
            is_decode=self.is_decode[chosen],
            experts=self.experts[chosen],
            lookahead={},
            follows=self.follows[chosen] & is_next,
        )

    def head(self, limit: int) -> TokenGrid:
        """At most `limit` tokens: runs of neighbours, spread over all of them."""
        if self.num_tokens <= limit:
            return self.take(np.arange(self.num_tokens))
        stride = self.num_tokens // STEP_RUNS
        place = np.arange(self.num_tokens)
        return self.take(place[place % stride < limit // STEP_RUNS][:limit])


@dataclass(frozen=True, slots=True)
class Events:
    """Which experts each layer event demands, padding included: `used` bool [steps, layers, experts]."""

    used: np.ndarray
    is_decode: np.ndarray

    @classmethod
    def of(cls, routing: RoutingArrays, layers: int, experts: int, chosen: np.ndarray) -> Events:
        """Gather the rows `chosen`; steps keep their order and lose their gaps."""
        step, index = np.unique(routing.step[chosen], return_inverse=True)
        used = np.zeros((len(step), layers, experts), dtype=bool)
        used[index[:, None], routing.layer[chosen, None], routing.experts[chosen]] = True
        is_decode = np.zeros(len(step), dtype=bool)
        is_decode[index[routing.phase_is_decode[chosen]]] = True
        return cls(used, is_decode)

    def sizes(self, *, is_decode: bool) -> np.ndarray:
        """Distinct experts of each event of one phase: [steps, layers]."""
        return self.used[self.is_decode == is_decode].sum(axis=2)

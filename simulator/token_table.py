"""Recorded routing by sequence and token, so that tokens can be run together in other passes than they were.

A request takes a recorded sequence: its prompt's rows, then one row per token generated after the first. Padding is
left behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..tracer.store import NO_EXPERT
from .workload import Rows, Steps, Workload, build_workload


@dataclass(slots=True, eq=False)
class Pass:
    """One forward pass to be: `tokens` are places in a token table, each fed for the request in `owners`.

    `members` are the requests that get a token from it. `positions` of the KV cache are full when it ends.
    """

    number: int
    is_decode: bool
    batch: int
    context: int
    positions: int = 0
    tokens: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    members: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTable:
    """Tokens of all sequences, one sequence after the other.

    `experts` [tokens, layers, top_k], as are `weights` and each of `lookahead`. Sequence i has the tokens `first[i]`
    to `first[i + 1]`, of which `prompts[i]` are its prompt. Where a layer recorded no row for a token, its experts are
    NO_EXPERT (`has_holes`). `ids` [tokens] are the vocabulary's, None if they were not recorded. `score_ids` and
    `scores` [tokens, layers, m] are as in Rows.
    """

    experts: np.ndarray
    weights: np.ndarray | None
    lookahead: Mapping[int, np.ndarray]
    ids: np.ndarray | None
    has_holes: bool
    first: np.ndarray
    prompts: np.ndarray
    num_experts: int
    lookahead_depth: int
    score_ids: np.ndarray | None = None
    scores: np.ndarray | None = None

    @property
    def num_sequences(self) -> int:
        """Recorded sequences."""
        return len(self.prompts)

    @property
    def has_prompts(self) -> bool:
        """Whether any prompt was recorded."""
        return bool(self.prompts.any())

    @classmethod
    def of_lengths(cls, prompts: Sequence[int], decodes: Sequence[int]) -> TokenTable:
        """Sequences of which only lengths are known: what a real run plans its passes with. No pass is made of it.

        By sequence: tokens of the prompt, and tokens generated after the first.
        """
        sizes = np.asarray(prompts, np.int64) + np.asarray(decodes, np.int64)
        first = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
        return cls(
            experts=np.zeros((int(first[-1]), 0, 0), np.uint16),
            weights=None,
            lookahead={},
            ids=None,
            has_holes=False,
            first=first,
            prompts=np.asarray(prompts, np.int64),
            num_experts=0,
            lookahead_depth=0,
        )

    @classmethod
    def of(cls, workload: Workload) -> TokenTable:
        """Take a workload's rows apart."""
        rows, sizes = workload.rows, np.diff(workload.row_ptr)
        event = np.repeat(np.arange(workload.num_events), sizes)
        place = np.repeat(np.arange(len(workload.steps)), np.diff(workload.event_ptr))[event]
        is_real = np.ones(len(event), bool) if rows.is_pad is None else ~rows.is_pad
        row = np.flatnonzero(is_real)
        # A token is the n-th row of its sequence in a pass, in every layer.
        _, sequence = np.unique(rows.sequence[row], return_inverse=True)
        rank = _rank_in_group(event[row] * np.int64(sequence.max(initial=0) + 1) + sequence)
        longest, steps = int(rank.max(initial=0)) + 1, len(workload.steps)
        token = (sequence * np.int64(steps) + place[row]) * longest + rank
        names, token = np.unique(token, return_inverse=True)
        layer = workload.layer[event[row]]
        found, step = np.divmod(names // longest, steps)

        def table(values: np.ndarray, hole: int) -> np.ndarray:
            filled = np.full((len(names), workload.num_layers, values.shape[1]), hole, values.dtype)
            filled[token, layer] = values[row]
            return filled

        experts = table(rows.experts, NO_EXPERT)
        ids = None
        if rows.token is not None:
            ids = np.full(len(names), -1, rows.token.dtype)
            ids[token] = rows.token[row]
        count = int(found[-1]) + 1 if len(found) else 0
        is_prompt = ~workload.steps.is_decode[step]
        return cls(
            experts=experts,
            weights=None if rows.weights is None else table(rows.weights, 0),
            lookahead={depth: table(ids, NO_EXPERT) for depth, ids in rows.lookahead.items()},
            ids=ids,
            has_holes=bool((experts == NO_EXPERT).any()),
            first=np.searchsorted(found, np.arange(count + 1)),
            prompts=np.bincount(found[is_prompt], minlength=count),
            num_experts=workload.num_experts,
            lookahead_depth=workload.lookahead,
            score_ids=None if rows.score_ids is None else table(rows.score_ids, 0),
            scores=None if rows.scores is None else table(rows.scores, 0),
        )

    def one_pass(self, found: Pass, prompt_tokens: Mapping[int, int], max_batch: int) -> Workload:
        """A workload of one pass: the same as `passes` gives, in a tenth of the time."""
        tokens = np.array(found.tokens)
        experts = self.experts[tokens].transpose(1, 0, 2)
        layers, count = experts.shape[:2]
        width = self.num_experts
        keys = experts + np.arange(layers)[:, None, None] * width
        if self.has_holes:
            keys[experts == NO_EXPERT] = layers * width
        keys = keys.reshape(-1)
        counts = np.bincount(keys, minlength=layers * width)[: layers * width]
        demanded = np.flatnonzero(counts)
        rows = self._rows(found, tokens)
        weights = None
        if rows.weights is not None:
            weights = np.bincount(keys, rows.weights.reshape(-1), layers * width)[demanded]
        return Workload(
            steps=_steps([found]),
            event_ptr=np.array([0, layers]),
            layer=np.arange(layers, dtype=np.int16),
            ptr=np.searchsorted(demanded, np.arange(layers + 1) * width),
            experts=(demanded % width).astype(np.int32),
            counts=counts[demanded].astype(np.int32),
            weights=weights,
            row_ptr=np.arange(layers + 1) * count,
            rows=rows,
            prompt_tokens=prompt_tokens,
            batch_size=max_batch,
            num_layers=layers,
            num_experts=width,
            lookahead=self.lookahead_depth,
        )

    def passes(
        self,
        found: Sequence[Pass],
        prompt_tokens: Mapping[int, int],
        arrived: Mapping[int, int],
        max_batch: int,
    ) -> Workload:
        """A workload of many passes, numbered in ascending order."""
        layers = self.experts.shape[1]
        tokens = np.concatenate([each.tokens for each in found])
        owners = np.concatenate([each.owners for each in found])
        sizes = np.array([len(each.tokens) for each in found])
        # Rows are by pass, layer and token.
        size = np.repeat(sizes, layers)
        layer = np.repeat(np.tile(np.arange(layers), len(found)), size)
        within = np.arange(len(layer)) - np.repeat(np.cumsum(size) - size, size)
        token = np.repeat(np.repeat(np.cumsum(sizes) - sizes, layers), size) + within
        place = tokens[token]
        steps = _steps(found)
        workload = build_workload(
            steps,
            np.repeat(steps.number, sizes * layers),
            layer,
            Rows(
                experts=self.experts[place, layer],
                sequence=owners[token].astype(np.int32),
                weights=None if self.weights is None else self.weights[place, layer],
                lookahead={depth: ids[place, layer] for depth, ids in self.lookahead.items()},
                token=None if self.ids is None else self.ids[place],
                score_ids=None if self.score_ids is None else self.score_ids[place, layer],
                scores=None if self.scores is None else self.scores[place, layer],
            ),
            prompt_tokens=prompt_tokens,
            batch_size=max_batch,
            num_layers=layers,
            num_experts=self.num_experts,
            lookahead=self.lookahead_depth,
        )
        return replace(workload, arrived=arrived)

    def _rows(self, found: Pass, tokens: np.ndarray) -> Rows:
        layers = self.experts.shape[1]

        def by_layer(values: np.ndarray) -> np.ndarray:
            return values[tokens].transpose(1, 0, 2).reshape(-1, values.shape[2])

        return Rows(
            experts=by_layer(self.experts),
            sequence=np.array(found.owners * layers, dtype=np.int32),
            weights=None if self.weights is None else by_layer(self.weights),
            lookahead={depth: by_layer(ids) for depth, ids in self.lookahead.items()},
            token=None if self.ids is None else np.tile(self.ids[tokens], layers),
            score_ids=None if self.score_ids is None else by_layer(self.score_ids),
            scores=None if self.scores is None else by_layer(self.scores),
        )


def _steps(found: Sequence[Pass]) -> Steps:
    sizes = [len(each.members) for each in found]
    # Sequences of a pass differ in length, and some may not be fed: all are counted as `batch` times the longest.
    beside = [each.positions - each.batch * each.context for each in found]
    return Steps(
        number=np.array([each.number for each in found], dtype=np.int64),
        is_decode=np.array([each.is_decode for each in found], dtype=bool),
        batch=np.array([each.batch for each in found], dtype=np.int64),
        tokens=np.array([len(each.tokens) for each in found], dtype=np.int64),
        context=np.array([each.context for each in found], dtype=np.int64),
        member_ptr=np.concatenate(([0], np.cumsum(sizes))).astype(np.int64),
        members=np.array([member for each in found for member in each.members], dtype=np.int64),
        kv_beside=np.array(beside, dtype=np.int64),
    )


def _rank_in_group(group: np.ndarray) -> np.ndarray:
    """Number of each element within its group, in order."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(np.concatenate(([True], np.diff(ordered) != 0)))
    sizes = np.diff(np.append(starts, len(ordered)))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(ordered)) - np.repeat(starts, sizes)
    return rank

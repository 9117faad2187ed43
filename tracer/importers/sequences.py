"""Sequences one after another, each its prompt and then its generated tokens: how most recordings come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .untimed import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Whole sequences, one after another.

    `experts` is uint16 [tokens, layers, top_k], `weights` float16 of the same shape or None. `bounds` are
    the rows at which sequences begin, and the end of the last: [sequences + 1]. The first `prompts[i]` rows of
    sequence i belong to its prompt.
    """

    experts: np.ndarray
    weights: np.ndarray | None
    bounds: np.ndarray
    prompts: np.ndarray
    prompt_ids: tuple[str, ...]
    domains: tuple[str, ...]

    @property
    def lengths(self) -> np.ndarray:
        """Rows of each sequence."""
        return np.diff(self.bounds)

    def passes(self, warnings: list[str]) -> Routing:
        """One prefill pass per prompt, one decode pass per other row, at batch 1."""
        if not self.prompts.any():
            warnings.append(
                "Decode rows only: positions and context count from each sequence's first row, because the "
                "lengths of the prompts are not known."
            )
        row = np.arange(len(self.experts))
        sequence = np.searchsorted(self.bounds, row, side="right") - 1
        position = row - self.bounds[sequence]
        is_decode = position >= self.prompts[sequence]
        is_first = is_decode | (position == 0)
        return Routing(
            experts=self.experts,
            weights=self.weights,
            step=np.cumsum(is_first) - 1,
            sequence=sequence,
            position=position,
            is_decode=is_decode[is_first],
            prompt_ids=self.prompt_ids,
            domains=self.domains,
        )

    def limited(self, limit: int | None, warnings: list[str]) -> Sequences:
        """Whole sequences of at most `limit` tokens in all, spread evenly so that every domain stays in."""
        tokens = len(self.experts)
        if limit is None or limit >= tokens:
            return self
        count = len(self.lengths)
        kept = max(1, count * limit // tokens)
        while kept > 1 and self.lengths[_spread(count, kept)].sum() > limit:
            kept -= 1
        chosen = _spread(count, kept)
        ends = np.minimum(self.bounds[chosen + 1], self.bounds[chosen] + limit)
        pieces = [slice(*pair) for pair in zip(self.bounds[chosen], ends, strict=True)]
        experts = np.concatenate([self.experts[piece] for piece in pieces])
        weights = self.weights
        cut = ", cut" if kept == 1 and self.lengths[chosen[0]] > limit else ""
        warnings.append(
            f"Limited to {len(experts):,} of {tokens:,} tokens: {kept} of {count} sequences{cut}, spread "
            "over the file."
        )
        lengths = ends - self.bounds[chosen]
        return Sequences(
            experts=experts,
            weights=None if weights is None else np.concatenate([weights[p] for p in pieces]),
            bounds=np.r_[0, np.cumsum(lengths)],
            prompts=np.minimum(self.prompts[chosen], lengths),
            prompt_ids=_picked(self.prompt_ids, chosen),
            domains=_picked(self.domains, chosen),
        )


def _spread(count: int, kept: int) -> np.ndarray:
    return np.arange(kept) * count // kept


def _picked(values: tuple[str, ...], places: np.ndarray) -> tuple[str, ...]:
    return tuple(values[place] for place in places.tolist())

"""Rows of the routing table while a run goes on: kept event by event, turned into Arrow many events at once.

An event costs a few references here; types, labels and conversions wait until thousands of rows are due, so that
tracing does not slow decode down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from .errors import ResourceError
from .generate import StepTokens
from .timing import StepInfo

_PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class _Step:
    """One pass: what all its events share."""

    number: int
    phase: int
    tokens: StepTokens


class _Event(NamedTuple):
    """One (step, layer): `experts` and predictions [tokens, top_k] on the host, `weights` on the device."""

    step: _Step
    layer: int
    experts: torch.Tensor
    weights: torch.Tensor
    lookahead: dict[int, torch.Tensor]
    scores: tuple[np.ndarray, np.ndarray] | None


@dataclass(slots=True)
class RoutingRows:
    """Collects events. `tokens` are those of the pass at work, `rows` those that wait.

    `modalities` are the labels of token ids that stand for something else than text.
    """

    num_experts: int
    top_k: int
    lookahead: int
    scores: int
    has_weights: bool
    has_token_ids: bool
    modalities: Mapping[int, str]
    rows: int = 0
    tokens: int = 0
    _step: _Step | None = None
    _events: list[tuple[Any, ...]] = field(default_factory=list)

    def begin(self, info: StepInfo, tokens: StepTokens) -> None:
        """A pass is about to run."""
        self._step = _Step(info.step, _PHASES.index(info.phase), tokens)
        self.tokens = len(tokens.sequence)

    def add(
        self,
        layer: int,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        lookahead: dict[int, torch.Tensor],
        scores: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Keep one event: tensors are [tokens, top_k], arrays of `scores` [tokens, m].

        They are kept as they are, without a copy: the library leaves a caller's routing alone.
        """
        self._events.append((self._step, layer, chosen, weights, lookahead, scores))
        self.rows += self.tokens

    def drop(self) -> None:
        """Forget everything collected."""
        self._events, self.rows = [], 0

    def take(self) -> pa.Table | None:
        """Hand over what was collected, as rows of the routing table; None if there is nothing.

        Raises ResourceError for routing that a trace of this model could not say.
        """
        events = [_Event(*event) for event in self._events]
        self.drop()
        self._require_fitting(events)
        return self._table(events) if events else None

    def _require_fitting(self, events: Sequence[_Event]) -> None:
        for event in events:
            tokens, shape = len(event.step.tokens.sequence), tuple(event.experts.shape)
            if shape != (tokens, self.top_k):
                raise ResourceError(
                    f"MoE layer {event.layer} routed {shape[0]} tokens to {shape[1]} experts each, where the pass has "
                    f"{tokens} tokens and the model says {self.top_k}. This model cannot be traced."
                )

    def _table(self, events: Sequence[_Event]) -> pa.Table:
        sizes = np.array([len(event.experts) for event in events])
        experts = torch.cat([event.experts for event in events]).numpy()
        self._require_experts(events, experts)
        tokens, place = _tokens(events, sizes)
        sequence = _joined(one.sequence for one in tokens)[place]
        position = _joined(one.position for one in tokens)[place]
        token_id = _joined(one.token_id for one in tokens)[place]
        columns: dict[str, Any] = {
            "step": _spread(events, sizes, lambda event: event.step.number, np.int32),
            "layer": _spread(events, sizes, lambda event: event.layer, np.int16),
            "sequence": sequence,
            "position": position,
            "phase": _labels(
                _spread(events, sizes, lambda event: event.step.phase, np.int8), _PHASES
            ),
            "token_id": token_id if self.has_token_ids else np.full_like(token_id, -1),
            "modality": self._modality(token_id, position),
            "experts": _lists(experts.astype(np.uint16)),
        }
        if self.has_weights:
            weights = torch.cat([event.weights for event in events])
            columns["weights"] = _lists(weights.detach().float().cpu().numpy().astype(np.float16))
        for depth in range(1, self.lookahead + 1):
            columns[f"lookahead_{depth}"] = self._lookahead(events, sizes, depth)
        if self.scores:
            pairs = [event.scores for event in events if event.scores is not None]
            columns["score_ids"] = _lists(np.concatenate([ids for ids, _ in pairs]))
            columns["scores"] = _lists(np.concatenate([values for _, values in pairs]))
        return pa.table(columns)

    def _require_experts(self, events: Sequence[_Event], experts: np.ndarray) -> None:
        if not experts.size or 0 <= experts.min() <= experts.max() < self.num_experts:
            return
        for event in events:
            wrong = event.experts[
                (event.experts < 0) | (event.experts >= self.num_experts)
            ].tolist()
            if wrong:
                raise ResourceError(
                    f"MoE layer {event.layer} chose expert {wrong[0]} of {self.num_experts}. Choices that stand for no "
                    "expert cannot be said in a trace, so this model cannot be traced."
                )

    def _modality(self, token_id: np.ndarray, position: np.ndarray) -> pa.DictionaryArray:
        labels = ("text", "pad", *dict.fromkeys(self.modalities.values()))
        codes = np.zeros(len(token_id), dtype=np.int8)
        for token, label in self.modalities.items():
            codes[token_id == token] = labels.index(label)
        codes[position < 0] = 1
        return _labels(codes, labels)

    def _lookahead(
        self, events: Sequence[_Event], sizes: np.ndarray, depth: int
    ) -> pa.FixedSizeListArray:
        """Predictions of one depth; null where a layer has none."""
        has_one = np.repeat([depth in event.lookahead for event in events], sizes)
        values = np.zeros((len(has_one), self.top_k), dtype=np.uint16)
        found = [event.lookahead[depth] for event in events if depth in event.lookahead]
        if found:
            values[has_one] = torch.cat(found).numpy()
        return pa.FixedSizeListArray.from_arrays(
            pa.array(values.reshape(-1)), self.top_k, mask=pa.array(~has_one)
        )


def distinct_count(chosen: torch.Tensor) -> int:
    """How many different experts an event demands; `chosen` [tokens, top_k] is on the host."""
    if len(chosen) == 1:
        return chosen.shape[1]  # a token chooses nobody twice
    return len(np.unique(chosen.numpy()))


def _tokens(events: Sequence[_Event], sizes: np.ndarray) -> tuple[list[StepTokens], np.ndarray]:
    """Tokens of the events' passes, and for every row its place among them, pass behind pass."""
    passes: list[_Step] = []
    starts: list[int] = []
    start = 0
    for event in events:
        if not passes or event.step is not passes[-1]:
            start += len(passes[-1].tokens.sequence) if passes else 0
            passes.append(event.step)
        starts.append(start)
    before = np.cumsum(sizes) - sizes
    place = np.repeat(np.array(starts) - before, sizes) + np.arange(sizes.sum())
    return [one.tokens for one in passes], place


def _joined(columns: Iterable[Sequence[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(columns), dtype=np.int32)


def _spread(
    events: Sequence[_Event], sizes: np.ndarray, value: Callable[[_Event], int], kind: Any
) -> np.ndarray:
    return np.repeat(np.array([value(event) for event in events], dtype=kind), sizes)


def _labels(codes: np.ndarray, names: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), pa.array(names))


def _lists(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1]
    )

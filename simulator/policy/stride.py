"""How many layers ahead to fetch: the step size of Shen et al. (arXiv 2510.26730), and what corrects it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import ceil

from ...tracer.errors import UsageError
from ...tracer.types import ExpertKey
from .base import Outcome

_FRESH = 0.1
"""Weight of the newest event in the share of a layer's experts that had to be moved."""


class Stride:
    """S = clamp(⌈N · copy_s / T⌉ + bias, 1, most), with N experts to move and T the time of one layer.

    `times` has copy_s, layer_s and token_s (simulator.layer_times): T = layer_s + token_s · tokens. N is what is
    expected of the next layer, less the share that was lately found without being moved for it. The bias goes up by 1
    when `raise_at` experts were late or missing before `lower_at` were fetched in vain, down by 1 when it is the other
    way round; then both counts start again. It never leaves ±(most − 1). `chosen` counts events by S.
    """

    def __init__(self, times: Mapping[str, float], most: int, raise_at: int, lower_at: int) -> None:
        if most < 1 or raise_at < 1 or lower_at < 1:
            raise UsageError(
                f"adaptive takes most, raise_at and lower_at >= 1, got {most}, {raise_at}, {lower_at}."
            )
        self.most = most
        self.bias = 0
        self.chosen: Counter[int] = Counter()
        self._copy_s = times["copy_s"]
        self._layer_s = times["layer_s"]
        self._token_s = times["token_s"]
        self._raise_at = raise_at
        self._lower_at = lower_at
        self._stalled = 0
        self._in_vain = 0
        self._moved: dict[int, float] = {}
        self._fetched: dict[int, set[ExpertKey]] = {}

    def hear(self, layer: int, outcome: Outcome) -> None:
        """An event was answered: count what was missing and what was fetched for nothing."""
        for key in outcome.fetched:
            self._fetched.setdefault(key.layer, set()).add(key)
        fetched = self._fetched.pop(layer, set())
        in_time = sum(key in fetched for key in outcome.hits)
        stalled = len(outcome.lates) + len(outcome.misses)
        demanded = len(outcome.hits) + stalled
        if demanded:
            before = self._moved.get(layer, 1.0)
            self._moved[layer] = before + _FRESH * ((in_time + stalled) / demanded - before)
        self._stalled += stalled
        self._in_vain += len(fetched) - in_time - sum(key in fetched for key in outcome.lates)
        self._correct()

    def layers(self, layer: int, expected: int, tokens: int) -> int:
        """Layers ahead to fetch for, now that `layer` is routed and `expected` experts are foreseen in the next."""
        to_move = expected * self._moved.get(layer + 1, 1.0)
        layer_s = self._layer_s + self._token_s * tokens
        found = min(max(ceil(to_move * self._copy_s / layer_s) + self.bias, 1), self.most)
        self.chosen[found] += 1
        return found

    def _correct(self) -> None:
        limit = self.most - 1
        if self._stalled >= self._raise_at and self._stalled >= self._in_vain:
            self.bias = min(self.bias + 1, limit)
        elif self._in_vain >= self._lower_at:
            self.bias = max(self.bias - 1, -limit)
        else:
            return
        self._stalled = self._in_vain = 0


def enough(scores: Mapping[int, float], covered: float) -> list[int]:
    """Experts by score, ties by number, until they hold the share `covered` of all of it."""
    order = sorted(scores, key=lambda expert: (-scores[expert], expert))
    wanted = covered * sum(scores.values())
    held = 0.0
    for count, expert in enumerate(order):
        if held >= wanted:
            return order[:count]
        held += scores[expert]
    return order

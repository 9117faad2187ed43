"""A predictor of any quality, made of the future and of chance: what accuracy would pay, before anyone trains one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ....tracer.errors import UsageError
from ....tracer.types import ExpertKey
from ..base import FutureView, Signals
from ..chance import chance
from ..future import NEVER


class Synthetic:
    """Names each expert of the next `horizon` layer events with probability `recall`, and wrong ones to `precision`.

    A bound that errs as asked. Precision is the share of the named that are needed; the wrong ones are drawn evenly
    from the other experts that the layer ever uses in this run (where there are too few of them, precision is higher
    than asked). Those of a real predictor are more popular and do less harm. The nearest event comes first; within an
    event right and wrong are mixed. An expert of an event is missed or named alike whenever it is asked about.
    `latency_s` is charged for every event, before the layer goes on.
    """

    name: ClassVar[str] = "synthetic"
    needs: ClassVar[frozenset[str]] = frozenset({"future"})
    is_lossless: ClassVar[bool] = True
    is_hypothetical: ClassVar[bool] = True
    """Says nothing until asked what if: sweeps leave it out, `break-even` takes it."""

    def __init__(
        self,
        future: FutureView,
        recall: float = 1.0,
        precision: float = 1.0,
        latency_s: float = 0.0,
        horizon: int = 1,
        seed: int = 0,
    ) -> None:
        if not (0.0 <= recall <= 1.0 and 0.0 < precision <= 1.0):
            raise UsageError(
                f"synthetic takes 0 <= recall <= 1 and 0 < precision <= 1, got {recall}, {precision}."
            )
        if latency_s < 0.0 or horizon < 1:
            raise UsageError(
                f"synthetic takes latency_s >= 0 and horizon >= 1, got {latency_s}, {horizon}."
            )
        self._future = future
        self.recall = recall
        self.excess = 1.0 / precision - 1.0
        self.horizon = horizon
        self.seed = seed
        self._event = -1
        self._used = _used(future.upcoming(NEVER))

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        self._event += 1
        return [
            key
            for ahead, needed in enumerate(self._future.upcoming(self.horizon), 1)
            for key in self._guess(self._event + ahead, needed)
        ]

    def _guess(self, event: int, needed: Sequence[ExpertKey]) -> list[ExpertKey]:
        right = [k for k in needed if chance(self.seed, event, k.expert) < self.recall]
        wanted = len(right) * self.excess
        # Rounded up as often as keeps the mean.
        count = int(wanted + chance(self.seed, event, -1))
        if not count:
            return right
        others = [key for key in self._used[needed[0].layer] if key not in needed]
        for draw in range(min(count, len(others))):
            wrong = others.pop(int(chance(self.seed, event, -2, draw) * len(others)))
            right.insert(int(chance(self.seed, event, -3, draw) * (len(right) + 1)), wrong)
        return right


def _used(events: Sequence[Sequence[ExpertKey]]) -> dict[int, list[ExpertKey]]:
    by_layer: dict[int, list[ExpertKey]] = {}
    for key in sorted({key for event in events for key in event}):
        by_layer.setdefault(key.layer, []).append(key)
    return by_layer


MEMBER = Synthetic

"""Ask the gates of the next layers early, with this layer's hidden state.

Residual streams change slowly, so gate l+d often picks from layer l's state what it will pick from its
own (Eliseev & Mazur, arXiv 2312.17238; HOBBIT, arXiv 2411.01433, reports about 96 % top-1 at d = 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from ....tracer.errors import UsageError
from ....tracer.types import ExpertKey
from ..base import Signals


class GateLookahead:
    """Prefetch what gates `depth` layers ahead would pick; nearest layer first, most votes first.

    `width` limits the experts per layer ahead (0 = all that any token picked).
    """

    name: ClassVar[str] = "gate_lookahead"
    needs: ClassVar[frozenset[str]] = frozenset({"lookahead"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, depth: int = 1, width: int = 0) -> None:
        if depth < 1 or width < 0:
            raise UsageError(
                f"gate_lookahead takes depth >= 1 and width >= 0, got {depth}, {width}."
            )
        self.depth = depth
        self.width = width

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        keys: list[ExpertKey] = []
        for ahead in range(1, self.depth + 1):
            votes = Counter(
                expert for group in signals.lookahead.get(ahead, ()) for expert in group
            )
            ranked = sorted(votes, key=lambda expert, votes=votes: (-votes[expert], expert))
            keys += [ExpertKey(layer + ahead, expert) for expert in ranked[: self.width or None]]
        return keys


MEMBER = GateLookahead

"""Ask a path predictor, which names the experts of all layers before the first one runs.

Predicted Routing Path of He et al. (ExpertFlow, arXiv 2410.17954): an encoder–decoder reads the prompt and the tokens
so far. It runs outside the policy; what it said of a pass is told with each event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from ....tracer.errors import UsageError
from ....tracer.types import ExpertKey
from ..ahead import require_reach
from ..base import Signals


class Path:
    """Prefetch the predicted paths of the next `horizon` layers: nearest layer first, most votes first.

    Each token votes for its `per_token` likeliest experts (0: all that were predicted, 2k as in the paper); likelier
    ones break ties. `width` limits the experts per layer (0: all that have a vote).
    """

    name: ClassVar[str] = "path"
    needs: ClassVar[frozenset[str]] = frozenset({"paths"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, horizon: int = 1, width: int = 0, per_token: int = 0) -> None:
        require_reach(self.name, horizon, width)
        if per_token < 0:
            raise UsageError(f"path takes per_token >= 0, got {per_token}.")
        self.horizon = horizon
        self.width = width
        self.per_token = per_token

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        keys: list[ExpertKey] = []
        for ahead in range(1, self.horizon + 1):
            votes: Counter[int] = Counter()
            ranks: Counter[int] = Counter()
            for group in signals.path.get(ahead, ()):
                for rank, expert in enumerate(group[: self.per_token or None]):
                    votes[expert] += 1
                    ranks[expert] += rank
            order = sorted(votes, key=lambda e, v=votes, r=ranks: (-v[e], r[e], e))
            keys += [ExpertKey(layer + ahead, expert) for expert in order[: self.width or None]]
        return keys


MEMBER = Path

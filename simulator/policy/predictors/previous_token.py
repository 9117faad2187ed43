"""A token goes where the token before it went (the baseline TLP of He et al., arXiv 2410.17954)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import ClassVar

from ....tracer.types import ExpertKey
from ..ahead import BySequence, Walk, ranked, require_reach
from ..base import Signals


class PreviousToken:
    """What each sequence's last token used in the next `horizon` layers, by votes of the sequences; `width` limits it.

    In later layers of this pass that is the token of the pass before; past the last layer, in the next pass, it is this
    pass's own. `width` 0 names all of them. Of a prompt the last token counts. O(tokens) to remember, O(sequences ×
    top-k) to tell.
    """

    name: ClassVar[str] = "previous_token"
    needs: ClassVar[frozenset[str]] = frozenset({"routing"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, horizon: int = 1, width: int = 0) -> None:
        require_reach(self.name, horizon, width)
        self.horizon = horizon
        self.width = width
        self._walk = Walk()
        self._used: BySequence[dict[int, Sequence[int]]] = BySequence(dict)

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        if self._walk.enter(layer):
            self._used.next_pass()
        # The last row of a sequence is its last token.
        last = dict(zip(signals.sequences, signals.routed, strict=False))
        states = [self._used.of(sequence) for sequence in last]
        for used, chosen in zip(states, last.values(), strict=True):
            used[layer] = chosen
        keys: list[ExpertKey] = []
        for target in self._walk.ahead(self.horizon):
            votes = Counter(chain.from_iterable(used.get(target, ()) for used in states))
            keys += ranked(target, votes, self.width)
        return keys


MEMBER = PreviousToken

"""Share the experts that the tokens vote for with their weights (Dynamic Expert Sharing by vote)."""

from __future__ import annotations

from typing import ClassVar

from ....tracer.errors import UsageError
from ..base import GateScores, Routed
from ..core_set import within


class DesVote:
    """DES-Vote (arXiv 2602.00879 §3): the pass shares the round(beta × experts) of the largest summed weights.

    A token votes for the experts its router chose, with the weights it gave them; ties go to the lower id. The paper
    does not say of what beta is a share: all experts of the layer reproduces its table.
    """

    name: ClassVar[str] = "des_vote"
    needs: ClassVar[frozenset[str]] = frozenset({"gate_weights"})
    is_lossless: ClassVar[bool] = False

    def __init__(self, beta: float = 0.4) -> None:
        if not 0 < beta <= 1:
            raise UsageError(f"routing 'des_vote' takes 0 < beta <= 1, got {beta}.")
        self._beta = beta

    def route(self, said: GateScores) -> Routed:
        votes: dict[int, float] = {}
        for token, weights in enumerate(said.weights):
            for expert, weight in zip(said.chosen(token), weights, strict=True):
                votes[expert] = votes.get(expert, 0.0) + weight
        size = max(1, round(self._beta * said.num_experts))
        if len(votes) <= size:
            return within(said, votes)
        return within(said, set(sorted(votes, key=lambda expert: (-votes[expert], expert))[:size]))


MEMBER = DesVote

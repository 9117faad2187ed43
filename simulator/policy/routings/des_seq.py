"""Share the experts that are every token's first choices (Dynamic Expert Sharing by sequence)."""

from __future__ import annotations

from typing import ClassVar

from ....tracer.errors import UsageError
from ..base import GateScores, Routed
from ..core_set import within


class DesSeq:
    """DES-Seq (arXiv 2602.00879 §3): the pass shares the union of every token's k likeliest experts.

    Each token keeps the number of experts its router gave it, now the likeliest of the shared ones. With k at the
    router's own number nothing changes.
    """

    name: ClassVar[str] = "des_seq"
    needs: ClassVar[frozenset[str]] = frozenset({"gate_weights"})
    is_lossless: ClassVar[bool] = False

    def __init__(self, k: int = 2) -> None:
        if not isinstance(k, int) or k < 1:
            raise UsageError(f"routing 'des_seq' takes a whole number k >= 1, got {k}.")
        self._k = k

    def route(self, said: GateScores) -> Routed:
        core = {
            expert
            for token, ids in enumerate(said.ids)
            for expert in ids[: min(self._k, len(said.weights[token]))]
        }
        return within(said, core)


MEMBER = DesSeq

"""Compute every missing expert on the CPU, where its weights are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class OnCpu:
    """Move activations instead of weights: best for few tokens and a slow link (Fiddler, arXiv 2402.07033).

    Router and weights stay the same; beside a GPU the CPU's kernels round differently. What is not in the
    slots at the start stays out of them, so it goes with a cache that is warm (static).
    """

    name: ClassVar[str] = "cpu"
    needs: ClassVar[frozenset[str]] = frozenset({"cpu_times"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, copy_s: float, expert_s: float, token_s: float) -> None:
        del copy_s, expert_s, token_s  # every miss goes to the CPU, whatever it costs there

    def on_cpu(self, tokens: Sequence[int]) -> Sequence[int]:
        return range(len(tokens))


MEMBER = OnCpu

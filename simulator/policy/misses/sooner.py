"""Load or compute on the CPU, whichever ends an event sooner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class Sooner:
    """Share the missing experts between link and CPU so that the longer of the two ends first.

    `copy_s` is the time of one copy, `expert_s + token_s * tokens` that of one expert on the CPU. Experts with few
    tokens go to the CPU first, as it is slow per token and the link does not care (HybriMoE, arXiv 2504.05897).
    Router and weights stay the same; beside a GPU the CPU's kernels round differently.
    """

    name: ClassVar[str] = "sooner"
    needs: ClassVar[frozenset[str]] = frozenset({"cpu_times"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, copy_s: float, expert_s: float, token_s: float) -> None:
        self.copy_s = copy_s
        self.expert_s = expert_s
        self.token_s = token_s

    def on_cpu(self, tokens: Sequence[int]) -> Sequence[int]:
        order = sorted(range(len(tokens)), key=lambda place: (tokens[place], place))
        best, best_s, cpu_s = 0, len(tokens) * self.copy_s, 0.0
        for count, place in enumerate(order, 1):
            cpu_s += self.expert_s + self.token_s * tokens[place]
            ends_s = max(cpu_s, (len(tokens) - count) * self.copy_s)
            if ends_s < best_s:
                best, best_s = count, ends_s
        return order[:best]


MEMBER = Sooner

"""What one policy's own code takes beside the model, measured in a run of it.

A predictor written in Python takes longer between a model's kernels than timed alone, and the kernels after it find
colder caches. So where a machine is at hand, the policy itself is run for a moment (runtime/own_costs.py), and
its forecasts are charged what was seen there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .costs import CostModel, Linear, PhaseCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseOwnCosts:
    """Seconds of one phase: predicting by event and by token, once per pass, and what the rest of an event adds.

    `decision_s` and `beside_s` are differences to what the machine is charged for decisions and for computing, and may
    be negative.
    """

    event_s: float = 0.0
    token_s: float = 0.0
    pass_s: float = 0.0
    decision_s: float = 0.0
    beside_s: float = 0.0

    def charged(self, costs: PhaseCosts) -> PhaseCosts:
        """The same machine under this policy. Asking for prefetches costs what it did."""
        asking = Linear((self.event_s, self.token_s, costs.lookahead.weights[2]))
        return replace(
            costs,
            lookahead=asking,
            pass_lookahead_s=self.pass_s,
            decision=_raised(costs.decision, self.decision_s),
            mixer=_raised(costs.mixer, self.beside_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCosts:
    """Of both phases."""

    prefill: PhaseOwnCosts
    decode: PhaseOwnCosts

    def charged(self, costs: CostModel) -> CostModel:
        """The same machine under this policy."""
        return replace(
            costs,
            prefill=self.prefill.charged(costs.prefill),
            decode=self.decode.charged(costs.decode),
        )


def _raised(linear: Linear, seconds: float) -> Linear:
    first, *others = linear.weights
    return replace(linear, weights=(first + seconds, *others))

"""What the bench measures, most important first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from expertflow.simulator.lessons import lessons_of
from expertflow.simulator.policy.registry import predictors
from expertflow.simulator.policy.spec import PolicySpec, make_spec
from expertflow.simulator.workload import Workload
from expertflow.tracer.types import ModelShape

HALF = 0.5
SHARES = (0.5, 0.25, 0.75)
PLAIN = ("stock", "accelerate")
"""Baselines that run without a policy, and so without this runtime."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration: a kind of policy, or of baseline, in room for a share of all experts."""

    kind: str
    share: float

    @property
    def is_plain(self) -> bool:
        """Whether it runs without a policy."""
        return self.kind in PLAIN


def cells(is_trained: bool, has_lookahead: bool) -> list[Cell]:
    """All cells of one model and batch size: what the goals are about first, at half of the experts."""
    policies = ["lru", "on_demand", "static"]
    policies += ["look_ahead"] if has_lookahead else []
    policies += ["path_plec" if is_trained else "ids_plec"]
    first = [Cell("lru", HALF), Cell("lru_write_back", HALF), Cell("accelerate", HALF)]
    first += [Cell(kind, HALF) for kind in policies[1:]]
    first += [Cell("resident", 1.0), Cell("stock", 1.0), Cell("whole_layer", HALF)]
    others = [Cell(kind, share) for share in SHARES[1:] for kind in policies]
    return [*first, *others]


def spec_of(cell: Cell, shape: ModelShape, lesson: Workload) -> PolicySpec:
    """The policy of a cell, taught by routing that it is not judged on."""
    slots = max(1, round(cell.share * shape.total_experts))
    return _KINDS[cell.kind](slots, shape, lesson)


def _ids_plec(slots: int, shape: ModelShape, lesson: Workload) -> PolicySpec:
    """The predictive cache on a predictor that reads expert ids alone: replayed text has no meaning to learn from."""
    return make_spec(
        slots=slots,
        cache="plec",
        predictor="markov",
        allocation="global",
        popularity=lesson.popularity(),
        lessons=lessons_of(lesson, predictors.get("markov").needs),
    )


_KINDS: dict[str, Callable[[int, ModelShape, Workload], PolicySpec]] = {
    "on_demand": lambda slots, shape, lesson: make_spec(slots=slots, cache="none"),
    "lru": lambda slots, shape, lesson: make_spec(slots=slots),
    "lru_write_back": lambda slots, shape, lesson: make_spec(slots=slots, misses="write_back"),
    "static": lambda slots, shape, lesson: make_spec(
        slots=slots, cache="static", popularity=lesson.popularity()
    ),
    "resident": lambda slots, shape, lesson: make_spec(
        slots=shape.total_experts, cache="static", popularity=lesson.popularity()
    ),
    "look_ahead": lambda slots, shape, lesson: make_spec(slots=slots, predictor="gate_lookahead"),
    "path_plec": lambda slots, shape, lesson: make_spec(
        slots=slots, cache="plec", predictor="path", allocation="global"
    ),
    "ids_plec": _ids_plec,
    "whole_layer": lambda slots, shape, lesson: make_spec(
        slots=min(slots, 2 * shape.num_experts),
        cache="fifo",
        predictor="whole_layer",
        allocation="global",
        popularity=lesson.popularity(),
    ),
}
KINDS = (*_KINDS, *PLAIN)
"""Names of all policies and baselines."""

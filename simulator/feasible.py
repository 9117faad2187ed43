"""Which members a trace and a machine can feed, asked of their `needs` and never of their names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

from .costs import CostModel
from .lessons import has_token_ids
from .policy.base import LESSONS
from .policy.registry import FAMILIES, Registry, predictors
from .space import DEFAULTS, Budget, Option, Space
from .workload import Workload

BUDGETS = ("0.125", "0.25", "0.5", "0.75")
"""Shares of all experts that the built-in space tries."""


def lacking(needs: Iterable[str], workload: Workload, costs: CostModel) -> str:
    """What is missing for `needs`, and how to get it; empty if nothing is.

    What a trace always teaches (routing, popularity, curves, most lessons) and the future, which a simulator knows, are
    never missing.
    """
    missing = {
        "lookahead": (
            workload.lookahead < 1,
            "look-ahead ids; trace again with --lookahead 1",
        ),
        "gate_weights": (
            workload.weights is None,
            "gate weights, which the trace did not record",
        ),
        "cpu_times": (
            costs.cpu_times() is None,
            "CPU times of an expert, which nobody measured or declared for this machine",
        ),
        "paths": (
            workload.rows.path is None,
            "predicted paths of this trace; train a path predictor and give its folder with --paths",
        ),
        "token_table": (
            not has_token_ids(workload),
            "token ids, which the trace did not record",
        ),
        **{need: (False, "") for need in LESSONS if need != "token_table"},
        "routing": (False, ""),
        "popularity": (False, ""),
        "curves": (False, ""),
        "future": (False, ""),
    }
    for need in sorted(needs):
        is_missing, what = missing.get(need, (True, f"{need!r}, which no trace holds"))
        if is_missing:
            return what
    return ""


def feasible(member_needs: Iterable[str], workload: Workload, costs: CostModel) -> bool:
    """Whether a member with these needs can be simulated."""
    return not lacking(member_needs, workload, costs)


def builtin_space(
    workload: Workload,
    costs: CostModel,
    budgets: Sequence[Budget],
    links: Sequence[str | None] = (None,),
) -> Space:
    """Every lossless member that can be deployed and fed, at each budget; rivals and bounds beside them.

    Predictors that only infer (from what was routed, or is popular) are rivals, with default parameters: combining
    each with all allocations would take longer than it tells.
    """
    members = {family.kind: _options(family, workload, costs) for family in FAMILIES}
    return Space(
        budgets=tuple(budgets),
        links=tuple(links),
        members={
            **members,
            "predictor": tuple(o for o in members["predictor"] if not _only_infers(o)),
        },
        rivals=tuple(o for o in members["predictor"] if _only_infers(o)),
    )


def _only_infers(predictor: Option) -> bool:
    return bool(predictors.get(predictor.name).needs & {"routing", "popularity", *LESSONS})


def _options(family: Registry, workload: Workload, costs: CostModel) -> tuple[Option, ...]:
    if family.kind == "scheduler":
        # A recorded trace replays the batches that were recorded, whoever schedules.
        return (Option(DEFAULTS[family.kind]),)
    members = [(name, family.get(name)) for name in family.names()]
    return tuple(
        _option(name, member, workload)
        for name, member in members
        if member.is_lossless
        and "future" not in member.needs
        and feasible(member.needs, workload, costs)
    )


def _option(name: str, member: type, workload: Workload) -> Option:
    """The member as it is; one that looks ahead, to each depth recorded."""
    if "lookahead" in member.needs and "depth" in inspect.signature(member).parameters:
        return Option(name, {"depth": tuple(range(1, workload.lookahead + 1))})
    return Option(name)

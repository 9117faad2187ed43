"""Which members a trace and a machine can feed, asked of their `needs` and never of their names."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

from .costs import CostModel
from .forest import has_trainer
from .layer_times import layer_times
from .lessons import has_token_ids
from .policy.base import LESSONS
from .policy.registry import FAMILIES, Registry, misses, predictors
from .policy.spec import AS_ROUTED, Member
from .space import DEFAULTS, Budget, Option, Space
from .workload import Workload

BUDGETS = ("0.125", "0.25", "0.5", "0.75")
"""Shares of all experts that the built-in space tries."""


def lacking(needs: Collection[str], workload: Workload, costs: CostModel) -> str:
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
        "layer_times": (
            "layer_times" in needs and layer_times(costs, workload) is None,
            "the times of a copy and of a layer, which this machine lacks",
        ),
        "forest": (
            not has_trainer(),
            "scikit-learn to train a forest; install it with pip install 'expertflow-trace[learn]'",
        ),
        "paths": (
            workload.rows.path is None,
            "predicted paths of this trace; train a path predictor and give its folder with --paths",
        ),
        "token_table": (
            not has_token_ids(workload),
            "token ids, which the trace did not record",
        ),
        **{need: (False, "") for need in LESSONS if need not in ("token_table", "forest")},
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


def feasible(member_needs: Collection[str], workload: Workload, costs: CostModel) -> bool:
    """Whether a member with these needs can be simulated."""
    return not lacking(member_needs, workload, costs)


def builtin_space(
    workload: Workload,
    costs: CostModel,
    budgets: Sequence[Budget],
    links: Sequence[str | None] = (None,),
    *,
    routing: Member = AS_ROUTED,
) -> Space:
    """Every lossless member that can be deployed and fed, at each budget; rivals and bounds beside them.

    Predictors that only infer (from what was routed, or is popular), or that listen, which takes the slower engine, are
    rivals, with default parameters; so are answers to misses that change the order of computing, where it is known what
    a second wave costs, and those that use the CPU. Combining each with all allocations would take
    longer than it tells.
    """
    members = {family.kind: _options(family, workload, costs) for family in FAMILIES}
    members["routing"] = (Option(routing.name, {k: (v,) for k, v in routing.params.items()}),)
    return Space(
        budgets=tuple(budgets),
        links=tuple(links),
        members={
            **members,
            "predictor": tuple(o for o in members["predictor"] if not _is_rival(o)),
            "misses": tuple(o for o in members["misses"] if not _is_other(o)),
        },
        rivals=tuple(o for o in members["predictor"] if _is_rival(o)),
        answers=tuple(
            o for o in members["misses"] if _is_other(o) and (costs.has_waves or not _reorders(o))
        ),
    )


def _is_rival(predictor: Option) -> bool:
    member = predictors.get(predictor.name)
    return bool(member.needs & {"routing", "popularity", *LESSONS}) or hasattr(member, "hear")


def _is_other(answer: Option) -> bool:
    return _reorders(answer) or "cpu_times" in misses.get(answer.name).needs


def _reorders(answer: Option) -> bool:
    return getattr(misses.get(answer.name), "residents_first", False)


def _options(family: Registry, workload: Workload, costs: CostModel) -> tuple[Option, ...]:
    if family.kind == "scheduler":
        # A recorded trace replays the batches that were recorded, whoever schedules.
        return (Option(DEFAULTS[family.kind]),)
    members = [(name, family.get(name)) for name in family.names()]
    return tuple(
        _option(name, member, workload)
        for name, member in members
        if member.is_lossless
        and not getattr(member, "is_baseline", False)
        and "future" not in member.needs
        and feasible(member.needs, workload, costs)
        # With one layer recorded there is nothing to choose a depth from.
        and not (hasattr(member, "depth_param") and workload.lookahead < 2)
    )


def _option(name: str, member: Any, workload: Workload) -> Option:
    """The member as it is; one that looks ahead, to each depth recorded, or to the last if it chooses by itself."""
    if "lookahead" in member.needs and hasattr(member, "depth_param"):
        return Option(name, {member.depth_param: (workload.lookahead,)})
    if "lookahead" in member.needs and "depth" in inspect.signature(member).parameters:
        return Option(name, {"depth": tuple(range(1, workload.lookahead + 1))})
    return Option(name)

"""`expertflow-trace tune`: choose a policy for a budget and goals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...tracer.commands.options import (
    CpuExpert,
    DeclaredLink,
    ExpertTable,
    Gpu,
    Json,
    MachinePath,
    PathsDir,
    TraceDir,
    policy_place,
)
from ...tracer.console import print_json, print_rows, progress, say
from .member_params import RoutingName, RoutingParam, SchedulerName, SchedulerParam


def tune(
    trace: TraceDir,
    out: Annotated[
        Path,
        typer.Option(help="Where to write policy.json.", dir_okay=False, callback=policy_place),
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            help="Share of all experts (0.5), slots (128slots) or bytes (6GiB); default: 0.5, or with "
            "goals the smallest that meets them."
        ),
    ] = None,
    min_tokens_per_s: Annotated[
        float | None, typer.Option(min=0, help="Goal: tokens/s over the whole run.")
    ] = None,
    max_ttft: Annotated[
        float | None, typer.Option(min=0, help="Goal: seconds to the first token (p95).")
    ] = None,
    max_tpot: Annotated[
        float | None, typer.Option(min=0, help="Goal: seconds per further token (p95).")
    ] = None,
    routing: RoutingName = "as_routed",
    routing_param: RoutingParam = None,
    scheduler: SchedulerName = "fcfs",
    scheduler_param: SchedulerParam = None,
    link: DeclaredLink = None,
    machine: MachinePath = None,
    gpu: Gpu = None,
    expert_table: ExpertTable = None,
    cpu_expert: CpuExpert = None,
    paths: PathsDir = None,
    as_json: Json = False,
) -> None:
    """Predict all policies that fit, pick the fastest that meets the goals, and say why.

    Writes OUT (policy.json) and beside it OUT's name with .tuning.json, for the dashboard. If nothing meets the
    goals, only the report is written, and the exit code is 1.

    No lossy routing is chosen unless you name one: all policies are then tried with it.

    Example: expertflow-trace tune traces/demo/trace --budget 0.5 --out policy.json
    """
    from ...tracer.records import to_json, write_json
    from ...tracer.store import Trace
    from ..budget import parse_budget
    from ..choose import Goals, budgets_of, runs_of
    from ..choose import tune as choose
    from ..judge import Opening
    from ..policy.registry import routings, schedulers
    from ..policy.spec import Member, write_policy
    from ..policy_file import policy_of
    from ..report import result_rows
    from ..space import Budget
    from .member_params import parse_params

    routed = Member(name=routing, params=parse_params(routings, routing, routing_param))
    scheduled = Member(name=scheduler, params=parse_params(schedulers, scheduler, scheduler_param))
    opening = Opening(
        trace=trace,
        machine=machine,
        gpu=gpu,
        expert_table=expert_table,
        link=link,
        cpu_expert=cpu_expert,
        paths=paths,
    )
    goals = Goals(min_tokens_per_s=min_tokens_per_s, max_ttft_s=max_ttft, max_tpot_s=max_tpot)
    opened = Trace.open(trace)
    ready = opening.forecaster()
    if budget is None and goals.as_mapping():
        budgets = budgets_of(opened.shape.total_experts)
    else:
        wanted = budget or "0.5"
        budgets = [Budget(wanted, parse_budget(wanted, opened.shape))]
    with progress("tuning", runs_of(ready, budgets), "predictions") as report:
        choice = choose(
            ready,
            budgets=budgets,
            goals=goals,
            advance=report.advance,
            routing=routed,
            scheduler=scheduled,
        )
    write_json(tuning_path(out), choice.tuning)
    if choice.tuning.meets_goals:
        policy = policy_of(
            choice.spec,
            opened,
            budget=choice.tuning.budget,
            evidence={
                "predicted": to_json(choice.predicted),
                "calibrated": machine is not None,
                "explanation": list(choice.tuning.explanation),
            },
        )
        write_policy(out, policy)
    if as_json:
        print_json(choice.predicted)
    else:
        title = "Chosen" if choice.tuning.meets_goals else "Not enough, the fastest tried"
        print_rows(f"{title}: {choice.predicted.label}", result_rows(choice.predicted))
        print_rows("Why", [(str(n), li) for n, li in enumerate(choice.tuning.explanation, 1)])
    if not choice.tuning.meets_goals:
        say(f"No policy was written, as none meets the goals. The report is {tuning_path(out)}.")
        raise typer.Exit(1)
    if not as_json:
        asks_paths = "paths" in choice.spec.needs()
        say(
            f"Wrote {out}. Next: expertflow-trace deploy {out}"
            + (f" --paths {paths}" if asks_paths else "")
        )


def tuning_path(policy: Path) -> Path:
    """Where `tune` puts its report: next to the policy."""
    return policy.with_name(policy.stem + ".tuning.json")

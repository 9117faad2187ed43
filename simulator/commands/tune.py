"""`expertflow-trace tune`: choose a policy for a budget and goals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...tracer.commands.options import (
    CpuExpert,
    DeclaredLink,
    ExpertTable,
    Gpu,
    Json,
    MachinePath,
    TraceDir,
)
from ...tracer.console import print_json, print_rows, progress, say

if TYPE_CHECKING:
    from ...tracer.store import Trace
    from ..choose import Choice


def tune(
    trace: TraceDir,
    out: Annotated[Path, typer.Option(help="Where to write policy.json.", dir_okay=False)],
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
    link: DeclaredLink = None,
    machine: MachinePath = None,
    gpu: Gpu = None,
    expert_table: ExpertTable = None,
    cpu_expert: CpuExpert = None,
    as_json: Json = False,
) -> None:
    """Predict all policies that fit, pick the fastest that meets the goals, and say why.

    Writes OUT (policy.json) and beside it OUT's name with .tuning.json, for the dashboard. If nothing meets the
    goals, only the report is written, and the exit code is 1.

    Example: expertflow-trace tune traces/demo/trace --budget 0.5 --out policy.json
    """
    from ...tracer.records import write_json
    from ...tracer.store import Trace
    from ..budget import parse_budget
    from ..choose import Goals, budgets_of, runs_of
    from ..choose import tune as choose
    from ..judge import Opening
    from ..report import result_rows
    from ..space import Budget

    opening = Opening(
        trace=trace,
        machine=machine,
        gpu=gpu,
        expert_table=expert_table,
        link=link,
        cpu_expert=cpu_expert,
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
        choice = choose(ready, budgets=budgets, goals=goals, advance=report.advance)
    write_json(tuning_path(out), choice.tuning)
    if choice.tuning.meets_goals:
        _write_policy(out, choice, opened, is_calibrated=machine is not None)
    if as_json:
        print_json(choice.predicted)
    else:
        print_rows(f"Chosen: {choice.predicted.label}", result_rows(choice.predicted))
        print_rows("Why", [(str(n), li) for n, li in enumerate(choice.tuning.explanation, 1)])
    if not choice.tuning.meets_goals:
        say(f"No policy was written, as none meets the goals. The report is {tuning_path(out)}.")
        raise typer.Exit(1)
    if not as_json:
        say(f"Wrote {out}. Next: expertflow-trace deploy {out}")


def _write_policy(out: Path, choice: Choice, opened: Trace, *, is_calibrated: bool) -> None:
    from ...tracer.records import to_json
    from ..policy.spec import PolicyFile, write_policy

    hashes = opened.table("sequences", columns=["prompt_sha256"]).to_pydict()["prompt_sha256"]
    policy = PolicyFile(
        behaviour=choice.spec,
        behaviour_hash=choice.spec.behaviour_hash(),
        shape=opened.shape,
        budget=choice.tuning.budget,
        trace=opened.manifest.trace_id,
        evidence={
            "predicted": to_json(choice.predicted),
            "calibrated": is_calibrated,
            "explanation": list(choice.tuning.explanation),
            "hardware": to_json(opened.hardware),
            "prompt_sha256": hashes,
        },
    )
    write_policy(out, policy)


def tuning_path(policy: Path) -> Path:
    """Where `tune` puts its report: next to the policy."""
    return policy.with_name(policy.stem + ".tuning.json")

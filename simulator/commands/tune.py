"""`expertflow-trace tune`: choose a policy for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...tracer.commands.options import Budget, DeclaredLink, Json, MachinePath, TraceDir
from ...tracer.console import print_json, print_rows, progress, say


def tune(
    trace: TraceDir,
    out: Annotated[Path, typer.Option(help="Where to write policy.json.")],
    budget: Budget = "0.5",
    link: DeclaredLink = None,
    machine: MachinePath = None,
    as_json: Json = False,
) -> None:
    """Sweep the built-in policies, pick the fastest, and say why.

    Writes OUT (policy.json) and beside it OUT's name with .tuning.json, for the dashboard.

    Example: expertflow-trace tune traces/demo --budget 0.5 --out policy.json
    """
    from ...tracer.quantities import LinkSpec
    from ...tracer.records import to_json, write_json
    from ...tracer.store import Trace
    from ..budget import parse_budget
    from ..choose import candidates
    from ..choose import tune as choose
    from ..forecast import forecaster
    from ..machine import read_machine
    from ..policy.spec import PolicyFile, write_policy
    from ..report import result_rows

    opened = Trace.open(trace)
    ready = forecaster(
        opened,
        link=LinkSpec.parse(link) if link else None,
        machine=read_machine(machine) if machine else None,
    )
    slots = parse_budget(budget, opened.shape)
    count = len(candidates(slots, ready.workload.popularity(), lookahead=ready.workload.lookahead))
    with progress("tuning", count, "policies") as report:
        choice = choose(ready, budget=budget, slots=slots, advance=report.advance)
    policy = PolicyFile(
        behaviour=choice.spec,
        behaviour_hash=choice.spec.behaviour_hash(),
        shape=opened.shape,
        budget=budget,
        trace=opened.manifest.trace_id,
        evidence={
            "predicted": to_json(choice.predicted),
            "calibrated": machine is not None,
            "explanation": list(choice.tuning.explanation),
            "hardware": to_json(opened.hardware),
            "prompt_sha256": opened.table("sequences", columns=["prompt_sha256"]).to_pydict()[
                "prompt_sha256"
            ],
        },
    )
    write_policy(out, policy)
    write_json(tuning_path(out), choice.tuning)
    if as_json:
        print_json(choice.predicted)
        return
    print_rows(f"Chosen: {choice.predicted.label}", result_rows(choice.predicted))
    print_rows("Why", [(str(n), line) for n, line in enumerate(choice.tuning.explanation, 1)])
    say(f"Wrote {out}. Next: expertflow-trace deploy {out}")


def tuning_path(policy: Path) -> Path:
    """Where `tune` puts its report: next to the policy."""
    return policy.with_name(policy.stem + ".tuning.json")

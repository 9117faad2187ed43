"""`deploy --dry-run`: what a run takes and whether it fits, without loading or generating."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...simulator.plan_report import memory_rows
from ...simulator.policy.spec import PolicyFile
from ...tracer.console import print_json, print_rows, say
from ...tracer.records import write_json
from ..deploy import RunRequest, free_bytes
from ..run_plan import RunPlan, plan_run, require_run


def say_plan(policy: PolicyFile, request: RunRequest, *, out: Path | None, as_json: bool) -> None:
    """Print the memory plan of a run on stdout, then refuse it if it cannot fit (ResourceError)."""
    plan, needs = plan_run(policy, request, free_bytes)
    if out is not None:
        write_json(out, plan)
    if as_json:
        print_json(plan)
    else:
        print_rows(f"Memory plan: {plan.policy} on {plan.device}", _rows(plan, request))
    require_run(plan, needs)
    say("It fits. Nothing was loaded; leave out --dry-run to run it.")


def served_at_most(request: RunRequest, max_batch: int | None) -> RunRequest:
    """The request with as many sequences per batch as may be served together."""
    return request if max_batch is None else replace(request, batch_size=max_batch)


def _rows(plan: RunPlan, request: RunRequest) -> list[tuple[str, str]]:
    size = plan.size
    allowed = "as told by --memory" if request.memory is not None else "free now"
    return [
        (
            "largest pass",
            f"{size.tokens} tokens of {size.batch} sequences, {size.context} positions each in the end",
        ),
        *memory_rows(plan.memory, plan.device_bytes, plan.host_bytes),
        ("allowed", f"on the device what is {allowed}, on the host what is free now"),
        *(("note", words) for words in plan.notes),
    ]

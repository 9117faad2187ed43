"""`deploy --dry-run`: what a run takes and whether it fits, without loading or generating."""

from __future__ import annotations

from pathlib import Path

from ...simulator.memory_plan import RunSize
from ...simulator.plan_report import memory_rows
from ...simulator.policy.spec import PolicyFile
from ...tracer.console import print_json, print_rows, say
from ...tracer.records import write_json
from ..deploy import RunRequest
from ..run_plan import RunPlan, plan_run


def say_plan(
    policy: PolicyFile,
    request: RunRequest,
    *,
    served: RunSize | None = None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Print the memory plan of a run on stdout, then refuse it if it cannot fit (ResourceError).

    `served`: the passes of requests that arrive.
    """
    plan, room = plan_run(policy, request, served)
    if out is not None:
        write_json(out, plan)
    if as_json:
        print_json(plan)
    else:
        words = _pass_text(plan.size) if served is None else _served_text(plan.size)
        print_rows(f"Memory plan: {plan.policy} on {plan.device}", _rows(plan, request, words))
    room.require(plan.memory.slots)
    say("It fits. Nothing was loaded; leave out --dry-run to run it.")


def _pass_text(size: RunSize) -> str:
    return (
        f"{size.tokens} tokens of {size.batch} sequences, {size.context} positions each in the end"
    )


def _served_text(size: RunSize) -> str:
    return f"{size.tokens} tokens; {size.context} positions of all requests in progress"


def _rows(plan: RunPlan, request: RunRequest, largest: str) -> list[tuple[str, str]]:
    allowed = "as told by --memory" if request.memory is not None else "free now"
    return [
        ("largest pass", largest),
        *memory_rows(plan.memory, plan.device_bytes, plan.host_bytes),
        ("allowed", f"on the device what is {allowed}, on the host what is free now"),
        *(("note", words) for words in plan.notes),
    ]

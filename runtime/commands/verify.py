"""`expertflow-trace verify`: check a policy's forecast on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from ...tracer.commands.options import (
    BatchSize,
    Device,
    Dtype,
    EmulatedLink,
    Json,
    Limit,
    MaxNewTokens,
    PathsDir,
    PolicyModel,
    PolicyPath,
    Prompts,
    ResultOut,
    Threads,
    Tier,
)
from ...tracer.console import print_json, print_rows, progress, say


def verify(
    policy: PolicyPath,
    model: PolicyModel = None,
    prompts: Prompts = None,
    limit: Limit = 12,
    batch_size: BatchSize = 1,
    max_new_tokens: MaxNewTokens = 32,
    repeats: Annotated[int, typer.Option(help="Matched pairs per configuration.")] = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    link: EmulatedLink = None,
    tier: Tier = "ram",
    threads: Threads = None,
    paths: PathsDir = None,
    out: ResultOut = None,
    as_json: Json = False,
) -> None:
    """Predict, run and compare: does the forecast hold, and is the text the same?

    Exits 0 if validated, 5 if not.

    Example: expertflow-trace verify policy.json --link 8GB/s+10us --out verdict.json
    """
    from ...simulator.policy.spec import read_policy
    from ...tracer.errors import NotValidatedError
    from ...tracer.records import write_json
    from ..deploy import RunRequest
    from ..verify import VerifyRequest, count_runs
    from ..verify import verify as run

    chosen = read_policy(policy)
    request = VerifyRequest(
        run=RunRequest(
            model=model,
            prompts=prompts,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            device=device,
            dtype=dtype,
            link=link,
            tier=tier,
            threads=threads,
            paths=paths,
        ),
        repeats=repeats,
    )
    with progress("verifying", count_runs(repeats), "runs") as report:
        verdict = run(chosen, request, say=say, advance=report.advance)
    if out is not None:
        write_json(out, verdict)
    if as_json:
        print_json(verdict)
    else:
        for verified in verdict.runs:
            rows = [(check.quantity, check_line(check)) for check in verified.checks]
            no = "NO" if verified.is_lossless else "no: LOSSY, so that is no failure"
            rows.append(("same text", "yes" if verified.same_tokens else no))
            rows.append(("log replays", "yes" if verified.log_replays else "NO"))
            print_rows(verified.label, rows)
        print_rows("Verdict", [("", verdict.summary), *(("warning", w) for w in verdict.warnings)])
    if not verdict.validated:
        raise NotValidatedError(verdict.summary)


def check_line(check: object) -> str:
    """One check as a line: predicted, measured, gap, tolerance, noise, cause."""
    from ...simulator.result import Check
    from ...tracer.quantities import format_bytes

    assert isinstance(check, Check)
    if check.unit == "B":
        numbers = (format_bytes(check.predicted), format_bytes(check.measured))
    elif check.unit == "share":
        numbers = (f"{check.predicted:.2%}", f"{check.measured:.2%}")
    else:
        numbers = (f"{check.predicted:.1f}", f"{check.measured:.1f}")
    kind = "points" if check.unit == "share" else "%"
    noise = f", noise {check.noise:.1%}" if check.noise else ""
    mark = "ok" if check.passed else f"OUT OF TOLERANCE: {check.cause}"
    return (
        f"predicted {numbers[0]}, measured {numbers[1]} {check.unit}, gap {100 * check.gap:+.2f} {kind} "
        f"(tolerance {100 * check.tolerance:.0f}{noise}) {mark}"
    )

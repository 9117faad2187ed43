"""`expertflow-trace verify`: check a policy's forecast on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ...simulator.commands.arrival_options import (
    ArrivalOptions,
    Arrivals,
    ArrivalSpeed,
    Lengths,
    MaxBatch,
    MaxStepTokens,
    Prefill,
    Requests,
    Seed,
    StopAtEos,
)
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

if TYPE_CHECKING:
    from ...simulator.result import Check, VerifiedRun


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
    arrivals: Arrivals = None,
    max_batch: MaxBatch = None,
    max_step_tokens: MaxStepTokens = None,
    requests: Requests = None,
    arrival_speed: ArrivalSpeed = None,
    lengths: Lengths = None,
    prefill: Prefill = None,
    seed: Seed = None,
    stop_at_eos: StopAtEos = False,
    out: ResultOut = None,
    as_json: Json = False,
) -> None:
    """Predict, run and compare: does the forecast hold, and is the text the same?

    Exits 0 if validated, 5 if not. With --arrivals requests are served as they arrive, in continuous batches, and
    times to the first token and per token are judged too.

    Example: expertflow-trace verify policy.json --link 8GB/s+10us --out verdict.json
    """
    from ...simulator.policy.spec import read_policy
    from ...tracer.errors import NotValidatedError, UsageError
    from ...tracer.records import write_json
    from ..calibration_room import check_verify
    from ..deploy import RunRequest
    from ..serving_deploy import load_to_come
    from ..serving_verify import count_served, verify_arrivals
    from ..verify import VerifyRequest, count_runs
    from ..verify import verify as run

    asked = ArrivalOptions(
        arrivals=arrivals,
        max_batch=max_batch,
        requests=requests,
        arrival_speed=arrival_speed,
        lengths=lengths,
        prefill=prefill,
        seed=seed,
        max_step_tokens=max_step_tokens,
    )
    arrive = asked.are_given
    if stop_at_eos and not arrive:
        raise UsageError("--stop-at-eos is about requests that arrive; others always do.")
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
    check_verify(chosen, request.run, load_to_come(chosen, request.run, asked) if arrive else None)
    most = count_served(repeats) if arrive else count_runs(repeats)
    with progress("verifying", most, "runs") as report:
        if arrive:
            verdict = verify_arrivals(
                chosen, request, asked, stop_at_eos=stop_at_eos, say=say, advance=report.advance
            )
        else:
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
            rows += arrival_rows(verified)
            print_rows(verified.label, rows)
        print_rows("Verdict", [("", verdict.summary), *(("warning", w) for w in verdict.warnings)])
    if not verdict.validated:
        raise NotValidatedError(verdict.summary)


def arrival_rows(run: VerifiedRun) -> list[tuple[str, str]]:
    """How requests were served that arrived, as predicted and as measured last."""
    both = (("predicted", run.predicted), ("measured", run.measured[-1]))
    return [(word, result.arrivals.finding) for word, result in both if result.arrivals]


def check_line(check: Check) -> str:
    """One check as a line: predicted, measured, gap, tolerance, noise, cause."""
    from ...tracer.quantities import format_bytes, format_seconds

    kind = "points" if check.unit == "share" else "%"
    unit = ""
    if check.unit == "B":
        numbers = [format_bytes(value) for value in (check.predicted, check.measured)]
    elif check.unit == "s":
        numbers = [format_seconds(value) for value in (check.predicted, check.measured)]
    elif check.unit == "share":
        numbers = [f"{value:.2%}" for value in (check.predicted, check.measured)]
    else:
        numbers = [f"{value:.1f}" for value in (check.predicted, check.measured)]
        unit = f" {check.unit}"
    noise = f", noise {check.noise:.1%}" if check.noise else ""
    return (
        f"predicted {numbers[0]}, measured {numbers[1]}{unit}, gap {100 * check.gap:+.2f} {kind} "
        f"(tolerance {100 * check.tolerance:.0f}{noise}) {_mark(check)}"
    )


def _mark(check: Check) -> str:
    if not check.is_judged:
        return f"not judged: {check.cause}"
    return "ok" if check.passed else f"OUT OF TOLERANCE: {check.cause}"

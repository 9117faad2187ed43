"""`expertflow-trace deploy`: run a model under a policy and measure it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    DeviceMemory,
    Dtype,
    EmulatedLink,
    Json,
    Limit,
    MachinePath,
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
    from ...simulator.policy.spec import PolicySpec


def deploy(
    policy: PolicyPath,
    model: PolicyModel = None,
    prompts: Prompts = None,
    limit: Limit = 12,
    batch_size: BatchSize = 1,
    max_new_tokens: MaxNewTokens = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    link: EmulatedLink = None,
    tier: Tier = "ram",
    threads: Threads = None,
    paths: PathsDir = None,
    no_pin: Annotated[bool, typer.Option("--no-pin", help="Do not page-lock host memory.")] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare with the resident model's text.")
    ] = False,
    arrivals: Arrivals = None,
    max_batch: MaxBatch = None,
    max_step_tokens: MaxStepTokens = None,
    requests: Requests = None,
    arrival_speed: ArrivalSpeed = None,
    lengths: Lengths = None,
    prefill: Prefill = None,
    seed: Seed = None,
    stop_at_eos: StopAtEos = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what the run takes, and whether it fits.")
    ] = False,
    memory: DeviceMemory = None,
    machine: MachinePath = None,
    live: Annotated[
        Path | None,
        typer.Option(
            "--live",
            help="Say here how the run goes, for the dashboard's Live page; by default beside --out.",
            dir_okay=False,
        ),
    ] = None,
    out: ResultOut = None,
    as_json: Json = False,
) -> None:
    """Deploy a policy: offload the experts, generate, and measure what it costs.

    Exits 5 if the text differs from the resident model's or the decision log does not replay. A lossy policy may change
    the text: it is only said by how much. With --arrivals requests are served as they arrive, in continuous batches.

    Example: expertflow-trace deploy policy.json --link 8GB/s+10us
    """
    from ...simulator.policy.spec import read_policy
    from ...simulator.report import result_rows
    from ...tracer.errors import NotValidatedError, UsageError
    from ...tracer.live import live_path
    from ...tracer.records import write_json
    from ..deploy import RunRequest
    from ..deploy import deploy as run
    from ..run_size import served_size
    from ..serving_deploy import deploy_arrivals, load_to_come
    from .dry_run import say_plan

    request = RunRequest(
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
        pin=not no_pin,
        check_text=not no_check,
        paths=paths,
        memory=memory,
        machine=machine,
        live=live_path(out) if live is None and out is not None else live,
    )
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
    if live is not None and arrive:
        raise UsageError("--live tells of runs whose prompts are all there; leave --arrivals out.")
    chosen = read_policy(policy)
    if dry_run:
        served = served_size(load_to_come(chosen, request, asked)) if arrive else None
        say_plan(chosen, request, served=served, out=out, as_json=as_json)
        return
    if arrive:
        result = deploy_arrivals(
            chosen, request, asked, stop_at_eos=stop_at_eos, progress=progress, say=say
        )
    else:
        result = run(chosen, request, say=say)
    if out is not None:
        write_json(out, result)
    if as_json:
        print_json(result)
    else:
        rows = result_rows(result)
        rows.append(("predicted", _predicted(chosen.evidence)))
        rows.append(("same text", _same_text(result.same_tokens, chosen.behaviour)))
        rows.append(("log replays", _yes(result.log_replays)))
        print_rows(f"Measured: {result.label}", rows)
    if result.same_tokens is False and chosen.behaviour.is_lossless:
        raise NotValidatedError(
            "The text differs from the resident model's under a lossless policy."
        )
    if result.log_replays is False:
        raise NotValidatedError("The decision log does not replay.")


def _predicted(evidence: Mapping[str, Any]) -> str:
    """What `tune` expected. `verify` compares like with like: same prompts, calibrated just before."""
    predicted = evidence.get("predicted")
    if not isinstance(predicted, dict):
        return "the policy carries no prediction"
    costs = "calibrated costs" if evidence.get("calibrated") else "costs of the trace alone"
    return (
        f"{predicted['tokens_per_s']:.1f} tokens/s, decode hits {predicted['decode']['hit_rate']:.1%}: "
        f"other prompts, {costs}, {predicted['link']} ({predicted['link_origin']}), batch "
        f"{predicted['batch_size']}"
    )


def _same_text(answer: bool | None, spec: PolicySpec) -> str:
    if answer is None or spec.is_lossless:
        return _yes(answer)
    return "yes, by chance: the policy is LOSSY" if answer else "no: the policy is LOSSY"


def _yes(answer: bool | None) -> str:
    return {True: "yes", False: "NO", None: "not checked"}[answer]

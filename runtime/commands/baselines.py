"""`expertflow-trace baselines`: the plainest ways to run a model, measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...tracer.commands.options import (
    BatchSize,
    Budget,
    Device,
    DeviceMemory,
    Dtype,
    EmulatedLink,
    Json,
    Limit,
    MaxNewTokens,
    PathsDir,
    Prompts,
    Threads,
    Tier,
)
from ...tracer.console import print_json, print_rows, progress, say, warn

if TYPE_CHECKING:
    from ..baselines import BaselineReport


def baselines(
    model: Annotated[
        str | None,
        typer.Option(help="Hub id or folder; default: the policy's model, or the embedded one."),
    ] = None,
    budget: Budget = "0.5",
    policy: Annotated[
        Path | None,
        typer.Option(help="A policy.json to run beside them, in place of --budget at its size."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Baselines, separated by commas; default: all.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each; the middle one is shown.")] = 3,
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
    memory: DeviceMemory = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for one result file each: the dashboard compares them.", file_okay=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the baselines: stock transformers, Accelerate, layer streaming, on demand, plain LRU.

    Exits 4 if nothing that was asked for can run here, 5 if a text differs from the resident model's.

    Example: expertflow-trace baselines --budget 0.5 --link 8GB/s+10us --out results/baselines
    """
    from ...simulator.policy.spec import read_policy
    from ...tracer.errors import NotValidatedError
    from ...tracer.records import write_json
    from ..baselines import NAMES, BaselineRequest, count_runs, run_baselines
    from ..deploy import RunRequest

    names = NAMES if only is None else [name.strip() for name in only.split(",") if name.strip()]
    request = BaselineRequest(
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
            memory=memory,
        ),
        budget=budget,
        names=names,
        policy=None if policy is None else read_policy(policy),
        repeats=repeats,
    )
    with progress("running", count_runs(request), "runs") as shown:
        report = run_baselines(request, say=say, advance=shown.advance)
    for name, why in report.skipped.items():
        warn(f"{name} is left out: {why}")
    if out is not None:
        for name, result in report.results.items():
            write_json(out / f"{name}.json", result)
    if as_json:
        print_json(report)
    else:
        title = (
            f"{report.model_id}, {report.slots} slots for those that offload, batch {batch_size}"
        )
        print_rows(title, baseline_rows(report))
        if out is not None:
            say(f"Next: streamlit run dashboard/app.py -- --data {out}, page Compare")
    if wrong := differing(report):
        raise NotValidatedError(f"The text differs from the resident model's: {', '.join(wrong)}.")
    if wrong := [name for name, found in report.results.items() if found.log_replays is False]:
        raise NotValidatedError(f"The decision log does not replay: {', '.join(wrong)}.")


def baseline_rows(report: BaselineReport) -> list[tuple[str, str]]:
    """A line for each: speed, beside the stock model's, waiting, bytes, memory and text."""
    from ...tracer.quantities import format_bytes, format_seconds

    stock = report.results.get("stock")
    rows: list[tuple[str, str]] = []
    for name, result in report.results.items():
        memory, total_s = result.memory, result.time.total_s
        beside = f" ({result.tokens_per_s / stock.tokens_per_s:.0%} of stock)" if stock else ""
        text = {True: "same text", False: "ANOTHER TEXT", None: "text not compared"}
        words = (
            f"{result.tokens_per_s:.1f} tokens/s{beside}",
            f"first {format_seconds(result.ttft_s)}, then {format_seconds(result.tpot_s)}",
            f"waits {result.stall_s / total_s if total_s else 0.0:.0%}",
            f"{format_bytes(result.bytes_per_token)} per token over {result.link} ({result.link_origin})",
            f"peak {format_bytes(result.peak_device_bytes)}: experts {format_bytes(memory.slots)}, other weights "
            f"{format_bytes(memory.non_expert_weights)}, staged {format_bytes(memory.staging)}, KV cache "
            f"{format_bytes(memory.kv_cache)}, working tensors {format_bytes(memory.activations)}",
            text[result.same_tokens],
        )
        rows.append((name, "; ".join(words)))
    return rows


def differing(report: BaselineReport) -> list[str]:
    """Lossless ones whose text is not the resident model's."""
    return [
        name
        for name, result in report.results.items()
        if result.same_tokens is False and not result.routing
    ]

"""`expertflow-trace run`: generate with a model and record its routing and timings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import print_json, print_rows, progress, say
from .options import (
    BatchSize,
    Device,
    Dtype,
    EmulatedLink,
    Json,
    Limit,
    MaxNewTokens,
    Prompts,
    Threads,
)


def run(
    out: Annotated[Path, typer.Option(help="Trace folder to write.")],
    model: Annotated[
        str, typer.Option(help="Hub id, folder, or 'embedded' (shipped with the package).")
    ] = "embedded",
    prompts: Prompts = None,
    limit: Limit = None,
    batch_size: BatchSize = 1,
    max_new_tokens: MaxNewTokens = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    residency: Annotated[
        str, typer.Option(help="auto, resident, or stream (experts cross the link one by one).")
    ] = "auto",
    link: EmulatedLink = None,
    lookahead: Annotated[
        int, typer.Option(help="Record what the gates of this many later layers pick (0-3).")
    ] = 1,
    scores: Annotated[
        int,
        typer.Option(
            help="Record the gate's scores of this many likeliest experts per token (0: none)."
        ),
    ] = 0,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    threads: Threads = None,
    store_text: Annotated[
        bool, typer.Option("--store-text", help="Keep the prompts' text.")
    ] = False,
    redact: Annotated[
        bool, typer.Option("--redact", help="Leave token ids out (they spell the text).")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a run of these arguments that was cut off."),
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Write prompts with the model's chat template.")
    ] = False,
    teacher_forced: Annotated[
        bool | None,
        typer.Option(
            "--teacher-forced/--own-generation",
            help="Feed given text (a completion, or each text's last tokens) instead of the model's own.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Trace a real run: which experts each token uses, and how long everything takes.

    Example: expertflow-trace run --out traces/mine --limit 24
    """
    from ..probe import command_line
    from ..tracing import TraceRequest, trace_run
    from ..writer import partial_path

    request = TraceRequest(
        out=out,
        model=model,
        prompts=prompts,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        residency=residency,
        link=link,
        lookahead=lookahead,
        revision=revision,
        threads=threads,
        store_text=store_text,
        redact=redact,
        overwrite=overwrite,
        resume=resume,
        chat=chat,
        teacher_forced=teacher_forced,
        scores=scores,
    )
    try:
        manifest, summary = trace_run(request, progress=progress, say=say)
    except KeyboardInterrupt:
        partial = partial_path(out)
        if partial.exists():
            again = command_line().removesuffix(" --resume")
            say(
                f"Interrupted. What was recorded is in {partial}; go on with `{again} --resume`, or "
                f"keep it with `expertflow-trace check {partial} --salvage SALVAGED`."
            )
        raise
    if as_json:
        print_json({"format": "expertflow.run/1", "trace": str(out), **summary})
        return
    print_rows(f"Trace {out}", [(name, str(value)) for name, value in summary.items()])
    say(f"Next: expertflow-trace tune {out} --budget 0.5 --out policy.json")
    for warning in manifest.warnings:
        say(f"warning: {warning}")

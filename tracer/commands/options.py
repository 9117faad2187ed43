"""Options that several commands share, so that one word means one thing everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..outputs import require_place


def result_place(path: Path | None) -> Path | None:
    """What --out names, for a result; refused before the work if it cannot be written or must not be replaced."""
    return require_place(path)


def machine_place(path: Path | None) -> Path | None:
    """What --out names, for a machine; refused before the work if it cannot be written or must not be replaced."""
    return require_place(path, replaces="machine")


def profile_place(path: Path | None) -> Path | None:
    """What --out names, for a profile; refused before the work if it cannot be written or must not be replaced."""
    return require_place(path, replaces="profile")


def policy_place(path: Path | None) -> Path | None:
    """What --out names, for a policy; refused before the work if it cannot be written or must not be replaced."""
    return require_place(path, replaces="policy")


Prompts = Annotated[
    Path | None, typer.Option(help="Prompts, .jsonl or text; default: the shipped held-out set.")
]
Limit = Annotated[
    int | None, typer.Option(help="Use at most this many prompts, spread over the file.")
]
BatchSize = Annotated[int, typer.Option(help="Sequences per batch.")]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens to generate per prompt.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        "--memory", "--vram", help="Device memory to use, as 24GiB; default: what is free."
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
EmulatedLink = Annotated[
    str | None, typer.Option("--link", help="Emulate a link on the CPU, for example 8GB/s+10us.")
]
DeclaredLink = Annotated[
    str | None,
    typer.Option("--link", help="Another link: pcie4x16, 25GB/s+10us, or a profile.json."),
]
Tier = Annotated[str, typer.Option(help="Where experts wait: ram, or disk (memory-mapped).")]
Threads = Annotated[
    int | None, typer.Option(help="Compute threads on the CPU; default: all cores but one.")
]
Budget = Annotated[
    str, typer.Option(help="Share of all experts (0.5), slots (128slots) or bytes (6GiB).")
]
PolicyPath = Annotated[
    Path, typer.Argument(help="policy.json, as written by `tune`.", metavar="POLICY")
]
PolicyModel = Annotated[
    str | None, typer.Option("--model", help="Hub id or folder; default: the policy's model.")
]
MachinePath = Annotated[
    Path | None, typer.Option("--machine", help="A machine.json, as written by `calibrate`.")
]
PathsDir = Annotated[
    Path | None,
    typer.Option("--paths", help="Folder of a trained path predictor, for predictor `path`."),
]
Gpu = Annotated[
    str | None, typer.Option("--gpu", help="A declared GPU instead of the trace's machine.")
]
ExpertTable = Annotated[
    Path | None, typer.Option("--expert-table", help="Measured MoE layer times for --gpu (CSV).")
]
CpuExpert = Annotated[
    str | None,
    typer.Option(
        "--cpu-expert", help="Declared time of an expert on the CPU, per token: 2ms+0.3ms."
    ),
]
TraceDir = Annotated[Path, typer.Argument(help="Trace folder.", metavar="DIR")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
ResultOut = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Also write the result here.", dir_okay=False, callback=result_place
    ),
]

"""`expertflow-trace import`: routing that other tools recorded as a trace, to be replayed on a declared machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import bytes_text, print_json, print_rows, say, warn
from .options import Json

IMPORT_FORMAT = "expertflow.import/1"


def import_trace(
    file: Annotated[Path, typer.Argument(help="What the other tool wrote.", metavar="FILE")],
    out: Annotated[Path, typer.Option(help="Trace folder to write.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format", help="auto (by contents), npz, vllm, sglang or llamacpp; docs/interop.md."
        ),
    ] = "auto",
    phase: Annotated[
        str | None,
        typer.Option(
            help="Where the file does not say: decode, one step per row (default), or prefill, one step per "
            "sequence."
        ),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Experts per layer; default: the highest id seen, plus 1.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers of the model, where ids are flat (SGLang's replies).")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts per token, where ids are flat (SGLang, llama.cpp).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model; default: the file's name.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Number format of the experts, such as mxfp4; default: bfloat16."),
    ] = None,
    expert_bytes: Annotated[
        str | None, typer.Option(help="Size of one expert, for example 13MB.")
    ] = None,
    non_expert_bytes: Annotated[
        str | None, typer.Option(help="Size of all other weights, for example 2GB.")
    ] = None,
    hidden_size: Annotated[int, typer.Option(help="Width of the model; 0: not known.")] = 0,
    limit_tokens: Annotated[
        int | None, typer.Option(help="Use at most this many tokens, spread over the file.")
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            help="Array that names each sequence's domain; default: domain, category or dataset."
        ),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="Axes of expert_ids: auto, tokens-first or layers-first.")
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn routing recorded by vLLM, SGLang, llama.cpp or numpy into a trace without times.

    What was found and mended on the way is said, and kept in the trace. A pickle is never run.

    Example: expertflow-trace import routing.npz --out traces/theirs --experts 32 --expert-bytes 13MB
    """
    from ..importers.formats import import_file
    from ..importers.request import ImportRequest
    from ..quantities import parse_bytes

    manifest = import_file(
        ImportRequest(
            file=file,
            out=out,
            format=format_,
            phase=phase,
            experts=experts,
            layers=layers,
            top_k=top_k,
            model=model,
            dtype=dtype,
            expert_bytes=parse_bytes(expert_bytes) if expert_bytes else 0,
            non_expert_bytes=parse_bytes(non_expert_bytes) if non_expert_bytes else 0,
            hidden_size=hidden_size,
            limit_tokens=limit_tokens,
            domain=domain,
            layout=layout,
            overwrite=overwrite,
        )
    )
    for warning in manifest.warnings:
        warn(warning)
    shape = manifest.shape
    rows = {table: manifest.rows(table) for table in manifest.tables}
    if as_json:
        document = {
            "trace": str(out),
            "trace_id": manifest.trace_id,
            "source": manifest.run.extra,
            "shape": shape,
            "rows": rows,
        }
        print_json({"format": IMPORT_FORMAT, **document, "warnings": manifest.warnings})
        return
    size = sum(info.bytes for files in manifest.tables.values() for info in files)
    held = [("rows", f"{count:,} {table}") for table, count in rows.items()]
    experts_text = f"{shape.num_moe_layers} layers of {shape.num_experts}, top {shape.top_k}"
    print_rows(f"Trace {out}", [("experts", experts_text), *held, ("size", bytes_text(size))])
    say(f"Next: expertflow-trace info {out}")

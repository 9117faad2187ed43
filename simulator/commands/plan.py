"""`expertflow-trace plan`: does a model fit, how fast at best and at worst, from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ...tracer.commands.options import BatchSize, Json, MachinePath, PathsDir, ResultOut, Tier
from ...tracer.console import print_json, print_rows, say

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ...tracer.unloaded import UnloadedModel
    from ..memory_plan import MemoryNeeds


def plan(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder with config.json, or embedded.", metavar="MODEL")
    ],
    vram: Annotated[
        str | None, typer.Option(help="Device memory to use, as 24GiB; default: the GPU's.")
    ] = None,
    link: Annotated[
        str, typer.Option(help="Host to device: pcie4x16, 25GB/s+10us, or a profile.json.")
    ] = "pcie4x16",
    host_ram: Annotated[str | None, typer.Option(help="Host memory to use, as 64GiB.")] = None,
    gpu: Annotated[str | None, typer.Option(help="A declared GPU, for speeds; see `list`.")] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (the checkpoint's), bfloat16, float16, float32, or packed experts: mxfp4, int4, …"
        ),
    ] = "auto",
    context: Annotated[int, typer.Option(help="Positions of each sequence, all of it prompt.")] = (
        4096
    ),
    batch_size: BatchSize = 1,
    machine: MachinePath = None,
    paths: PathsDir = None,
    tier: Tier = "ram",
    reserve: Annotated[
        str, typer.Option(help="Device memory kept for driver, kernels and allocator.")
    ] = "512MiB",
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub id.")] = None,
    out: ResultOut = None,
    as_json: Json = False,
) -> None:
    """Say whether a model fits, how fast it can be, and what would have to change, before any download of weights.

    Sizes are computed from the config, speeds from declared hardware: bounds, not forecasts. Exits 4 if it cannot run.

    Example: expertflow-trace plan embedded --vram 24MB --link pcie4x16 --gpu rtx4090 --context 512 --reserve 0B
    """
    from ...tracer.errors import ResourceError, UsageError
    from ...tracer.quantities import parse_bytes
    from ...tracer.records import write_json
    from ..hardware import declared_gpu, parse_link
    from ..plan import fits, make_plan
    from ..plan_report import plan_rows, way_out

    if vram is None and gpu is None:
        raise UsageError("Nothing says how much memory there is: give --vram 24GiB, or --gpu NAME.")
    for name, number in (("--context", context), ("--batch-size", batch_size)):
        if number < 1:
            raise UsageError(f"{name} must be at least 1, got {number}.")
    chosen_link = parse_link(link)
    chosen_gpu = declared_gpu(gpu) if gpu is not None else None
    device_bytes = parse_bytes(vram) if vram is not None else 0
    if vram is None and chosen_gpu is not None:
        device_bytes = chosen_gpu.memory_bytes
    host_bytes = parse_bytes(host_ram) if host_ram is not None else None
    kept = parse_bytes(reserve)
    described = _described(model, dtype, revision)
    made = make_plan(
        _needs(described, batch_size, kept, machine, paths, tier),
        context,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        gpu=chosen_gpu,
        link=chosen_link,
        notes=described.notes,
    )
    if out is not None:
        write_json(out, made)
    if as_json:
        print_json(made)
    else:
        print_rows(f"Plan: {made.model.model_id}", plan_rows(made))
    if not fits(made):
        raise ResourceError(f"{made.finding} {way_out(made)}")
    if not as_json:
        say(f"Next: expertflow-trace run --model {model} --out traces/mine, then tune it.")


def _described(model: str, dtype: str, revision: str | None) -> UnloadedModel:
    from dataclasses import replace

    from ...tracer.unloaded import describe
    from ..hardware_profiles import BITS_PER_WEIGHT

    if dtype not in BITS_PER_WEIGHT or dtype in ("float32", "float16", "bfloat16"):
        return describe(model, dtype=dtype, revision=revision)
    found = describe(model, dtype="bfloat16", revision=revision)
    packed = -(-int(found.shape.expert_bytes * BITS_PER_WEIGHT[dtype]) // 16)
    note = (
        f"Experts at {BITS_PER_WEIGHT[dtype]:g} bits per weight ({dtype}, declared), the rest in bfloat16. The runtime "
        "of this toolkit runs unpacked weights only; plan packed ones for other engines."
    )
    return replace(
        found,
        shape=replace(found.shape, dtype=dtype, expert_bytes=packed),
        notes=(*found.notes, note),
    )


def _needs(
    described: UnloadedModel,
    batch_size: int,
    reserve: int,
    machine: Path | None,
    paths: Path | None,
    tier: str,
) -> Callable[[int], MemoryNeeds]:
    """What a run needs, by its context."""
    from ...tracer.errors import UsageError
    from ..machine import read_machine
    from ..memory_plan import HOST_RESERVE_BYTES, RunSize, estimated_needs, predictor_file_bytes

    if tier not in ("ram", "disk"):
        raise UsageError(f"Unknown tier {tier!r}; allowed: ram, disk.")
    costs = read_machine(machine).costs if machine is not None else None
    predictor = predictor_file_bytes(paths)

    def by_context(context: int) -> MemoryNeeds:
        return estimated_needs(
            described.shape,
            RunSize.of(batch_size, context, context),
            described.widths,
            measured=costs,
            predictor=predictor,
            reserve=reserve,
            host_reserve=HOST_RESERVE_BYTES,
            on_disk=tier == "disk",
            streams=not described.is_adapted,
        )

    return by_context

"""`expertflow-trace calibrate`: measure what offloading costs on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ...tracer.commands.options import (
    BatchSize,
    Device,
    DeviceMemory,
    Dtype,
    EmulatedLink,
    Json,
    MaxNewTokens,
    Prompts,
    Threads,
    Tier,
    machine_place,
)
from ...tracer.console import print_json, print_rows, progress, say


def calibrate(
    out: Annotated[
        Path,
        typer.Option(help="Where to write machine.json.", dir_okay=False, callback=machine_place),
    ],
    model: Annotated[
        str, typer.Option(help="Hub id, folder, or 'embedded' (shipped with the package).")
    ] = "embedded",
    prompts: Prompts = None,
    limit: Annotated[int, typer.Option(help="Use at most this many prompts.")] = 4,
    batch_size: BatchSize = 1,
    max_new_tokens: MaxNewTokens = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    link: EmulatedLink = None,
    tier: Tier = "ram",
    threads: Threads = None,
    cpu_experts: Annotated[
        bool | None,
        typer.Option(
            "--cpu-experts/--no-cpu-experts",
            help="Measure experts computed on the CPU (misses cpu, sooner); by default where it is not the device.",
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            help="Measure in continuous batches of at most so many requests, for `simulate --arrivals`."
        ),
    ] = None,
    memory: DeviceMemory = None,
    as_json: Json = False,
) -> None:
    """Measure the runtime's own costs, so that forecasts from a trace include them.

    Example: expertflow-trace calibrate --out machine.json
    """
    from ...simulator.machine import MachineFile
    from ...tracer.probe import provenance
    from ...tracer.quantities import format_seconds
    from ...tracer.records import write_json
    from ..calibration_room import check_calibrate
    from ..deploy import RunRequest, load
    from ..machine import Machine, device_name
    from ..serving_calibrate import calibration_of

    request = RunRequest(
        model=model,
        prompts=prompts,
        limit=limit,
        batch_size=batch_size if max_batch is None else max_batch,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        link=link,
        tier=tier,
        threads=threads,
        memory=memory,
    )
    slots = check_calibrate(request, model, serves=max_batch)
    prepared = load(request, model, held_out_from=None)
    shape = prepared.loaded.shape
    some = "" if slots == shape.total_experts else f", with up to {slots} slots: no more fit"
    say(f"{shape.model_id} on {prepared.device}: short runs of the runtime itself{some}")
    machine = Machine(
        prepared.loaded, prepared.device, link=prepared.link, tier=prepared.tier, pin=request.pin
    )
    try:
        calibration = calibration_of(
            machine, prepared.prompts, request, serves=max_batch, slots=slots
        )
        with progress("calibrating", len(calibration.specs), "runs") as report:
            costs = calibration.measure(report.advance)
        if machine.device.type != "cpu" if cpu_experts is None else cpu_experts:
            costs = replace(costs, cpu_expert=calibration.measure_cpu())
    finally:
        machine.close()
    found = MachineFile(
        costs=costs,
        shape=prepared.loaded.shape,
        device=device_name(machine.device),
        link=machine.link_name,
        link_origin=machine.link_origin,
        batch_size=request.batch_size,
        provenance=provenance(0, "own-generation"),
    )
    write_json(out, found)
    if as_json:
        print_json(found)
        return
    copy = f"{format_seconds(costs.copy_s)} idle, {format_seconds(costs.busy_copy_s)} under compute"
    fit = ", ".join(
        f"{name} {getattr(costs.decode, name).residual:.0%}"
        for name in ("mixer", "experts", "decision")
    )
    cpu = []
    if costs.has_cpu:
        expert_s, token_s = map(format_seconds, costs.cpu_expert.weights)
        cpu = [("one expert on the CPU", f"{expert_s} and {token_s} per token")]
    print_rows(
        f"Machine {out}",
        [
            ("device", found.device),
            ("link", f"{found.link} ({found.link_origin})"),
            ("copy of one expert", copy),
            ("wait", f"{format_seconds(costs.wake_s)} on top"),
            ("one more slot in a pool", format_seconds(costs.group_s)),
            ("median error of the fit, decode", fit),
            *cpu,
        ],
    )
    say(f"Next: expertflow-trace tune TRACE --budget 0.5 --machine {out} --out policy.json")

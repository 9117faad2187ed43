"""`expertflow-trace profile`: measure this machine's link and expert kernels, and keep what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import print_json, print_rows, progress, say, warn
from ..errors import UsageError
from ..profile.document import ProfileFile
from ..profile.files import named_path, read_profile, saved_names, write_profile
from ..quantities import format_bytes, format_seconds
from .options import Device, Dtype, EmulatedLink, Json, Threads, profile_place

LIST_FORMAT = "expertflow.profiles/1"


def profile(
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write profile.json.", dir_okay=False, callback=profile_place),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Keep it under this name, for --link NAME anywhere.")
    ] = None,
    list_saved: Annotated[bool, typer.Option("--list", help="List the kept profiles.")] = False,
    model: Annotated[
        str, typer.Option(help="Hub id, folder, or 'embedded': whose experts are timed.")
    ] = "embedded",
    expert_bytes: Annotated[
        str | None, typer.Option(help="Copy blocks of this size (6MiB), not of the model's.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    link: EmulatedLink = None,
    threads: Threads = None,
    repeats: Annotated[int, typer.Option(help="Measurements behind every point.")] = 15,
    as_json: Json = False,
) -> None:
    """Measure copies, expert kernels, read-back and launches of this machine.

    Example: expertflow-trace profile --out profile.json --name mine
    """
    if list_saved:
        _list(as_json)
        return
    if out is None and name is None:
        raise UsageError("Give --out profile.json, or --name to keep the profile under a name.")
    targets = [path for path in (out, named_path(name) if name else None) if path is not None]
    found = _measured(
        name or (out.stem if out else ""),
        model,
        expert_bytes,
        device,
        dtype,
        link,
        threads,
        repeats,
    )
    for path in targets:
        write_profile(path, found)
    for words in found.warnings:
        warn(words)
    if as_json:
        print_json(found)
        return
    print_rows(f"Profile {', '.join(map(str, targets))}", _rows(found))
    say(f"Next: expertflow-trace simulate TRACE --budget 0.5 --link {name or out}")


def _measured(
    name: str,
    model: str,
    expert_bytes: str | None,
    device: str,
    dtype: str,
    link: str | None,
    threads: int | None,
    repeats: int,
) -> ProfileFile:
    from ..load import choose_device, load_model
    from ..placement import use_threads
    from ..profile.measure import ProfileRequest, measure_profile, stages
    from ..quantities import LinkSpec, parse_bytes

    if repeats < 3:
        raise UsageError(f"--repeats must be at least 3, got {repeats}.")
    chosen = choose_device(device)
    request = ProfileRequest(
        name=name,
        device=chosen,
        threads=use_threads(threads, chosen),
        link=LinkSpec.parse(link) if link else None,
        expert_bytes=parse_bytes(expert_bytes) if expert_bytes else None,
        repeats=repeats,
    )
    if request.expert_bytes is not None and request.expert_bytes < 1:
        raise UsageError(f"--expert-bytes must be at least 1B, got {expert_bytes}.")
    loaded = load_model(model, device=chosen, dtype=dtype)
    say(f"{loaded.shape.model_id} on {chosen}: copies and one layer's experts")
    with progress("measuring", stages(chosen), "parts") as report:
        return measure_profile(request, loaded, report.advance)


def _rows(found: ProfileFile) -> list[tuple[str, str]]:
    rows = [
        ("device", f"{found.machine} ({found.device}), {found.threads} threads"),
        ("link", f"{found.link} ({found.link_origin})"),
    ]
    for one in found.copy_lines:
        kind = [
            "pinned" if one.pinned else "not pinned",
            "under compute" if one.busy else "idle",
            f"{one.concurrent} at once",
        ]
        rows.append(
            (
                f"copy, {', '.join(kind)}",
                f"{format_bytes(one.bandwidth_Bps)}/s + {format_seconds(one.latency_s)}, median error "
                f"{one.line.residual:.0%}",
            )
        )
    base, per_token, per_expert = (format_seconds(weight) for weight in found.experts_line.weights)
    return [
        *rows,
        ("wait", f"{format_seconds(found.wake_s)}, request {format_seconds(found.submit_s)}"),
        (
            "experts of a layer",
            f"{base} + {per_token} a token + {per_expert} a distinct expert, median error "
            f"{found.experts_line.residual:.0%}",
        ),
        ("one more slot in a pool", format_seconds(found.group_s)),
        ("read-back", format_seconds(found.readback[0].time.seconds)),
        ("launch", format_seconds(found.launch_s)),
        ("drift while measuring", f"{found.repeat_spread:.0%}"),
    ]


def _list(as_json: bool) -> None:
    found: dict[str, Any] = {name: read_profile(named_path(name)) for name in saved_names()}
    if as_json:
        print_json({"format": LIST_FORMAT, "profiles": found})
        return
    print_rows(
        f"{len(found)} profiles",
        [
            (name, f"{one.link} ({one.link_origin}) on {one.machine}, {one.provenance.created}")
            for name, one in found.items()
        ],
    )

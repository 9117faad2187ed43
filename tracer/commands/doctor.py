"""`expertflow-trace doctor`: what this machine has, and what it lacks. Paste it into issues."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import probe
from ..console import bytes_text, print_json, print_rows
from ..records import to_json

DOCTOR_FORMAT = "expertflow.doctor/1"
_EXTRAS = {
    "model": ("torch", "transformers", "safetensors", "psutil"),
    "dashboard": ("streamlit", "plotly"),
}
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show versions, processor, memory, GPU, link, limits and what is missing.

    Example: expertflow-trace doctor --json
    """
    document = examine()
    if as_json:
        print_json(document)
        return
    print_rows("Versions", document["versions"].items())
    print_rows("Machine", _machine_rows(document))
    print_rows("GPU", _gpu_rows(document))
    print_rows("Hugging Face", _hub_rows(document["hub"]))
    missing = [(", ".join(item["missing"]), item["fix"]) for item in document["extras_missing"]]
    print_rows("Missing", missing or [("nothing", "all extras are installed")])


def examine() -> dict[str, Any]:
    """Gather everything; works without torch and without a GPU."""
    has_torch = probe.installed_version("torch") is not None
    return {
        "format": DOCTOR_FORMAT,
        "versions": probe.versions(),
        "cpu": {"model": probe.cpu_model(), "cores": probe.cpu_count()},
        "host_bytes": probe.host_bytes(),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "locked_memory_limit_bytes": _locked_memory_limit(),
        "gpus": [to_json(gpu) for gpu in probe.gpus()],
        "cuda": _cuda() if has_torch else {"usable": False, "why": "torch is not installed"},
        "hub": _hub(),
        "extras_missing": _extras_missing(),
    }


def _locked_memory_limit() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else int(soft)


def _cuda() -> dict[str, Any]:
    try:
        import torch

        build = str(torch.version.cuda or "none")
        if not torch.cuda.is_available():
            return {"usable": False, "build": build, "why": "torch sees no CUDA device"}
        return {
            "usable": True,
            "build": build,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "pinned_memory": _attempt(
                lambda: torch.empty(64 << 20, dtype=torch.uint8).pin_memory()
            ),
        }
    except (ImportError, OSError, RuntimeError) as error:
        return {"usable": False, "why": f"torch does not work: {error}"}


def _attempt(work: Callable[[], object]) -> str:
    try:
        work()
    except RuntimeError as error:
        return f"failed: {str(error).splitlines()[0]}"
    return "works"


def _hub() -> dict[str, Any]:
    home = os.environ.get("HF_HOME") or str(Path("~/.cache/huggingface"))
    cache = os.environ.get("HF_HUB_CACHE") or str(Path(home, "hub"))
    on = ("1", "ON", "YES", "TRUE")
    return {
        "cache": cache,
        "cache_exists": Path(cache).expanduser().is_dir(),
        "offline": any(os.environ.get(name, "").upper() in on for name in _OFFLINE),
    }


def _extras_missing() -> list[dict[str, Any]]:
    lacking = set(probe.missing_libraries())
    found: list[dict[str, Any]] = []
    for extra, libraries in _EXTRAS.items():
        names = [name for name in libraries if name in lacking]
        if names:
            fix = f"pip install '{probe.DISTRIBUTION}[{extra}]'"
            found.append({"extra": extra, "missing": names, "fix": fix})
    return found


def _machine_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    limit = document["locked_memory_limit_bytes"]
    return [
        ("cpu", f"{document['cpu']['model']}, {document['cpu']['cores']} cores"),
        ("memory", bytes_text(document["host_bytes"])),
        ("free disk here", bytes_text(document["free_disk_bytes"])),
        ("locked memory", "no limit" if limit is None else f"at most {bytes_text(limit)}"),
    ]


def _gpu_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (
            gpu["name"],
            f"{bytes_text(gpu['memory_bytes'])}, driver {gpu['driver']}, PCIe generation "
            f"{gpu['link_generation']} of {gpu['link_generation_max']}, width "
            f"x{gpu['link_width']} of x{gpu['link_width_max']}",
        )
        for gpu in document["gpus"]
    ]
    cuda = document["cuda"]
    if cuda["usable"]:
        rows.append(("CUDA", f"{cuda['build']}, pinned memory: {cuda['pinned_memory']}"))
    else:
        rows.append(("CUDA", f"not usable: {cuda['why']}"))
    return rows


def _hub_rows(hub: dict[str, Any]) -> list[tuple[str, str]]:
    state = "" if hub["cache_exists"] else " (does not exist yet)"
    return [("cache", f"{hub['cache']}{state}"), ("offline", "yes" if hub["offline"] else "no")]

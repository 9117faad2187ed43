"""What this machine is and what runs on it. Looks, never changes; imports torch only for CUDA."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from .types import Provenance

DISTRIBUTION = "expertflow-trace"
_LIBRARIES = (
    "numpy",
    "pyarrow",
    "pandas",
    "simpy",
    "typer",
    "rich",
    "torch",
    "transformers",
    "safetensors",
    "psutil",
    "streamlit",
    "plotly",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU as `nvidia-smi` describes it. Generation and width are of its PCIe link."""

    name: str
    driver: str
    memory_bytes: int
    link_generation: str
    link_generation_max: str
    link_width: str
    link_width_max: str


def toolkit_version() -> str:
    """Return the version of the toolkit, installed or run from its tree."""
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    if pyproject.is_file():
        return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])
    return installed_version(DISTRIBUTION) or "unknown"


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, without importing it; None if absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of Python, the toolkit and the libraries it uses, where installed."""
    found = {"python": platform.python_version(), DISTRIBUTION: toolkit_version()}
    for name in _LIBRARIES:
        version = installed_version(name)
        if version is not None:
            found[name] = version
    return found


def missing_libraries() -> tuple[str, ...]:
    """Return the libraries that the toolkit can use and that are not installed."""
    return tuple(name for name in _LIBRARIES if installed_version(name) is None)


def cpu_model() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine() or "unknown CPU"


def cpu_count() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_bytes() -> int:
    """Return the memory this process may use: the machine's, or its container's if that is less."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [installed]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return min(limits)


def device_bytes(device: str) -> int:
    """Return the total memory of `device` (`cpu`, `cuda`, `cuda:1`), in bytes."""
    if not device.startswith("cuda"):
        return host_bytes()
    import torch

    return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs `nvidia-smi` lists; empty if there is no such command."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    fields = (
        "name,driver_version,memory.total,pcie.link.gen.current,pcie.link.gen.max,"
        "pcie.link.width.current,pcie.link.width.max"
    )
    try:
        done = subprocess.run(
            [command, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return tuple(_gpu(row) for row in rows if len(row) == 7)


def machine_name(device: str = "cpu") -> str:
    """Name the machine by its hardware, for reports: the GPU if `device` is one, and the CPU."""
    processor = f"{cpu_model()}, {cpu_count()} cores"
    found = gpus() if device.startswith("cuda") else ()
    index = int(device.partition(":")[2] or 0)
    return f"{found[index].name} ({processor})" if index < len(found) else processor


def command_line() -> str:
    """Return the command as typed, without the path the program happened to be at."""
    program = Path(sys.argv[0]).name
    if program in ("", "-c", "-m", "__main__.py", DISTRIBUTION):
        program = DISTRIBUTION
    return shlex.join([program, *sys.argv[1:]])


def provenance(
    seed: int,
    text: Literal["own-generation", "teacher-forced", "imported"],
    command: str | None = None,
    notes: Sequence[str] = (),
) -> Provenance:
    """Say what makes a file now: command, time (UTC), versions and seed."""
    return Provenance(
        command=command_line() if command is None else command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        seed=seed,
        text=text,
        notes=tuple(notes),
    )


def _gpu(row: list[str]) -> Gpu:
    mebibytes = int(row[2]) if row[2].isdigit() else 0
    return Gpu(
        name=row[0],
        driver=row[1],
        memory_bytes=mebibytes << 20,
        link_generation=row[3],
        link_generation_max=row[4],
        link_width=row[5],
        link_width_max=row[6],
    )

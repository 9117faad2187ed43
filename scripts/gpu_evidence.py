"""Collects evidence on a CUDA machine: tests, link table, and the whole loop on the embedded model.

Runs from the tree with the machine's own Python (torch, transformers, pyarrow, numpy; SimPy is pure Python
and can be brought along on PYTHONPATH). Writes traces/gpu/<device>/, finished parts are not run again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "expertflow.tracer"]


def main() -> int:
    """Run every part that has no evidence yet; the exit code is that of the worst part."""
    if not torch.cuda.is_available():
        print("No CUDA device: nothing was run and nothing is claimed.", file=sys.stderr)
        return 4
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = ROOT / "traces" / "gpu" / device
    out.mkdir(parents=True, exist_ok=True)
    codes = [run(name, arguments, out) for name, arguments in parts(out)]
    return max(codes)


def parts(out: Path) -> list[tuple[str, list[str]]]:
    """The parts in order: name of the log, and the command."""
    trace, policy = str(out / "trace"), str(out / "policy.json")
    machine = str(out / "machine.json")
    cuda = ["--device", "cuda"]
    return [
        ("doctor", [*COMMAND, "doctor", "--json"]),
        ("tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-q", str(ROOT / "tests" / "gpu")]),
        ("run", [*COMMAND, "run", "--out", trace, "--limit", "24", "--overwrite", *cuda]),
        ("check", [*COMMAND, "check", trace]),
        ("calibrate", [*COMMAND, "calibrate", "--out", machine, *cuda]),
        ("tune", [*COMMAND, "tune", trace, "--machine", machine, "--out", policy]),
        ("deploy", [*COMMAND, "deploy", policy, *cuda, "--out", str(out / "measured.json")]),
        ("verify", [*COMMAND, "verify", policy, *cuda, "--out", str(out / "verdict.json")]),
    ]


def run(name: str, command: list[str], out: Path) -> int:
    """Run one part unless its record says that it has succeeded; keep its output."""
    record = out / f"{name}.record.json"
    if record.exists() and json.loads(record.read_text())["exit_code"] == 0:
        print(f"{name}: done before")
        return 0
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    record.write_text(
        json.dumps(
            {
                "command": [Path(part).name if part.startswith("/") else part for part in command],
                "exit_code": done.returncode,
                "seconds": round(time.monotonic() - began, 1),
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "stdout": done.stdout,
                "stderr": done.stderr,
            },
            indent=2,
        )
        + "\n"
    )
    print(f"{name}: exit {done.returncode} in {time.monotonic() - began:.0f} s")
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

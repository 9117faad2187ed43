"""Collects evidence on a machine with a GPU: tests, the whole loop on the embedded model, and the bench.

Runs from the tree with the machine's own Python: torch, transformers, pyarrow and numpy. Writes traces/gpu/<device>/;
finished parts are not run again, and what does not fit the time is left for the next call. What `make gpu` runs; with
`--device cpu --quick` it can be tried anywhere (docs/gpu.md).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(ROOT / "scripts" / "gpu" / "command.py")]
BENCH = [sys.executable, str(ROOT / "scripts" / "gpu_bench.py")]
_NOT_VALIDATED = 5
_TOO_LONG = 124
_BENCH_SHARE = 0.6
"""Of the time, for the bench; it stops by itself."""


@dataclass(frozen=True, slots=True)
class Part:
    """One command and its log's name. The bench is never done: it goes on where it stopped."""

    name: str
    command: list[str]
    is_repeated: bool = False


def main() -> int:
    """Run every part that has no evidence yet; the exit code is that of the worst part."""
    options = _options()
    is_cuda = options.device.startswith("cuda")
    if is_cuda and not torch.cuda.is_available():
        print("No CUDA device: nothing was run and nothing is claimed.", file=sys.stderr)
        return 4
    out = options.out or ROOT / "traces" / "gpu" / _slug(options.device)
    out.mkdir(parents=True, exist_ok=True)
    end_s = time.monotonic() + options.limit_s
    codes: list[int] = []
    chosen = parts(out, options)
    names = [part.name for part in chosen]
    wanted = options.parts.split(",") if options.parts else names
    if unknown := [name for name in wanted if name not in names]:
        print(f"error: no part {unknown[0]!r}; there are: {', '.join(names)}.", file=sys.stderr)
        return 2
    for part in chosen:
        if part.name not in wanted:
            continue
        left_s = end_s - time.monotonic()
        if left_s <= 1:
            print(f"{part.name}: no time left; run this again to go on")
            continue
        codes.append(run(part, out, options.device, left_s))
    return max(codes, default=0)


def parts(out: Path, options: argparse.Namespace) -> list[Part]:
    """The parts in order. The bench comes before the loop's last steps, which take longest and say least."""
    trace, policy = str(out / "trace"), str(out / "policy.json")
    machine, profile = str(out / "machine.json"), str(out / "profile.json")
    on = ["--device", options.device]
    slow = ["--link", options.link] if options.link else []
    few = ["--limit", "6", "--max-new-tokens", "4"] if options.quick else ["--limit", "24"]
    short = ["--limit", "3", "--max-new-tokens", "4"] if options.quick else []
    repeats = ["--repeats", "3"] if options.quick else []
    bench = [
        *BENCH,
        *on,
        *slow,
        "--out",
        str(out),
        "--limit-s",
        f"{_BENCH_SHARE * options.limit_s:g}",
    ]
    bench += ["--quick"] if options.quick else []
    bench += ["--subjects", options.subjects] if options.subjects else []
    bench += ["--batches", options.batches] if options.batches else []
    tune = ["tune", trace, "--budget", "0.5", "--machine", machine, "--out", policy]
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", str(ROOT / "tests" / "gpu")]
    has_tests = importlib.util.find_spec("pytest") is not None
    found = [
        Part("doctor", [*COMMAND, "doctor", "--json"]),
        *([Part("tests", tests)] if has_tests and options.device.startswith("cuda") else []),
        Part("bench", bench, is_repeated=True),
        Part("run", [*COMMAND, "run", "--out", trace, *few, "--overwrite", *on, *slow]),
        Part("check", [*COMMAND, "check", trace]),
        Part("profile", [*COMMAND, "profile", "--out", profile, *repeats, *on, *slow]),
        Part("calibrate", [*COMMAND, "calibrate", "--out", machine, *short, *on, *slow]),
        Part("tune", [*COMMAND, *tune]),
        Part("deploy", _measured("deploy", policy, out / "measured.json", [*short, *on, *slow])),
    ]
    once = ["--repeats", "1"] if options.quick else []
    more = [*short, *once, *on, *slow]
    found.append(Part("verify", _measured("verify", policy, out / "verdict.json", more)))
    if not has_tests:
        print("tests: not run, pytest is not installed")
    return found


def run(part: Part, out: Path, device: str, left_s: float) -> int:
    """Run one part unless its record says that it has succeeded; keep its output."""
    record = out / f"{part.name}.record.json"
    if record.exists() and not part.is_repeated:
        before = json.loads(record.read_text(encoding="utf-8"))
        if before["exit_code"] in (0, _NOT_VALIDATED):
            print(f"{part.name}: done before, exit {before['exit_code']}")
            return before["exit_code"]
    began = time.monotonic()
    code, stdout, stderr = _output(part.command, left_s)
    record.write_text(
        json.dumps(
            {
                "command": [_public(word) for word in part.command],
                "exit_code": code,
                "seconds": round(time.monotonic() - began, 1),
                "device": _name(device),
                "torch": torch.__version__,
                "stdout": stdout,
                "stderr": stderr,
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    print(f"{part.name}: exit {code} in {time.monotonic() - began:.0f} s", flush=True)
    if code:
        print(stderr[-2000:], file=sys.stderr)
    return code


def _output(command: list[str], left_s: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; 124 if it took longer than what is left."""
    places = [str(ROOT / ".typing"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(places),
    }
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left_s
        )
    except subprocess.TimeoutExpired as stopped:
        parts = (stopped.stdout, stopped.stderr)
        found = [part.decode(errors="replace") if part else "" for part in parts]  # type: ignore[union-attr]
        return _TOO_LONG, found[0], found[1] + f"\nStopped after {left_s:.0f} s: the time is up."
    return done.returncode, done.stdout, done.stderr


def _measured(command: str, policy: str, out: Path, more: list[str]) -> list[str]:
    return [*COMMAND, command, policy, "--out", str(out), *more]


def _public(word: str) -> str:
    """A word of a command without the folders of this machine."""
    return Path(word).name if word.startswith("/") else word


def _name(device: str) -> str:
    if not device.startswith("cuda"):
        return "CPU, not a GPU"
    return torch.cuda.get_device_name(torch.device(device))


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", _name(device).lower()).strip("-")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script.")
    parser.add_argument("--quick", action="store_true", help="As little as possible: to try it.")
    parser.add_argument("--link", help="Emulate a link on the CPU, for example 1GB/s+20us.")
    parser.add_argument("--limit-s", type=float, default=520.0, help="Stop after so many seconds.")
    parser.add_argument("--out", type=Path, help="Default: traces/gpu/<device>.")
    parser.add_argument("--parts", help="Some of the parts: run,check,tune.")
    parser.add_argument("--subjects", help="Models of the bench.")
    parser.add_argument("--batches", help="Batch sizes of the bench.")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

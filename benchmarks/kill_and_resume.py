"""Kills a tracing run at random moments (SIGKILL) and resumes it: is the trace the same as an undisturbed one?

Every trial is a fresh `expertflow-trace run` of the embedded model in a process of its own, killed once at a
random moment after its folder appeared, then looked at with `check`, then completed with `--resume`. Equal means:
routing equal row by row; sequences, steps and transfers equal but for times; the same shape, settings and
memory in the manifest. Parts are written every half second here (five in ordinary runs), so that kills meet
many of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
from bench_common import hardware
from expertflow.tracer.check import check_trace
from expertflow.tracer.store import Trace
from expertflow.tracer.unfinished import look, unfinished_folder

FLUSH_S = 0.5
SPAN = 0.8
"""Share of an undisturbed run in which kills fall: others on the machine may make later runs quicker."""
CODE = f"""
import sys
from expertflow.tracer import record
from expertflow.tracer.main import main
record._FLUSH_EVERY_S, record._ROWS_PER_TABLE = {FLUSH_S}, 512
main(sys.argv[1:])
"""
SAME = ("shape", "run", "recorded", "memory", "salvaged")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run that was killed. `left` says what `check` found; steps that were whole on disk, and all of them."""

    killed_after_s: float
    left: str
    steps_on_disk: int
    steps: int
    is_same: bool


def command(out: Path, options: argparse.Namespace, *more: str) -> list[str]:
    """The run that is killed."""
    words = ["run", "--out", str(out), "--limit", str(options.prompts), "--device", "cpu"]
    words += ["--max-new-tokens", str(options.tokens), "--threads", "1", *more]
    return [sys.executable, "-c", CODE, *words]


def environment() -> dict[str, str]:
    """What lets another process find the packages in a checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def start(words: list[str]) -> subprocess.Popen[bytes]:
    """Begin a run in a process of its own."""
    return subprocess.Popen(
        words,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def seconds_of_run(out: Path, options: argparse.Namespace) -> float:
    """Run undisturbed; seconds from the appearance of its folder to that of the trace."""
    process = start(command(out, options))
    began = wait_for_folder(out, process)
    while process.poll() is None and not out.exists():
        time.sleep(0.001)
    seconds = time.monotonic() - began
    if process.wait() != 0:
        raise SystemExit(f"the undisturbed run ended with code {process.returncode}")
    return seconds


def wait_for_folder(out: Path, process: subprocess.Popen[bytes]) -> float:
    """Wait until a run writes its folder; returns when that was."""
    partial = out.with_name(out.name + ".partial")
    while process.poll() is None and not partial.exists():
        time.sleep(0.001)
    return time.monotonic()


def trial(out: Path, wait_s: float, expected: Trace, options: argparse.Namespace) -> Trial:
    """Kill one run and complete it."""
    process = start(command(out, options))
    wait_for_folder(out, process)
    time.sleep(wait_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left, steps_on_disk = what_is_left(out)
    resumed = subprocess.run(
        command(out, options, "--resume"),
        env=environment(),
        check=False,
        capture_output=True,
        text=True,
    )
    if resumed.returncode:
        raise SystemExit(f"resuming ended with code {resumed.returncode}: {resumed.stderr}")
    check_trace(out)  # raises unless it is sound
    found = Trace.open(out)
    return Trial(
        killed_after_s=round(wait_s, 3),
        left=left,
        steps_on_disk=steps_on_disk,
        steps=found.manifest.rows("steps") // (found.shape.num_moe_layers + 1),
        is_same=is_same(found, expected),
    )


def what_is_left(out: Path) -> tuple[str, int]:
    """What a kill left, and the whole steps of it."""
    if out.exists():
        return "complete", -1
    partial = unfinished_folder(out)
    if partial is None:
        return "nothing yet", 0
    found = look(partial)
    return ("damaged" if found.lost else "unfinished"), found.steps


def is_same(found: Trace, expected: Trace) -> bool:
    """Whether two traces are one run, apart from times."""
    for table in ("routing", "sequences", "steps", "transfers"):
        names = [name for name in found.schemas[table].names if not name.endswith("_s")]
        if found.table(table, names).to_pylist() != expected.table(table, names).to_pylist():
            return False
    return all(getattr(found.manifest, name) == getattr(expected.manifest, name) for name in SAME)


def main() -> None:
    """Kill, resume, compare, and end with 1 if any trace differs."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--kills", type=int, default=30)
    made.add_argument("--prompts", type=int, default=12)
    made.add_argument("--tokens", type=int, default=48)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", action="store_true", help="print JSON")
    options = made.parse_args()
    chance = random.Random(options.seed)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "undisturbed"
        run_s = seconds_of_run(whole, options)
        expected = Trace.open(whole)
        for number in range(options.kills):
            wait_s = chance.uniform(0, SPAN * run_s)
            trials.append(trial(Path(folder) / f"killed-{number}", wait_s, expected, options))
            print(f"{number + 1}/{options.kills}: {trials[-1]}", file=sys.stderr)
    same = sum(one.is_same for one in trials)
    if options.json:
        document = {"benchmark": Path(__file__).name, "machine": hardware(), "run_s": run_s}
        print(json.dumps({**document, "trials": [asdict(one) for one in trials]}, indent=2))
    else:
        kinds = sorted({one.left for one in trials})
        counts = ", ".join(f"{sum(o.left == kind for o in trials)} {kind}" for kind in kinds)
        print(f"Measured on {hardware()}.")
        print(f"{len(trials)} kills at random moments of a run of {run_s:.1f} s: left {counts}.")
        print(f"Resumed to the same, sound trace: {same} of {len(trials)}.")
    sys.exit(0 if same == len(trials) else 1)


if __name__ == "__main__":
    main()

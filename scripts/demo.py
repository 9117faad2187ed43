"""The main job on the embedded model: trace, calibrate, tune, deploy, verify. What `make demo` runs.

Each step is the command a user would type; it is printed before it runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "expertflow.tracer"]


def main() -> int:
    """Run the four steps into one folder; stop at the first that fails (5, not validated, is told)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--link", default="1GB/s+20us")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    began = time.monotonic()
    code = run_all(options.out, options.link)
    print(f"\nDemo finished in {time.monotonic() - began:.0f} s. See it with:")
    print(f"  EXPERTFLOW_DATA={options.out} .venv/bin/streamlit run dashboard/app.py")
    return code


def run_all(out: Path, link: str) -> int:
    """The loop: record, measure the machine, choose, run, judge."""
    trace, policy = str(out / "trace"), str(out / "policy.json")
    machine = str(out / "machine.json")
    emulated = ["--link", link]
    run = ["run", "--out", trace, "--limit", "24", *emulated]
    calibrate = ["calibrate", "--out", machine, *emulated]
    tune = ["tune", trace, "--budget", "0.5", "--machine", machine, "--out", policy]
    deploy = ["deploy", policy, *emulated, "--out", str(out / "measured.json")]
    verify = ["verify", policy, *emulated, "--out", str(out / "verdict.json")]
    for step in (run, ["check", trace], calibrate, tune, deploy, verify):
        code = call(step)
        if code == 5:
            print("The forecast was not validated on this machine, now; the verdict says why.")
        elif code != 0:
            return code
    return 0


def call(arguments: list[str]) -> int:
    """Print and run one command."""
    print(f"\n$ expertflow-trace {shlex.join(arguments)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_paths())}
    return subprocess.run([*COMMAND, *arguments], env=environment, check=False).returncode


def _paths() -> list[str]:
    tree = str(Path(__file__).resolve().parent.parent / ".typing")
    return [tree, *filter(None, [os.environ.get("PYTHONPATH")])]


if __name__ == "__main__":
    sys.exit(main())

"""How well forecasts hold on this machine: gaps of `verify` over links, batch sizes and budgets.

Every verify calibrates in its own process, on other prompts and sizes than it judges. Prints a Markdown table
and, with --out, keeps all verdicts. Emulated links; the model is the embedded one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CASES = (("1GB/s+20us", 1), ("4GB/s+10us", 1), ("1GB/s+20us", 4))


def main() -> None:
    """Verify each case and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    throughput: list[float] = []
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for link, batch_size in CASES:
            verdict = verify(Path(folder), link, batch_size, options.repeats)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                name = f"{link.replace('/', 'p').replace('+', '-')}-batch{batch_size}.verdict.json"
                (options.out / name).write_text(json.dumps(verdict, indent=2) + "\n")
            for run in verdict["runs"]:
                gaps = {check["quantity"]: check["gap"] for check in run["checks"]}
                throughput.append(abs(gaps["tokens_per_s"]))
                memory.append(abs(gaps["peak_device_bytes"]))
                rows.append(row(link, batch_size, run, gaps))
    print_table(rows)
    print(
        f"\n{len(rows)} configurations: throughput gap median {np.median(throughput):.1%}, worst "
        f"{max(throughput):.1%}; peak memory gap median {np.median(memory):.2%}, worst "
        f"{max(memory):.2%}."
    )


def verify(folder: Path, link: str, batch_size: int, repeats: int) -> dict[str, object]:
    """Trace, tune and verify one case with the commands a user would type."""
    trace, policy = folder / "trace", folder / "policy.json"
    common = ["--link", link, "--batch-size", str(batch_size)]
    command("run", "--out", str(trace), "--overwrite", "--limit", "24", *common)
    command("tune", str(trace), "--budget", "0.5", "--out", str(policy))
    repeat = ["--repeats", str(repeats), "--json"]
    return json.loads(command("verify", str(policy), *common, *repeat))


def command(*arguments: str) -> str:
    """Run one command; exit 5 (not validated) is a finding, not a failure."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing")}
    done = subprocess.run(
        [sys.executable, "-m", "expertflow.tracer", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 5):
        raise SystemExit(done.stderr)
    return done.stdout


def row(link: str, batch_size: int, run: dict, gaps: dict[str, float]) -> tuple[str, ...]:
    """One line of the table."""
    speed = next(check for check in run["checks"] if check["quantity"] == "tokens_per_s")
    return (
        link,
        str(batch_size),
        run["label"],
        f"{speed['predicted']:.1f}",
        f"{speed['measured']:.1f}",
        f"{gaps['tokens_per_s']:+.1%}",
        f"{gaps['hit_rate'] * 100:+.2f}",
        f"{gaps['bytes_per_token']:+.1%}",
        f"{gaps['peak_device_bytes']:+.2%}",
        f"{speed['noise']:.1%}",
        "yes" if run["same_tokens"] else "NO",
        "yes" if run["log_replays"] else "NO",
    )


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print Markdown."""
    head = (
        "link (emulated)",
        "batch",
        "policy",
        "predicted tok/s",
        "measured tok/s",
        "gap",
        "hit gap, points",
        "bytes gap",
        "memory gap",
        "noise",
        "same text",
        "log replays",
    )
    for line in (head, ("---",) * len(head), *rows):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()

"""Pages that are made from code are current, and the README's promises point at things that exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_trace_format_page_is_what_the_schema_says():
    script = ROOT / "scripts" / "trace_format_doc.py"

    done = subprocess.run([sys.executable, script, "--check"], check=False)

    assert done.returncode == 0, f"run {script.name}"


def test_the_readme_names_commands_that_exist():
    from expertflow.tracer.main import commands

    named = set(re.findall(r"^expertflow-trace (\w+)", README, flags=re.MULTILINE))

    assert named <= set(commands())
    assert {"run", "tune", "deploy", "verify"} <= named


def test_files_the_readme_points_at_are_there():
    for path in re.findall(r"`((?:docs|traces|scripts|benchmarks)/[\w./-]+)`", README):
        if not path.startswith("traces/gpu"):
            assert (ROOT / path).exists(), path


def test_the_shipped_demo_results_are_sound_and_validated():
    from expertflow.simulator.policy.spec import read_policy
    from expertflow.simulator.result import Verdict
    from expertflow.tracer.check import check_trace
    from expertflow.tracer.records import from_json, read_json

    demo = ROOT / "traces" / "demo"
    verdict = from_json(Verdict, read_json(demo / "verdict.json"))

    assert check_trace(demo / "trace").steps > 0
    assert read_policy(demo / "policy.json").behaviour.slots > 0
    assert all(run.same_tokens and run.log_replays for run in verdict.runs)

"""Pages that are made from code are current, and the README's promises point at things that exist."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from expertflow.tracer.main import commands, main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SIMULATOR = (ROOT / "docs" / "simulator.md").read_text(encoding="utf-8")
_LINE = re.compile(r"^(?: {4})?(expertflow-trace .+)$", flags=re.MULTILINE)


def function_of(name: str):
    module, _, function = commands()[name].partition(":")
    return getattr(pytest.importorskip(module), function)


def documented() -> Iterator[tuple[str, str]]:
    """Where a command line is written, and the line: on pages, and as the example in a command's help."""
    for page in PAGES:
        for line in _LINE.findall(page.read_text(encoding="utf-8")):
            yield page.name, line
    for path in sorted(ROOT.glob("*/commands/*.py")):
        for line in re.findall(
            r"^ +Example: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            yield path.name, line


def test_the_trace_format_page_is_what_the_schema_says():
    script = ROOT / "scripts" / "trace_format_doc.py"

    done = subprocess.run([sys.executable, script, "--check"], check=False)

    assert done.returncode == 0, f"run {script.name}"


@pytest.mark.parametrize(
    ("place", "line"), [pytest.param(*found, id=" ".join(found)[:60]) for found in documented()]
)
def test_documented_command_lines_are_understood(place, line):
    typer = pytest.importorskip("typer")
    name, *arguments = shlex.split(line)[1:]
    app = typer.Typer()
    app.command(name)(function_of(name))

    # Names, options and kinds of values are checked; nothing is run.
    typer.main.get_command(app).make_context(name, [*arguments])

    for word in arguments:
        if word.startswith("traces/demo"):
            assert (ROOT / word).exists(), f"{place}: {word}"
            if name in ("info", "check", "simulate", "tune", "sweep", "curve"):
                assert (ROOT / word / "manifest.json").exists(), f"{place}: {word} is no trace"


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with what docs/simulator.md takes for granted, and the files it shows."""
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "demo").symlink_to(ROOT / "traces" / "demo")
    (tmp_path / "requests.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,37,4\n"
        "2023-11-16 18:17:04.0319600,90,9\n"
    )
    blocks = dict(re.findall(r"^```(python|toml)\n(.*?)^```", SIMULATOR, re.MULTILINE | re.DOTALL))
    (tmp_path / "space.toml").write_text(blocks["toml"])
    subprocess.run([sys.executable, "-c", blocks["python"]], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_simulator_page_works_from_top_to_bottom(workplace, capsys):
    for line in _LINE.findall(SIMULATOR):
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(line)[1:])

        streams = capsys.readouterr()
        assert not stop.value.code, f"{line}: {streams.err}"
        assert streams.out, line

    for name in ("curve.json", "policy.json", "goals.json", "sweeps/x/results.parquet"):
        assert (workplace / name).is_file()


def test_the_readme_names_commands_that_exist():
    named = set(re.findall(r"^expertflow-trace ([\w-]+)", README, flags=re.MULTILINE))

    assert named <= set(commands())
    assert {"run", "tune", "deploy", "verify"} <= named


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("caches", "cache"),
        ("allocations", "allocation"),
        ("answers", "misses"),
        ("predictors", "predictor"),
        ("schedulers", "scheduler"),
        ("routings", "routing"),
    ],
)
def test_the_readme_lists_every_member(row, kind):
    from expertflow.simulator.policy.registry import FAMILIES

    family = next(family for family in FAMILIES if family.kind == kind)
    (line,) = re.findall(rf"^\| {row}\b.*$", README, flags=re.MULTILINE)

    assert sorted(re.findall(r"`(\w+)`", line)) == family.names()


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

"""What `make gpu` runs, tried on the CPU: in a bare environment, in the tiniest form, and resumed."""

import importlib
import json
import os
import runpy
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
STAND_INS = SCRIPTS / "gpu" / "stand_ins"
LACKING = (
    *("typer", "rich", "simpy", "psutil", "pandas", "numba", "llvmlite", "sklearn", "scipy"),
    *("pydantic", "pydantic_core", "optuna", "lightgbm", "polars", "duckdb", "accelerate", "ray"),
    *("streamlit", "plotly", "pytest", "hypothesis", "datasets", "prometheus_client"),
)


@pytest.fixture
def parts(monkeypatch):
    """The modules of scripts/gpu, importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = ("bars", "cells", "evidence", "settings", "summary")
    return {name: importlib.import_module(f"gpu.{name}") for name in names}


# --- stand-ins ---------------------------------------------------------------------------------


def test_the_stand_in_for_simpy_gives_the_engine_the_same_floats(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, dataclasses\n"
        f"sys.path[:0] = [{str(ROOT / '.typing')!r}, {str(ROOT)!r}]\n"
        "if sys.argv[1] == 'stand-in': sys.path.insert(0, sys.argv[2])\n"
        "import simpy\n"
        "assert ('stand_ins' in simpy.__file__) == (sys.argv[1] == 'stand-in'), simpy.__file__\n"
        "from expertflow.simulator.engine import simulate\n"
        "from expertflow.simulator.policy.spec import make_spec\n"
        "from expertflow.simulator.workload import workload_of\n"
        "from expertflow.simulator.forecast import costs_of\n"
        "from expertflow.tracer.store import Trace\n"
        "trace = Trace.open(sys.argv[3])\n"
        "import numpy as np\n"
        "workload = workload_of(trace).select(np.arange(40))\n"
        "for slots, predictor in ((20, 'none'), (64, 'gate_lookahead'), (160, 'gate_lookahead')):\n"
        "    spec = make_spec(slots=slots, predictor=predictor)\n"
        "    record = simulate(workload, spec, trace.shape, costs_of(trace))\n"
        "    print(record.steps['total_s'], record.copies[-5:], len(record.log))\n"
    )
    demo = str(ROOT / "traces" / "demo" / "trace")
    real, ours = (
        subprocess.run(
            [sys.executable, script, kind, STAND_INS, demo],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for kind in ("real", "stand-in")
    )

    assert real == ours
    assert len(real) > 1000


@pytest.mark.parametrize("name", ["simulate", "run", "deploy", "sweep", "tune", "replay"])
def test_the_stand_in_for_typer_reads_what_the_commands_declare(name):
    from expertflow.tracer.main import commands

    stand_in = runpy.run_path(str(STAND_INS / "typer.py"))
    module, _, function = commands()[name].partition(":")
    code = (
        f"import sys; sys.path[:0] = [{str(STAND_INS)!r}, {str(ROOT / '.typing')!r}]\n"
        "import typer, importlib\n"
        f"function = getattr(importlib.import_module({module!r}), {function!r})\n"
        f"parser, names = typer._parser(function, {name!r})\n"
        "print(*sorted(action.dest for action in parser._actions if action.dest != 'help'))\n"
        "print(*sorted(names))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    read, declared = done.stdout.splitlines()

    assert read == declared
    assert "Typer" in stand_in


@pytest.mark.parametrize(
    "text",
    ["plain", "[bold]Title[/bold]", "[cyan]name   [/cyan]  12 [tokens]", "a[0] = [1, 2]"],
)
def test_the_stand_in_for_rich_prints_what_rich_prints_without_colour(text, capsys):
    from rich.console import Console
    from rich.markup import escape

    code = (
        f"import sys; sys.path.insert(0, {str(STAND_INS)!r})\n"
        "from rich.console import Console\nfrom rich.markup import escape\n"
        f"Console().print({text!r})\nConsole().print(escape({text!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    console = Console(highlight=False, soft_wrap=True, color_system=None, width=200)
    console.print(text)
    console.print(escape(text))

    assert done.stdout == capsys.readouterr().out


# --- bars --------------------------------------------------------------------------------------


def record(parts, kind, speed, *, batch=1, share=0.5, predicted=None, peak=100.0, copy_s=()):
    def result(tokens_per_s):
        return {
            "tokens_per_s": tokens_per_s,
            "decode": {"tokens_per_s": tokens_per_s, "hit_rate": 0.5},
            "peak_device_bytes": peak,
            "bytes_per_token": 1e6,
            "same_tokens": True,
            "log_replays": True,
            "label": kind,
            "model_id": "m",
        }

    return parts["evidence"].CellRecord(
        key=f"m/{batch}/{kind}@{share}",
        subject="m",
        kind=kind,
        batch=batch,
        share=share,
        settings="s",
        predicted=None if predicted is None else {**result(predicted), "peak_device_bytes": 101.0},
        measured=[result(speed * factor) for factor in (0.9, 1.0, 1.2)],
        samples=[{"copy_bytes": 1000, "copy_s": list(copy_s)}],
        seconds=1.0,
    )


def test_goals_are_met_missed_or_not_measured(parts):
    cells = [
        record(parts, "lru", 50.0, predicted=52.0, copy_s=(1e-6, 1.25e-6, 2e-6)),
        record(parts, "look_ahead", 60.0, predicted=40.0),
        record(parts, "lru_write_back", 40.0, predicted=40.0),
        record(parts, "accelerate", 15.0),
        record(parts, "resident", 80.0, share=1.0, predicted=80.0),
    ]
    found = {bar.name: bar for bar in parts["bars"].bars(cells, [(1000, 1e-6), (2000, 2e-6)])}

    def verdict(words):
        return next((b.value, b.verdict) for name, b in found.items() if words in name)

    assert verdict("Accelerate") == (pytest.approx(60 / 15), "missed")
    assert verdict("write-back") == (pytest.approx(60 / 40), "met")
    assert verdict("stock transformers") == (None, "not measured")
    assert verdict("bus's measured peak") == (pytest.approx(0.8), "missed")
    assert verdict("peak memory") == (pytest.approx(0.01), "met")
    # Gaps 4 %, 33 %, 0 %, 0 %: two percent in the middle.
    assert verdict("throughput") == (pytest.approx(0.02), "met")
    assert verdict("same text")[1] == "met"


def test_nothing_measured_is_nothing_claimed(parts):
    assert {bar.verdict for bar in parts["bars"].bars([], [])} == {"not measured"}


def test_evidence_survives_a_line_that_was_cut_short(parts, tmp_path):
    evidence = parts["evidence"].Evidence(tmp_path, "s")
    evidence.add(record(parts, "lru", 50.0))
    path = tmp_path / "cells.jsonl"
    path.write_text(path.read_text() + '{"key": "half a li')

    again = parts["evidence"].Evidence(tmp_path, "s")
    again.add(record(parts, "static", 40.0))
    once_more = parts["evidence"].Evidence(tmp_path, "s")

    assert [cell.kind for cell in once_more.cells] == ["lru", "static"]
    assert parts["evidence"].Evidence(tmp_path, "other settings").cells == []


# --- the scripts -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A Python that has what a bare GPU machine has: torch, transformers and what they bring, pyarrow, numpy."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    target = folder / "lib" / version / "site-packages"
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        name = path.name.lower().replace("-", "_").partition(".")[0]
        lacks = any(name == word or name.startswith(f"{word}_") for word in LACKING)
        is_metadata = path.name.endswith(".dist-info")
        stem = path.name.partition("-")[0].lower() if is_metadata else name
        if lacks or stem in LACKING or path.suffix == ".pth" or "expertflow" in name:
            continue
        (target / path.name).symlink_to(path)
    return folder / "bin" / "python"


def run(python, script, *arguments) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [python, SCRIPTS / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def test_the_bench_runs_where_nothing_but_torch_is_and_goes_on_where_it_stopped(bare, tmp_path):
    tiniest = ("--device", "cpu", "--quick", "--link", "1GB/s+20us", "--batches", "1")
    tiniest += ("--subjects", "olmoe-1b-7b", "--threads", "1", "--out", tmp_path)
    first = run(bare, "gpu_bench.py", *tiniest, "--kinds", "stock")
    before = (tmp_path / "cells.jsonl").read_text().splitlines()
    again = run(bare, "gpu_bench.py", *tiniest, "--kinds", "stock,ids_plec,accelerate")
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()

    assert first.returncode == 0, first.stderr
    assert again.returncode == 0, again.stderr
    assert lines[: len(before)] == before
    cells = [json.loads(line) for line in lines]
    keys = [cell["key"].partition("batch-1/")[2] for cell in cells]
    assert len(set(keys)) == len(keys)  # nothing twice
    assert set(keys) == {"stock@1", "ids_plec@0.5", "ids_plec@0.25", "ids_plec@0.75"}
    assert "accelerate@0.5: left out" in again.stderr
    for cell in cells:
        assert all("random weights" in result["device"] for result in cell["measured"])
        if cell["kind"] != "stock":
            assert cell["predicted"]["source"] == "predicted"
            assert all(
                r["log_replays"] and r["link_origin"] == "emulated" for r in cell["measured"]
            )
            assert all(r["same_tokens"] is not False for r in cell["measured"])
            assert cell["samples"][0]["pass_s"]
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["format"] == "expertflow.gpu-bench/1"
    assert "On the CPU, not a GPU" in document["about"]["words"]
    page = (tmp_path / "bench.md").read_text()
    assert "Scaled down to try the script" in page
    assert "random weights" in page


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--device", "cuda"), 4, "No CUDA device"),
        (("--device", "cpu", "--quick", "--subjects", "olmoe"), 2, "olmoe-1b-7b"),
        (("--device", "cpu", "--quick", "--kinds", "lur"), 2, "'lru'"),
        (("--device", "cpu", "--quick", "--link", "fast"), 2, "fast"),
    ],
)
def test_the_bench_says_what_it_cannot_do(arguments, code, words, tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench = importlib.import_module("gpu_bench")
    monkeypatch.setattr(sys, "argv", ["gpu_bench.py", *arguments, "--out", str(tmp_path)])

    assert bench.main() == code
    assert words in capsys.readouterr().err


def test_without_a_gpu_no_evidence_is_claimed(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(sys.executable, "gpu_evidence.py", "--out", tmp_path)

    assert done.returncode == 4
    assert "nothing is claimed" in done.stderr
    assert not list(tmp_path.iterdir())


def test_commands_run_in_a_bare_environment_and_are_not_run_twice(bare, tmp_path):
    (tmp_path / "trace").symlink_to(ROOT / "traces" / "demo" / "trace")
    tried = ("--device", "cpu", "--quick", "--out", tmp_path)
    missing = subprocess.run([bare, "-c", "import typer"], capture_output=True, check=False)
    first = run(bare, "gpu_evidence.py", *tried, "--parts", "doctor")
    again = run(bare, "gpu_evidence.py", *tried, "--parts", "doctor,check")
    records = {path.name.partition(".")[0]: path for path in tmp_path.glob("*.record.json")}

    assert missing.returncode != 0
    assert first.returncode == 0, first.stderr
    assert again.returncode == 0, again.stderr
    assert "doctor: done before" in again.stdout
    assert set(records) == {"doctor", "check"}
    for path in records.values():
        found = json.loads(path.read_text())
        assert found["device"] == "CPU, not a GPU"
        assert found["exit_code"] == 0
    doctor = json.loads(json.loads(records["doctor"].read_text())["stdout"])
    assert "typer" not in doctor["versions"]


def test_all_that_make_gpu_promises_is_among_its_parts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    evidence = importlib.import_module("gpu_evidence")
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", "--device", "cuda"])
    names = [part.name for part in evidence.parts(tmp_path, evidence._options())]

    wanted = ["doctor", "tests", "bench", "run", "check", "profile", "calibrate"]
    assert names == [*wanted, "tune", "deploy", "verify"]

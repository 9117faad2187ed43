"""`expertflow-trace run` from the outside: exit codes, what is left on disk, kills and Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from expertflow.tracer.check import check_trace
from expertflow.tracer.main import main
from expertflow.tracer.salvage import salvage
from expertflow.tracer.store import Trace

from tests.models import TEXTS, tiny, write_prompts

ENDLESS = """
import signal, sys
from expertflow.tracer import record
from expertflow.tracer.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell hands down "ignored"
record._ROWS_PER_TABLE, record._FLUSH_EVERY_S = 30, 0.0  # parts appear at once
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def _one_thread():
    yield
    torch.set_num_threads(1)  # the command sets its own


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path / "prompts.jsonl", TEXTS[:3])


def ran(capsys, *args) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(stop.value.code), out, err


def run(capsys, tmp_path, prompts, *more):
    return ran(
        capsys,
        "run",
        *("--out", tmp_path / "t"),
        *("--model", tiny()),
        *("--prompts", prompts),
        *("--max-new-tokens", 3),
        *("--device", "cpu"),
        *more,
    )


def one_sentence(err: str) -> str:
    [line] = [line for line in err.splitlines() if line.startswith("error:")]
    assert "Traceback" not in err
    assert "This is a bug" not in err
    assert line.endswith(".")
    return line


def test_run_writes_a_sound_trace_and_says_so_in_json(capsys, tmp_path, prompts):
    code, out, _ = run(capsys, tmp_path, prompts, "--json")

    document = json.loads(out)
    report = check_trace(tmp_path / "t")
    assert code == 0
    assert document["format"] == "expertflow.run/1"
    assert document["trace_id"] == report.trace_id
    assert document["routing_rows"] == report.rows["routing"]
    assert document["generated_tokens"] == 9
    assert not (tmp_path / "t.partial").exists()


def test_run_tells_people_what_to_do_next(capsys, tmp_path, prompts):
    code, out, err = run(capsys, tmp_path, prompts)

    assert code == 0
    assert "routing_rows" in out
    assert "expertflow-trace tune" in err


def test_existing_folder_is_refused_and_left_alone(capsys, tmp_path, prompts):
    mine = tmp_path / "t" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep")

    code, _, err = run(capsys, tmp_path, prompts)

    assert code == 2
    assert "exists" in one_sentence(err)
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]
    assert mine.read_text() == "keep"


def test_overwrite_replaces_a_trace_but_nothing_else(capsys, tmp_path, prompts):
    run(capsys, tmp_path, prompts)
    replaced, *_ = run(capsys, tmp_path, prompts, "--overwrite", "--limit", "1")
    rows = Trace.open(tmp_path / "t").manifest.rows("sequences")
    shutil.rmtree(tmp_path / "t")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").write_text("keep")

    refused, _, err = run(capsys, tmp_path, prompts, "--overwrite")

    assert (replaced, rows, refused) == (0, 1, 2)
    assert "is not a trace" in one_sentence(err)
    assert (tmp_path / "t" / "mine.txt").read_text() == "keep"


def test_bad_json_line_exits_3_and_names_file_and_line(capsys, tmp_path, prompts):
    with prompts.open("a") as file:
        file.write('{"text": oops}\n')

    code, _, err = run(capsys, tmp_path, prompts)

    assert code == 3
    assert "prompts.jsonl, line 4" in one_sentence(err)
    assert not (tmp_path / "t.partial").exists()


def test_unknown_model_exits_4(capsys, tmp_path, prompts):
    code, _, err = run(capsys, tmp_path, prompts, "--model", tmp_path / "no-model")

    assert code == 4
    assert "no-model" in one_sentence(err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_exits_4(capsys, tmp_path, prompts):
    code, _, err = run(capsys, tmp_path, prompts, "--device", "cuda")

    assert code == 4
    assert "CUDA" in one_sentence(err)


@pytest.mark.parametrize(
    "wrong",
    [
        ("--link", "quick"),
        ("--device", "abacus"),
        ("--residency", "cloud"),
        ("--dtype", "int3"),
        ("--lookahead", "9"),
        ("--max-new-tokens", "0"),
        ("--threads", "0"),
    ],
)
def test_impossible_options_exit_2_with_what_is_allowed(capsys, tmp_path, prompts, wrong):
    code, _, err = run(capsys, tmp_path, prompts, *wrong)

    assert code == 2
    assert wrong[1] in one_sentence(err)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_damaged_trace_of_a_run_exits_3_in_one_sentence(capsys, tmp_path, prompts, damage):
    run(capsys, tmp_path, prompts)
    path = tmp_path / "t" / "routing" / "part-00000.parquet"
    body = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(body[: len(body) // 2])
    elif damage == "flipped":
        path.write_bytes(body[:40] + bytes([body[40] ^ 4]) + body[41:])
    else:
        shutil.copy(tmp_path / "t" / "sequences.parquet", path)

    for command in (("check",), ("simulate", "--cache", "lru", "--budget", "0.5")):
        code, _, err = ran(capsys, command[0], tmp_path / "t", *command[1:])

        assert code == 3
        assert "part-00000.parquet" in one_sentence(err)


class Endless:
    """A run in its own process, slow enough to be stopped in the middle."""

    def __init__(self, tmp_path: Path, prompts: Path, *more: str):
        self.out = tmp_path / "t"
        self.partial = tmp_path / "t.partial"
        arguments = ["run", "--out", self.out, "--model", tiny(), "--prompts", prompts]
        arguments += ["--max-new-tokens", "400", "--device", "cpu", *more, "--threads", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def stopped(self, number: signal.Signals, *, after_parts: int) -> tuple[int, str]:
        listing = self.partial / "parts.jsonl"
        until = time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            if listing.exists() and listing.read_bytes().count(b"\n") >= after_parts:
                break
            time.sleep(0.005)
        assert self.process.poll() is None
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.mark.parametrize(
    ("after_parts", "residency"), [(2, "resident"), (25, "resident"), (60, "stream")]
)
def test_killed_run_is_salvaged_to_whole_steps(tmp_path, prompts, after_parts, residency):
    running = Endless(tmp_path, prompts, "--residency", residency, "--batch-size", "2")

    code, _ = running.stopped(signal.SIGKILL, after_parts=after_parts)

    assert code == -signal.SIGKILL
    assert not running.out.exists()
    lost = salvage(running.partial, tmp_path / "saved")
    report = check_trace(tmp_path / "saved")
    assert report.salvaged
    assert report.steps >= 1
    assert lost
    routing = Trace.open(tmp_path / "saved").routing_arrays()
    assert set(routing.layer.tolist()) == {0, 1, 2}


def test_interrupted_run_exits_130_and_its_hint_keeps_what_was_recorded(capsys, tmp_path, prompts):
    running = Endless(tmp_path, prompts, "--batch-size", "3")

    code, err = running.stopped(signal.SIGINT, after_parts=10)
    hint = err[err.index("expertflow-trace check") :].partition("`")[0].split()[1:]
    salvaged, _, _ = ran(capsys, *(word.replace("SALVAGED", f"{tmp_path}/saved") for word in hint))

    assert code == 130
    assert "Traceback" not in err
    assert salvaged == 0
    assert check_trace(tmp_path / "saved").steps >= 1

"""A run that was cut off goes on to the trace it would have been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expertflow.tracer import console
from expertflow.tracer.check import check_trace
from expertflow.tracer.console import progress
from expertflow.tracer.errors import UsageError
from expertflow.tracer.main import main
from expertflow.tracer.resume import held, weights_sha256
from expertflow.tracer.store import Trace
from expertflow.tracer.tracing import TraceRequest, trace_run
from expertflow.tracer.unfinished import look

from tests.models import TEXTS, tiny, write_prompts

LONG_ENOUGH = [text for text in TEXTS if len(text) > 1] + ["xyz"]


class Stop(Exception):
    """Stands for the kill: the run ends wherever it is."""


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr("expertflow.tracer.record._ROWS_PER_TABLE", 30)
    monkeypatch.setattr("expertflow.tracer.record._FLUSH_EVERY_S", 0.0)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def request_(tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", LONG_ENOUGH)
    return TraceRequest(
        out=tmp_path / "t",
        model=str(tiny()),
        prompts=prompts,
        max_new_tokens=4,
        batch_size=2,
        device="cpu",
        threads=1,
    )


def traced(request: TraceRequest, **more) -> Trace:
    trace_run(replace(request, **more), progress=progress, say=lambda words: None)
    return Trace.open(more.get("out", request.out))


def cut_off(request: TraceRequest, monkeypatch, *, after_steps: int) -> Path:
    """Run until `after_steps` steps are recorded, then end as a kill would: without a last write."""
    from expertflow.tracer.record import Recorder
    from expertflow.tracer.writer import TraceWriter

    ended = Recorder.end_step
    count = iter(range(after_steps))

    def end_step(self):
        seconds = ended(self)
        if self._writer is not None and next(count, None) is None:
            monkeypatch.setattr(Recorder, "write", lambda self: None)
            monkeypatch.setattr(TraceWriter, "flush", lambda self: None)
            raise Stop
        return seconds

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "end_step", end_step)
        before = Recorder.write, TraceWriter.flush
        with pytest.raises(Stop):
            traced(request)
        Recorder.write, TraceWriter.flush = before
    return request.out.with_name("t.partial")


def rows_of(trace: Trace, table: str) -> list[dict]:
    return trace.table(table).to_pylist()


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def assert_same(found: Trace, expected: Trace) -> None:
    assert rows_of(found, "routing") == rows_of(expected, "routing")
    for table in ("sequences", "steps", "transfers"):
        assert without_times(rows_of(found, table)) == without_times(rows_of(expected, table))
    for name in ("shape", "run", "recorded", "memory", "salvaged"):
        assert getattr(found.manifest, name) == getattr(expected.manifest, name), name


@pytest.mark.parametrize("residency", ["resident", "stream"])
@pytest.mark.parametrize("after_steps", [0, 3, 4, 5, 11])
def test_cut_off_run_resumes_to_the_undisturbed_trace(
    request_, tmp_path, monkeypatch, residency, after_steps
):
    request = replace(request_, residency=residency)
    expected = traced(request, out=tmp_path / "undisturbed")
    partial = cut_off(request, monkeypatch, after_steps=after_steps)
    kept = look(partial).batches

    found = traced(request, resume=True)

    assert kept == after_steps // 4
    assert_same(found, expected)
    assert check_trace(request.out).steps == 12
    [note] = found.manifest.provenance.notes
    assert f"resumed at step {4 * kept}" in note
    assert not partial.exists()


def test_clock_of_a_resumed_run_never_goes_back(request_, monkeypatch):
    cut_off(request_, monkeypatch, after_steps=6)

    steps = traced(request_, resume=True).table("steps", ["layer", "start_s"]).to_pylist()

    starts = [row["start_s"] for row in steps if row["layer"] == -1]
    assert starts == sorted(starts)


def test_run_can_be_cut_off_again_and_again(request_, tmp_path, monkeypatch):
    expected = traced(request_, out=tmp_path / "undisturbed")
    for after_steps in (5, 1, 4):
        request = replace(request_, resume=True)
        cut_off(request, monkeypatch, after_steps=after_steps)

    found = traced(request_, resume=True)

    assert_same(found, expected)
    assert len(found.manifest.provenance.notes) == 3


def test_damaged_part_is_recorded_again(request_, tmp_path, monkeypatch):
    expected = traced(request_, out=tmp_path / "undisturbed")
    partial = cut_off(request_, monkeypatch, after_steps=9)
    victim = sorted(partial.glob("transfers/*")) or sorted(partial.glob("routing/*"))
    victim[len(victim) // 2].write_bytes(b"torn")

    assert_same(traced(request_, resume=True), expected)


def test_resuming_what_never_began_starts_it_and_what_is_complete_leaves_it(request_):
    said: list[str] = []
    first, _ = trace_run(replace(request_, resume=True), progress=progress, say=said.append)
    again, summary = trace_run(replace(request_, resume=True), progress=progress, say=said.append)

    assert "starts from its beginning" in said[0]
    assert "is complete" in said[-1]
    assert again == first
    assert summary["generated_tokens"] == 24


def test_run_killed_before_its_last_rename_is_only_moved(request_):
    done = traced(request_).manifest
    request_.out.rename(request_.out.with_name("t.partial"))

    assert traced(request_, resume=True).manifest == done


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"batch_size": 3}, "batch_size: 2 before, 3 now"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"lookahead": 0}, "lookahead"),
        ({"redact": True}, "token_ids"),
        ({"limit": 4}, "prompts"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"residency": "stream"}, "residency"),
        ({"link": "1GB/s"}, "link: 'host memory to host memory' before, '1GB/s' now"),
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"model": "olmoe-hidden_size64"}, "hidden_size"),
        ({"teacher_forced": True}, "text: 'own-generation' before, 'teacher-forced' now"),
    ],
)
def test_other_arguments_are_refused_and_named(request_, monkeypatch, more, named):
    partial = cut_off(request_, monkeypatch, after_steps=5)
    listing = (partial / "parts.jsonl").read_bytes()
    if "model" in more:
        more = {"model": str(tiny("olmoe", hidden_size=64))}

    with pytest.raises(UsageError) as refused:
        traced(request_, resume=True, **more)

    assert named in str(refused.value)
    assert (partial / "parts.jsonl").read_bytes() == listing


def test_other_prompts_weights_and_versions_are_refused_and_named(request_, monkeypatch, tmp_path):
    cut_off(request_, monkeypatch, after_steps=5)
    other = write_prompts(tmp_path / "other.jsonl", [*LONG_ENOUGH[:-1], "xyx"])
    with pytest.raises(UsageError, match=r"prompts: '?[0-9a-f]+'? before"):
        traced(request_, resume=True, prompts=other)

    with monkeypatch.context() as patch:
        patch.setattr("expertflow.tracer.tracing.weights_sha256", lambda model: "f" * 64)
        with pytest.raises(UsageError, match="weights of the model"):
            traced(request_, resume=True)

    from expertflow.tracer import probe

    found = {**probe.versions(), "torch": "0.1", "rich": "0.1"}
    monkeypatch.setattr(probe, "versions", lambda: found)
    with pytest.raises(UsageError, match=r"version of torch: .* before, '0\.1' now\."):
        traced(request_, resume=True)


def test_weights_that_differ_have_another_hash():
    a, b = (torch.nn.Linear(40, 50) for _ in range(2))
    b.load_state_dict(a.state_dict())
    same = weights_sha256(a) == weights_sha256(b)
    with torch.no_grad():
        b.weight[-1, -1] += 1

    assert same
    assert weights_sha256(a) != weights_sha256(b)


def test_folder_of_a_run_that_is_still_going_is_refused(request_, monkeypatch):
    partial = cut_off(request_, monkeypatch, after_steps=5)
    code = (
        "import sys\nfrom pathlib import Path\nfrom expertflow.tracer.resume import held\n"
        f"with held(Path({str(partial)!r})):\n print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="still going"):
            traced(request_, resume=True)
    finally:
        other.communicate()
    with held(partial):
        pass


def test_check_says_what_a_cut_off_run_left(request_, monkeypatch, capsys):
    partial = cut_off(request_, monkeypatch, after_steps=6)

    for path in (partial, request_.out):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["check", str(path), "--json"])
        out, err = capsys.readouterr()

        found = json.loads(out)["unfinished"]
        assert stop.value.code == 3
        assert "--resume" in err
        assert "--salvage" in err
        assert found["batches"] == 1
        assert 4 <= found["steps"] <= 7
        assert found["rows"]["sequences"] == 2


# --- kills of a real process ---------------------------------------------------------------------


class Killed:
    """The command in a process of its own, forked so that it starts at once."""

    def __init__(self, tmp_path: Path):
        self.out = tmp_path / "t"
        self.errors = tmp_path / "stderr.txt"
        prompts = write_prompts(tmp_path / "prompts.jsonl", LONG_ENOUGH * 3)
        words = ["run", "--out", self.out, "--model", tiny(), "--prompts", prompts]
        words += ["--max-new-tokens", "40", "--device", "cpu", "--batch-size", "2"]
        self.words = [*map(str, words), "--threads", "1"]

    def start(self, *more: str) -> int:
        number = os.fork()
        if number:
            return number
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["expertflow-trace", *self.words, *more]
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(self.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            console._stderr.file = os.fdopen(2, "w", buffering=1)  # pytest put its own there
            sys.stderr = console._stderr.file
            main(sys.argv[1:])
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        finally:
            os._exit(99)

    def ended(self, number: int) -> int:
        """Its exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])

    def stopped(self, number: int, kind: signal.Signals, wait_s: float) -> int:
        """Send a signal `wait_s` after its first new part is there, or let it end."""
        listing = self.out.with_name("t.partial") / "parts.jsonl"
        began = time.time_ns()
        while os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if listing.exists() and listing.stat().st_mtime_ns > began:
                time.sleep(wait_s)
                os.kill(number, kind)
                break
            time.sleep(0.002)
        return self.ended(number)


@pytest.mark.slow
def test_run_killed_at_random_moments_resumes_to_the_same_trace(tmp_path):
    run = Killed(tmp_path)
    chance = random.Random(5)
    codes = [run.stopped(run.start(), signal.SIGKILL, 0.1)]
    codes += [
        run.stopped(run.start("--resume"), signal.SIGKILL, chance.uniform(0, 0.3)) for _ in range(5)
    ]
    last = run.ended(run.start("--resume"))

    assert codes.count(-signal.SIGKILL) >= 3
    assert last == 0, run.errors.read_text()
    words = dict(zip(run.words[1::2], run.words[2::2], strict=True))
    expected = traced(
        TraceRequest(
            out=tmp_path / "undisturbed",
            model=words["--model"],
            prompts=Path(words["--prompts"]),
            max_new_tokens=40,
            batch_size=2,
            device="cpu",
            threads=1,
        )
    )
    assert_same(Trace.open(run.out), expected)
    check_trace(run.out)


def test_interrupted_run_says_how_to_go_on_and_keeps_what_it_had(tmp_path):
    run = Killed(tmp_path)

    code = run.stopped(run.start(), signal.SIGINT, 0.1)

    err = run.errors.read_text()
    assert code == 130, err
    assert "Traceback" not in err
    assert f"--out {run.out}" in err
    assert "--resume`" in err
    assert look(run.out.with_name("t.partial")).lost == ()

"""What a command says of itself while it runs: whole at any moment, bounded, right, and never in the way."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from expertflow.tracer.console import progress
from expertflow.tracer.generate import StepTokens
from expertflow.tracer.live import (
    KEPT_POINTS,
    LiveFile,
    LiveReporter,
    LiveStatus,
    Seen,
    WatchedPasses,
    live_path,
    process_mark,
)
from expertflow.tracer.memory import SilentObserver
from expertflow.tracer.records import from_json, read_json
from expertflow.tracer.timing import StepInfo
from expertflow.tracer.tracing import TraceRequest, trace_run
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import TEXTS, tiny, write_prompts


class Clock:
    """Goes on when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def read(path) -> LiveStatus:
    return from_json(LiveStatus, read_json(path))


@pytest.fixture
def clock():
    return Clock()


def opened(path, clock):
    return LiveFile(path, "run", "expertflow-trace run", clock=clock, wall=lambda: clock.now + 1e9)


def test_rates_are_those_between_two_looks(tmp_path, clock):
    sums = Seen()
    with opened(tmp_path / "x.live.json", clock) as live:
        live.phase("tracing", 100, lambda: sums)
        for second in range(1, 4):
            sums = Seen(
                hits=6 * second,
                demanded=10 * second,
                bytes_moved=500 * second,
                stall_s=0.1 * second,
                has_link=True,
            )
            clock.now += 2.0
            live.passed(5, 0.5)
            status = read(tmp_path / "x.live.json")
            point = status.points[-1]
            assert (point.tokens_per_s, point.hit_rate, point.link_Bps) == (2.5, 0.6, 250.0)
            assert point.stall_share == pytest.approx(0.2)
            assert status.state == "running"
            assert status.tokens_done == 5 * second
            assert status.tokens_per_s == 2.5
            assert status.bytes_moved == 500 * second
    ended = read(tmp_path / "x.live.json")
    assert (ended.state, ended.passes, ended.phase) == ("finished", 3, "tracing")
    assert ended.heartbeat == clock.now + 1e9


@settings(max_examples=30, deadline=None)
@given(gaps=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=40))
def test_the_file_is_written_once_a_second_at_most(tmp_path_factory, gaps):
    clock = Clock()
    path = tmp_path_factory.mktemp("live") / "x.live.json"
    with opened(path, clock) as live:
        live.phase("tracing", 1_000)
        written = [clock.now]
        for gap in gaps:
            clock.now += gap
            before = path.stat().st_mtime_ns, path.stat().st_ino
            live.passed(1, 0.1)
            if (path.stat().st_mtime_ns, path.stat().st_ino) != before:
                assert clock.now - written[-1] >= 1.0
                written.append(clock.now)
            else:
                assert clock.now - written[-1] < 1.0
    assert read(path).tokens_done == len(gaps)


def test_points_are_bounded_and_the_latest(tmp_path, clock):
    with opened(tmp_path / "x.live.json", clock) as live:
        live.phase("tracing", 10_000)
        for _ in range(KEPT_POINTS + 50):
            clock.now += 1.0
            live.passed(1, 0.5)
    points = read(tmp_path / "x.live.json").points
    assert len(points) == KEPT_POINTS
    assert points[-1].at_s == KEPT_POINTS + 50
    assert (tmp_path / "x.live.json").stat().st_size < 64_000


def test_what_has_no_denominator_is_left_open(tmp_path, clock):
    with opened(tmp_path / "x.live.json", clock) as live:
        live.phase("tracing", 10)
        clock.now += 1.0
        live.passed(1, 0.5)
    [point, *_] = read(tmp_path / "x.live.json").points
    assert (point.hit_rate, point.link_Bps, point.stall_share) == (None, None, None)


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (KeyboardInterrupt(), "interrupted", ""),
        (RuntimeError("The disk is full."), "failed", "The disk is full."),
        (RuntimeError(), "failed", "RuntimeError"),
    ],
)
def test_the_way_it_ended_is_told(tmp_path, clock, error, state, message):
    with pytest.raises(type(error)), opened(tmp_path / "x.live.json", clock):
        raise error

    ended = read(tmp_path / "x.live.json")
    assert (ended.state, ended.message) == (state, message)


def test_a_folder_that_goes_away_stops_nothing(tmp_path, clock):
    with opened(tmp_path / "gone" / "x.live.json", clock) as live:
        shutil.rmtree(tmp_path / "gone")
        live.phase("tracing", 10)
        clock.now += 2
        live.passed(1, 0.5)
    assert not list(tmp_path.iterdir())


def test_a_place_that_can_be_no_folder_stops_nothing(tmp_path, clock):
    (tmp_path / "file").write_text("")
    with opened(tmp_path / "file" / "x.live.json", clock) as live:
        live.phase("tracing", 10)
    assert (tmp_path / "file").read_text() == ""


def test_without_a_path_nothing_is_written(tmp_path, clock, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with opened(None, clock) as live:
        live.phase("tracing", 10)
        live.passed(1, 0.5)
    assert not list(tmp_path.iterdir())


def test_batches_settle_what_passes_only_guess(tmp_path, clock):
    class Bar:
        done = 0
        text = ""

        def advance(self, amount=1):
            self.done += amount

        def phase(self, text):
            self.text = text

    bar = Bar()
    with opened(tmp_path / "x.live.json", clock) as live:
        live.phase("tracing", 100)
        live.resumed(20)
        live.passed(4, 0.1)
        LiveReporter(bar, live).advance(3)
        LiveReporter(bar, live).phase("measuring memory")
    ended = read(tmp_path / "x.live.json")
    assert ended.tokens_done == 23
    assert ended.phase == bar.text == "measuring memory"
    assert bar.done == 3


def test_watched_passes_count_sequences_that_go_on(tmp_path, clock):
    with opened(tmp_path / "x.live.json", clock) as live:
        live.phase("tracing", 100)
        watched = WatchedPasses(SilentObserver(), live)
        prefill = StepInfo(step=0, phase="prefill", batch=2, tokens=6, context=3)
        watched.begin_step(prefill, StepTokens([0] * 3 + [1] * 3, [0, 1, 2, -1, 0, 1], [5] * 6))
        watched.end_step()
        decode = StepInfo(step=1, phase="decode", batch=2, tokens=2, context=4)
        watched.begin_step(decode, StepTokens([0, 1], [3, -1], [5, 5]))
        watched.end_step()
    assert read(tmp_path / "x.live.json").tokens_done == 3


def test_a_live_file_lies_beside_what_is_written(tmp_path):
    assert live_path(tmp_path / "mine").name == "mine.live.json"
    assert live_path(tmp_path / "v1.5").name == "v1.5.live.json"
    assert live_path(tmp_path / "result.json").name == "result.live.json"


def test_a_process_has_one_mark_while_it_lives():
    assert process_mark(os.getpid()) == process_mark(os.getpid()) != ""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert process_mark(ended.pid) == ""


@pytest.mark.parametrize("residency", ["resident", "stream"])
def test_a_run_says_how_it_went(tmp_path, residency):
    prompts = write_prompts(tmp_path / "p.jsonl", TEXTS)
    request = TraceRequest(
        out=tmp_path / "t",
        model=str(tiny()),
        prompts=prompts,
        batch_size=2,
        device="cpu",
        residency=residency,
        link="1GB/s+20us",
    )

    _, summary = trace_run(request, progress=progress, say=lambda words: None)

    ended = read(tmp_path / "t.live.json")
    assert ended.state == "finished"
    assert ended.command == "run"
    assert ended.tokens_done == summary["generated_tokens"]
    assert ended.tokens_total == len(TEXTS) * 32
    assert ended.link_origin == "emulated"
    assert set(ended.memory) == {"non_expert_weights", "experts", "kv_cache"}
    assert (ended.bytes_moved > 0) == (residency == "stream")
    assert (ended.stall_share is None) == (residency == "resident")
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_is_refused_leaves_the_file_of_the_one_that_goes_on(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", TEXTS[:1])
    request = TraceRequest(out=tmp_path / "t", model=str(tiny()), prompts=prompts, device="cpu")
    trace_run(request, progress=progress, say=lambda words: None)
    before = (tmp_path / "t.live.json").read_text()

    with pytest.raises(Exception, match="exists"):
        trace_run(request, progress=progress, say=lambda words: None)

    assert (tmp_path / "t.live.json").read_text() == before
    assert json.loads(before)["state"] == "finished"

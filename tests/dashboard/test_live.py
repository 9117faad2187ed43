"""The Live page: at work, silent, gone, ended or broken, in words; figures by their data."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from expertflow.dashboard import live
from expertflow.dashboard.data import discover, live_runs
from expertflow.dashboard.figures import live as figures
from expertflow.tracer.live import LivePoint, process_mark
from expertflow.tracer.records import write_json
from hypothesis import given
from hypothesis import strategies as st

from .conftest import make_live
from .test_views import open_page, page_app, text, titles

# --- how a command stands ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("silence_s", "there", "expected"),
    [
        (1.0, True, "running"),
        (60.0, True, "silent"),
        (1.0, False, "gone"),
        (60.0, False, "gone"),
        (1.0, None, "running"),
        (60.0, None, "silent"),
        (600.0, None, "gone"),
        (600.0, True, "silent"),
    ],
)
def test_standing_follows_the_process_and_the_silence(silence_s, there, expected) -> None:
    status = make_live("running")

    assert live.standing(status, status.heartbeat + silence_s, there) == expected


@pytest.mark.parametrize("state", ["finished", "failed", "interrupted"])
def test_what_has_ended_stays_ended(state) -> None:
    assert live.standing(make_live(state), 1e12, False) == state


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    status = make_live("running")

    assert live.is_there(status) is True
    assert live.is_there(replace(status, process="another-boot:1")) is False
    assert live.is_there(replace(status, host="elsewhere")) is None
    ended = subprocess.Popen([sys.executable, "-c", ""])
    mark = process_mark(ended.pid)
    ended.wait()
    assert live.is_there(replace(status, pid=ended.pid, process=mark or "x")) is False


def test_a_run_that_was_cut_off_is_told_how_to_go_on() -> None:
    run = make_live("running", command="run", arguments="expertflow-trace run --out traces/mine")

    assert live.next_command(run, "running") == ""
    assert live.next_command(run, "gone") == "expertflow-trace run --out traces/mine --resume"
    again = replace(run, arguments=live.next_command(run, "gone"))
    assert live.next_command(again, "interrupted") == again.arguments


def test_time_left_and_share_hold_at_the_edges() -> None:
    status = make_live("running")

    assert live.time_left_s(status) == pytest.approx(40.0)
    assert live.time_left_s(replace(status, tokens_per_s=0.0)) == 0
    assert live.time_left_s(replace(status, tokens_done=5_000)) == 0
    assert live.progress_share(replace(status, tokens_done=5_000)) == 1
    assert live.progress_share(replace(status, tokens_total=0)) == 0


@given(st.floats(0, 1e9))
def test_spans_name_one_or_two_units(seconds: float) -> None:
    words = live.span(seconds).split()

    assert len(words) in (2, 4)
    assert words[1] in {"s", "min", "h", "days"}


# --- figures -------------------------------------------------------------------------------------


def test_rates_are_drawn_in_their_units() -> None:
    points = make_live().points

    fig = figures.rates(points)

    assert [trace.y[-1] for trace in fig.data] == pytest.approx([20.0, 80.0, 1.4, 20.0])
    assert list(fig.data[0].x) == [point.at_s for point in points]
    assert "seconds" in str(fig.layout.to_plotly_json())
    assert figures.rates_finding(points)[0] == "20 tokens/s now, median 22"


def test_rates_that_a_run_does_not_have_are_left_out() -> None:
    points = [LivePoint(at_s=float(n), tokens_per_s=5.0) for n in range(3)]

    assert [rate.field for rate in figures.shown_rates(points)] == ["tokens_per_s"]
    assert len(figures.rates(points).data) == 1


def test_a_gap_in_a_rate_is_a_gap_in_the_line() -> None:
    points = [
        LivePoint(at_s=1.0, tokens_per_s=5.0, hit_rate=0.5),
        LivePoint(at_s=2.0, tokens_per_s=5.0),
    ]

    hits = figures.rates(points).data[1]

    assert hits.y[0] == 50.0
    assert math.isnan(hits.y[1])


def test_memory_is_stacked_class_by_class() -> None:
    memory = {"non_expert_weights": 2**20, "slots": 3 * 2**20, "kv_cache": 0}

    fig = figures.memory(memory)

    assert [(bar.name, bar.x[0]) for bar in fig.data] == [
        ("other weights", 1.0),
        ("experts (slots)", 3.0),
    ]
    assert figures.memory_finding(memory)[0] == "4 MiB on the device, 75 % of it experts (slots)"
    assert figures.memory_frame(memory)["bytes"].sum() == 4 * 2**20


# --- the page ------------------------------------------------------------------------------------


def test_a_run_at_work_shows_its_progress_and_rates(tmp_path: Path) -> None:
    write_json(tmp_path / "deploy.live.json", make_live("running"))

    app = open_page("live", tmp_path)

    assert not app.exception
    assert "Running: running under the policy." in text(app)
    assert "At most 40 s left" in text(app)
    shown = {metric.label: metric.value for metric in app.metric}
    assert shown["Speed"] == "20 tokens/s"
    assert shown["Hits"] == "71.0 %"
    assert shown["Link"] == "1.7 GB/s"
    assert "tokens/s now" in titles(app)
    assert "experts (slots)" in titles(app)
    assert "EMULATED" in text(app)
    assert "1,200 of at most 2,000 tokens" in app.get("progress")[0].proto.text


def test_a_run_that_is_gone_is_named_with_the_way_on(tmp_path: Path) -> None:
    status = make_live(
        "running", command="run", arguments="expertflow-trace run --out t", process="gone:1"
    )
    write_json(tmp_path / "t.live.json", status)

    app = open_page("live", tmp_path)

    assert "without a word" in app.error[0].value
    assert "expertflow-trace run --out t --resume" in text(app)


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    write_json(tmp_path / "t.live.json", make_live("failed", message="The disk is full."))

    assert "The disk is full" in open_page("live", tmp_path).error[0].value.replace("\\", "")


def test_a_run_that_has_only_begun_needs_no_numbers(tmp_path: Path) -> None:
    begun = make_live(
        "running", points=(), memory={}, passes=0, tokens_done=0, tokens_total=0, hit_rate=None,
        link_Bps=None, stall_share=None, model_id="", label="", link="", device="",
        started=1e300,
    )  # fmt: skip
    write_json(tmp_path / "t.live.json", begun)

    app = open_page("live", tmp_path)

    assert not app.exception
    assert [metric.value for metric in app.metric] == ["–"] * 4


def test_those_at_work_come_first_and_others_can_be_chosen(tmp_path: Path) -> None:
    write_json(tmp_path / "a.live.json", make_live("finished"))
    write_json(tmp_path / "b.live.json", make_live("running", phase="tracing"))
    write_json(tmp_path / "c.live.json", make_live("running", process="gone:1"))

    app = open_page("live", tmp_path)

    assert app.selectbox(key="live").value == "b.live.json"
    assert "tracing" in text(app)
    app.selectbox(key="live").set_value("a.live.json").run()
    assert "Finished" in app.success[0].value


def test_a_run_that_begins_later_is_found_without_a_reload(tmp_path: Path) -> None:
    catalog = discover(tmp_path)
    write_json(tmp_path / "late.live.json", make_live("running"))

    assert [one.name for one in live_runs(catalog)] == ["late.live.json"]
    app = page_app("live", tmp_path).run()
    assert "Running" in text(app)


@pytest.mark.parametrize("body", ["{", '{"format": "expertflow.live/1"}', "[]", "x" * 2_000_000])
def test_broken_files_are_named_and_stop_nothing(tmp_path: Path, body: str) -> None:
    (tmp_path / "broken.live.json").write_text(body, encoding="utf-8")
    write_json(tmp_path / "sound.live.json", make_live("running"))

    app = open_page("live", tmp_path)

    assert not app.exception
    assert "Running" in text(app)
    if body != "[]":
        assert "broken.live.json" in text(app)


def test_a_live_file_of_another_name_is_found_by_its_format(tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", make_live("running"))

    [found] = live_runs(discover(tmp_path))

    assert found.name == "status.json"
    document = json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))
    assert document["pid"] == os.getpid()

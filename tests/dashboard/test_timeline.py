"""The lanes add up to what was recorded, and the log is told in words that are true."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from expertflow.dashboard import data, log_words, predictions, timeline
from expertflow.dashboard.figures import timeline as figures
from expertflow.dashboard.predictions import MachineChoice, Question
from expertflow.dashboard.views import timeline as view
from expertflow.simulator.account import CopyRow, RunRecord
from expertflow.simulator.policy.log import Entry
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.types import ExpertKey
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    folder = tmp_path_factory.mktemp("run")
    synthetic_trace(folder / "t", sequences=4, stream=True)
    (trace,) = data.discover(folder).traces
    desk = predictions.desk_for(trace, MachineChoice("trace", "trace"))
    assert isinstance(desk, predictions.Desk)
    spec = predictions.spec_of(desk, Question(slots=24, predictor="gate_lookahead"))
    record, _ = predictions.record(desk, spec)
    return record


def test_bars_of_a_pass_add_up_to_its_layers(run: RunRecord) -> None:
    found = timeline.simulated(run, 2, 4)
    assert set(found.bars["step"]) == {2, 3, 4}
    steps = pd.DataFrame(dict(run.steps))
    for step in (2, 3, 4):
        rows = steps[(steps["step"] == step) & (steps["layer"] >= 0)]
        bars = found.bars[(found.bars["step"] == step) & (found.bars["lane"] != timeline.COPY)]
        assert (bars["end_s"] - bars["start_s"]).sum() == pytest.approx(rows["total_s"].sum())
        assert bars["start_s"].min() == pytest.approx(rows["start_s"].min())


def test_every_copy_of_the_window_is_drawn_once(run: RunRecord) -> None:
    found = timeline.simulated(run, 0, 3)
    copies = found.bars[found.bars["lane"] == timeline.COPY]
    wanted = [copy for copy in run.copies if 0 <= copy.step <= 3 and copy.start_s >= 0]
    assert len(copies) == len(wanted)
    assert copies["bytes"].sum() == sum(copy.num_bytes for copy in wanted)


def test_a_prefetch_that_was_waited_for_is_late() -> None:
    assert timeline.cause_of("prefetch", 1.0, 2.0) == "late prefetch"
    assert timeline.cause_of("prefetch", 3.0, 2.0) == "prefetch"
    assert timeline.cause_of("prefetch", None, 2.0) == "prefetch"
    assert timeline.cause_of("prefetch", float("nan"), 2.0) == "prefetch"
    assert timeline.cause_of("demand", 1.0, 2.0) == "demand"


def test_too_many_bars_are_cut_at_a_pass_and_counted(
    run: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline, "MOST_BARS", 60)
    found = timeline.simulated(run, 0, 9)
    assert len(found.bars) <= 60
    assert found.left_out == 10 - found.bars["step"].nunique() > 0


def test_the_recorded_run_reads_its_window_alone(tmp_path: Path) -> None:
    trace = synthetic_trace(tmp_path / "t", sequences=2, stream=True)
    (found,) = data.discover(tmp_path).traces
    shown = timeline.recorded(found, 3, 5)
    assert isinstance(shown, timeline.Timeline)
    assert set(shown.bars["step"]) == {3, 4, 5}
    moved = trace.table("transfers", filters=[("step", ">=", 3), ("step", "<=", 5)])
    copies = shown.bars[shown.bars["lane"] == timeline.COPY]
    assert len(copies) == moved.num_rows > 0
    passes = timeline.recorded_passes(found)
    assert isinstance(passes, pd.DataFrame)
    whole = trace.table("steps", filters=[("layer", "==", -1)])
    assert passes["total_s"].sum() == pytest.approx(sum(whole["total_s"].to_pylist()))


def test_figures_say_what_is_simulated_and_what_recorded(run: RunRecord) -> None:
    found = timeline.simulated(run, 2, 4)
    title = figures.lanes(found, 2, 4).layout.title.text
    assert "SIMULATED (outlined)" in title
    assert "Passes 2 to 4" in title
    fig = figures.passes(found.passes, 2, 4, is_recorded=False)
    assert sum(sum(trace.y) for trace in fig.data) == pytest.approx(
        found.passes["total_s"].sum() * 1e3
    )


def test_long_runs_are_put_together_for_the_glance() -> None:
    passes = pd.DataFrame(
        {
            "step": range(5000),
            "phase": "decode",
            "tokens": 1,
            "start_s": 0.0,
            "total_s": 1.0,
            "stall_s": 0.25,
        }
    )
    fig = figures.passes(passes, 0, 1, is_recorded=True)
    assert len(fig.data[0].x) <= figures.MOST_PASSES
    assert set(fig.data[1].y) == {250.0}


def test_every_load_of_the_log_is_told(run: RunRecord) -> None:
    uses = log_words.Uses(run.log)
    step = max(entry.step for entry in run.log if entry.kind == "load")
    entries = [entry for entry in run.log if entry.step == step]
    told = log_words.story(entries, uses, "gate_lookahead", "lru")
    loads = [entry for entry in entries if entry.kind == "load"]
    lines = [line for _, below in told for line in below]
    assert sum("loaded into slot" in line for line in lines) == len(loads)
    assert any(
        "because the router chose it" in line or "gate_lookahead named it" in line for line in lines
    )
    layers = {entry.layer for entry in entries if entry.kind == "event"}
    assert len(told) == len(layers)


events = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2)), max_size=30).map(sorted)


@given(events, st.integers(0, 20), st.integers(0, 2))
def test_last_and_next_use_are_those_of_a_plain_search(
    found: list[tuple[int, int]], step: int, expert: int
) -> None:
    uses = log_words.Uses(Entry("event", s, 0, e, detail="hit") for s, e in found)
    before = [s for s, e in found if e == expert and s < step]
    after = [s for s, e in found if e == expert and s > step]
    assert uses.before(ExpertKey(0, expert), step) == (max(before) if before else None)
    assert uses.after(ExpertKey(0, expert), step) == (min(after) if after else None)


def test_an_eviction_is_explained() -> None:
    log = [
        Entry("event", 1, 0, 7, slot=3, detail="hit"),
        Entry("event", 4, 0, 9, slot=3, wave=0, detail="miss"),
        Entry("load", 4, 0, 9, slot=3, evicted_layer=0, evicted_expert=7, detail="demand"),
        Entry("event", 5, 0, 7, slot=1, detail="miss"),
    ]
    entries = [entry for entry in log if entry.step == 4]
    ((event, (line,)),) = log_words.story(entries, log_words.Uses(log), "none", "lru")
    assert event == "Layer 0 asked for expert 9: 1 miss."
    assert line == (
        "Expert 9 of layer 0 loaded into slot 3, because the router chose it and it was not resident. It replaced "
        "expert 7, last used 3 passes before; that one is needed again 1 pass later."
    )
    decided = log_words.decisions(entries, log_words.Uses(log), "none", "lru")
    assert "1 of the evicted were needed again" in log_words.summary(decided)


def test_the_download_is_a_chrome_trace_that_says_predicted(run: RunRecord) -> None:
    document = json.loads(view.perfetto(run, "lru @ 24 slots"))
    names = [e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"]
    assert names == ["predicted: lru @ 24 slots"]
    assert sum(e["ph"] == "X" for e in document["traceEvents"]) > len(run.copies)


def test_copies_before_the_first_pass_do_not_disturb() -> None:
    copy = CopyRow(ExpertKey(0, 1), "warm", -1, 10, -1.0, -1.0, -0.5, None)
    columns = {
        "step": [0, 0], "layer": [0, -1], "phase": ["decode", "decode"], "tokens": [1, 1],
        "start_s": [0.0, 0.0], "total_s": [1.0, 1.0], "stall_s": [0.25, 0.0], "experts_s": [0.75, 0.0],
    }  # fmt: skip
    record = RunRecord(columns, [copy], [], [], memory=None)  # type: ignore[arg-type]
    found = timeline.simulated(record, 0, 0)
    assert list(found.bars["cause"]) == ["for loads", "experts"]

"""What the pages predict is what the simulator predicts; long traces are cut and say so."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from expertflow.dashboard import data, predictions
from expertflow.dashboard.data import Found
from expertflow.dashboard.excerpt import Excerpt, beginning
from expertflow.dashboard.predictions import MachineChoice, Question
from expertflow.dashboard.views import capacity, what_if
from expertflow.simulator.forecast import forecaster
from expertflow.simulator.judge import judge_of
from expertflow.simulator.policy.spec import Member
from expertflow.simulator.space import DEFAULTS, Point
from expertflow.simulator.workload import workload_of
from expertflow.tracer.main import commands
from expertflow.tracer.schema import Manifest
from expertflow.tracer.store import Trace
from expertflow.tracer.writer import TraceWriter

OWN_TIMES = MachineChoice("trace", "trace")


@pytest.fixture(scope="module")
def desk(demo: Path) -> predictions.Desk:
    found = predictions.desk_for(data.discover(demo).traces[0], OWN_TIMES)
    assert isinstance(found, predictions.Desk)
    return found


def test_an_answer_is_the_judges(demo: Path, desk: predictions.Desk) -> None:
    # Calibrated costs, so that no decision is timed anew.
    judge = judge_of(replace(desk.whole, decision_is_measured=True), with_curves=True)
    members = {kind: Member(name=name) for kind, name in DEFAULTS.items()}
    point = Point(budget="32slots", slots=32, link="pcie3x16", members=members)
    wanted = judge.result(point)
    got = predictions.ask(desk, Question(slots=32, link="pcie3x16"))
    assert got.decode == replace(wanted.decode, **_times(got.decode))
    assert got.link == wanted.link == "pcie3x16"
    assert got.link_origin == "declared"


def _times(phase: object) -> dict[str, float]:
    return {n: getattr(phase, n) for n in ("seconds", "tokens_per_s", "stall_s")}


def test_a_batch_regroups_the_recorded_sequences(desk: predictions.Desk) -> None:
    one = predictions.ask(desk, Question(slots=32, batch=1))
    four = predictions.ask(desk, Question(slots=32, batch=4))
    assert one.arrivals is not None
    assert four.decode.mean_distinct > one.decode.mean_distinct
    assert four.batch_size == 4


def test_a_perfect_invented_predictor_is_the_oracle(desk: predictions.Desk) -> None:
    plain = Question(slots=32, link="pcie3x16")
    perfect = predictions.ask(
        desk, replace(plain, predictor="synthetic", params=(("recall", 1.0), ("precision", 1.0)))
    )
    oracle = predictions.ask(desk, replace(plain, predictor="oracle"))
    assert perfect.decode.hits == oracle.decode.hits


def test_the_smallest_budget_reaches_the_speed_and_less_does_not(desk: predictions.Desk) -> None:
    question = Question(slots=64)
    sizes = capacity.slot_sizes(desk.shape_experts)
    speeds = {n: predictions.ask(desk, replace(question, slots=n)).tokens_per_s for n in sizes}
    wanted = (speeds[sizes[-1]] + speeds[sizes[-3]]) / 2
    found = predictions.smallest(desk, question, wanted, 0, 64)
    assert predictions.ask(desk, replace(question, slots=found)).tokens_per_s >= wanted
    assert predictions.ask(desk, replace(question, slots=found - 1)).tokens_per_s < wanted


def test_the_log_of_a_simulated_run_covers_whole_passes(
    desk: predictions.Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "_LOG_EXPERTS", 300)
    predictions._record.cache_clear()
    record, passes = predictions.record(desk, predictions.spec_of(desk, Question(slots=32)))
    predictions._record.cache_clear()
    events = [entry for entry in record.log if entry.kind == "event"]
    assert 0 < passes < len(desk.whole.workload.steps)
    assert len({entry.step for entry in events}) == passes
    assert len(events) <= 300 + int(np.diff(desk.whole.workload.ptr).max()) * 4


def test_machines_of_other_models_are_not_offered(demo: Path) -> None:
    catalog = data.discover(demo)
    trace = catalog.traces[0]
    offered = predictions.machines_for(catalog, trace)
    assert offered[0] == OWN_TIMES
    assert {choice.kind for choice in offered[1:]} == {"gpu"}
    untimed = replace(trace.value, recorded=("routing",))
    assert all(
        choice.kind == "gpu"
        for choice in predictions.machines_for(catalog, Found(trace.name, trace.path, untimed))
    )


@pytest.mark.parametrize(
    ("machine", "question"),
    [
        (OWN_TIMES, Question(slots=32)),
        (MachineChoice("gpu", "rtx4090"), Question(slots=9, cache="static", link="4GB/s+10us")),
        (
            MachineChoice("file", "machine.json", Path("my machine.json")),
            Question(
                slots=3,
                predictor="synthetic",
                params=(("recall", 0.5), ("latency_s", 2e-5)),
                batch=8,
            ),
        ),
    ],
)
def test_the_command_shown_is_one_that_is_understood(
    machine: MachineChoice, question: Question
) -> None:
    typer = pytest.importorskip("typer")
    from expertflow.simulator.commands.simulate import simulate

    name, *arguments = shlex.split(what_if.command("traces/demo/trace", machine, question))[1:]
    app = typer.Typer()
    app.command(name)(simulate)
    assert name in commands()
    context = typer.main.get_command(app).make_context(name, [*arguments])
    assert context.params["budget"] == f"{question.slots}slots"
    assert context.params["arrivals"] == (f"closed:{question.batch}" if question.batch else None)


def test_the_links_of_the_slider_rise_after_the_machines_own() -> None:
    own, *declared = what_if.link_names()
    assert own == predictions.OWN
    assert "pcie4x16" in declared
    speeds = [what_if.parse_link(name).bandwidth_Bps for name in declared]
    assert speeds == sorted(speeds)


def test_a_long_trace_is_replayed_from_its_beginning(tmp_path: Path) -> None:
    trace = _in_parts(tmp_path)
    files = trace.manifest.tables["routing"]
    assert len(files) > 2
    cut = beginning(trace, limit=files[0].rows + files[1].rows)
    assert isinstance(cut, Excerpt)
    assert beginning(trace, limit=10**9) is trace
    part, whole = workload_of(cut), workload_of(trace)
    passes = len(part.steps)
    assert 0 < passes < len(whole.steps)
    np.testing.assert_array_equal(part.steps.number, whole.steps.number[:passes])
    np.testing.assert_array_equal(part.experts, whole.experts[: len(part.experts)])
    np.testing.assert_array_equal(part.event_ptr, whole.event_ptr[: passes + 1])
    assert forecaster(cut).workload.num_events == part.num_events


def _in_parts(folder: Path) -> Trace:
    """A synthetic trace in many small files."""
    from expertflow.tracer.synthetic import synthetic_trace

    source = synthetic_trace(folder / "source", sequences=8, new_tokens=12)
    manifest: Manifest = source.manifest
    writer = TraceWriter(
        folder / "parts",
        shape=manifest.shape,
        hardware=manifest.hardware,
        run=manifest.run,
        provenance=manifest.provenance,
        recorded=manifest.recorded,
        part_rows=150,
    )
    for table in ("routing", "steps"):
        rows = source.table(table)
        for step in sorted(set(rows["step"].to_pylist())):
            writer.append(table, source.table(table, filters=[("step", "==", step)]))
    writer.append("sequences", source.table("sequences"))
    writer.close()
    return Trace.open(folder / "parts")

"""A simulated run drawn for Perfetto: the rows of the run, whole, on tracks that are serial."""

import json
from itertools import pairwise

import pytest
from expertflow.simulator.account import totals_of
from expertflow.simulator.engine import simulate
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.timeline import run_timeline
from expertflow.tracer.export.timeline import COMPUTE, PASSES, PREDICTOR
from expertflow.tracer.main import main
from expertflow.tracer.synthetic import synthetic_trace

from tests.builders import make_machine, make_steps


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return synthetic_trace(tmp_path_factory.mktemp("t") / "t", new_tokens=6, stream=True)


def ran(capsys, *args) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(stop.value.code), out, err


def slices_of(path) -> tuple[dict[str, list[dict]], dict]:
    document = json.loads(path.read_text())
    events = document["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    tracks: dict[str, list[dict]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            tracks[names[event["tid"]]].append(event)
    return tracks, document["otherData"]


def test_the_timeline_of_a_prediction_lasts_as_long_as_predicted(capsys, trace, tmp_path):
    path = tmp_path / "run.json"
    args = ("simulate", trace.path, "--predictor", "gate_lookahead", "--budget", "0.4", "--json")
    code, text, err = ran(capsys, *args, "--timeline", path)
    tracks, about = slices_of(path)
    result = json.loads(text)

    assert code == 0, err
    assert about["title"].startswith("predicted: ")
    assert about["run_ns"] == pytest.approx(result["time"]["total_s"] * 1e9, rel=1e-9, abs=5)
    # Passes follow each other without a pause, and inside them nothing is left out.
    spent = {name: sum(e["dur"] for e in events) * 1e3 for name, events in tracks.items()}
    assert spent[PASSES] == pytest.approx(about["run_ns"], abs=1)
    assert spent[COMPUTE] + spent.get(PREDICTOR, 0) == pytest.approx(about["run_ns"], abs=1)
    assert {"link: demand", "link: prefetch"} <= set(tracks)
    for events in tracks.values():
        for first, second in pairwise(events):
            assert round((first["ts"] + first["dur"]) * 1e3) <= round(second["ts"] * 1e3)


def test_a_window_and_what_cannot_be_drawn(capsys, trace, tmp_path):
    path = tmp_path / "run.json"
    args = ("simulate", trace.path, "--timeline", path)

    assert ran(capsys, *args, "--timeline-steps", "2:4")[0] == 0
    tracks, about = slices_of(path)
    assert {event["args"]["step"] for events in tracks.values() for event in events} == {2, 3}
    assert about["is_window"]
    path.unlink()
    for more in (("--timeline-steps", "700:800"), ("--arrivals", "poisson:5")):
        code, _, err = ran(capsys, *args, *more)
        assert code == 2, err
        assert not path.exists()
    assert ran(capsys, "simulate", trace.path, "--timeline-steps", "2:4")[0] == 2


def test_a_copy_leads_to_the_wait_it_caused(shape_of):
    workload = make_steps([[(0, 1), (2,)], [(3,), (0,)]])
    costs = make_machine(copy=2.0, mixer=1.0, experts=1.0)
    shape = shape_of(2, 8)
    spec = make_spec(slots=8, cache="lru", predictor="none")
    record = simulate(workload, spec, shape, costs)
    timeline = run_timeline("x", record)

    waits = [item for item in timeline.slices if item.name.endswith("wait for experts")]
    assert len(timeline.arrows) == len(record.copies) == 5
    assert {arrow.to_time for arrow in timeline.arrows} == {item.end for item in waits}
    assert timeline.total == round(float(totals_of(record).steps.total_s.sum()) * 1e9)

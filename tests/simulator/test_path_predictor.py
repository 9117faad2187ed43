"""Predicted paths in the simulator: who may be judged on them, what is prefetched, and what it costs."""

from dataclasses import replace

import numpy as np
import pytest
from expertflow.simulator.compiled.tapes import tape_of
from expertflow.simulator.engine import simulate
from expertflow.simulator.engines import run
from expertflow.simulator.feasible import lacking
from expertflow.simulator.forecast import forecaster
from expertflow.simulator.paths import (
    CARD,
    PathLatency,
    PathTable,
    PredictorCard,
    PromptPart,
    judged_on_paths,
    paths_file,
    read_card,
    read_paths,
    write_paths,
)
from expertflow.simulator.policy.base import Signals
from expertflow.simulator.policy.predictors.path import Path
from expertflow.simulator.policy.registry import predictors
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.policy.testing import PredictorContract
from expertflow.simulator.serving import Serving
from expertflow.simulator.workload import workload_of
from expertflow.tracer.errors import InputError, PolicyError, TraceError, UsageError
from expertflow.tracer.main import main
from expertflow.tracer.probe import provenance
from expertflow.tracer.records import write_json
from expertflow.tracer.store import NO_EXPERT
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.types import ExpertKey


class TestFarPath(PredictorContract):
    name = "path"
    params = {"horizon": 2, "width": 3, "per_token": 2}  # noqa: RUF012


# --- the member --------------------------------------------------------------------------------


def test_names_the_next_layer_by_votes_then_by_rank():
    signals = Signals({}, path={1: [[5, 2, 7], [2, 6, 5]], 2: [[1, 0, 3]]})

    assert Path().predict(3, signals) == [(4, 2), (4, 5), (4, 6), (4, 7)]
    assert Path(horizon=2).predict(3, signals)[4:] == [(5, 1), (5, 0), (5, 3)]
    assert all(isinstance(key, ExpertKey) for key in Path().predict(3, signals))


def test_width_limits_a_layer_and_per_token_a_token():
    signals = Signals({}, path={1: [[5, 2, 7], [2, 6, 5]]})

    assert Path(width=2).predict(0, signals) == [(1, 2), (1, 5)]
    assert Path(per_token=1).predict(0, signals) == [(1, 2), (1, 5)]
    assert Path(per_token=2).predict(0, signals) == [(1, 2), (1, 5), (1, 6)]


@pytest.mark.parametrize("params", [{"horizon": 0}, {"width": -1}, {"per_token": -1}])
def test_impossible_parameters_are_refused(params):
    with pytest.raises(UsageError, match="path takes"):
        predictors.build("path", params)


# --- paths on rows -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Eight prompts, one after the other, and a batch of them at once is in `pairs`."""
    return made(tmp_path_factory.mktemp("paths") / "t", batch_size=1)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made(tmp_path_factory.mktemp("pairs") / "t", batch_size=2)


def made(path, batch_size):
    return synthetic_trace(
        path, sequences=8, batch_size=batch_size, layers=3, experts=8, new_tokens=6, prompt_tokens=5
    )


def truth(trace, sequences) -> PathTable:
    """A predictor that is always right, about some sequences."""
    rows = trace.routing_arrays()
    chosen = np.isin(rows.sequence, sequences) & ~rows.is_pad
    tokens = sorted(
        {(s, p) for s, p in zip(rows.sequence[chosen], rows.position[chosen], strict=True)}
    )
    experts = np.zeros((len(tokens), trace.shape.num_moe_layers, trace.shape.top_k), np.uint16)
    place = {token: number for number, token in enumerate(tokens)}
    for row in np.flatnonzero(chosen):
        experts[place[rows.sequence[row], rows.position[row]], rows.layer[row]] = rows.experts[row]
    sequence, position = np.array(tokens, dtype=np.int64).T
    return PathTable(sequence=sequence, position=position, experts=experts)


def write(folder, trace, table, **changes):
    write_paths(paths_file(folder, trace.manifest.trace_id), table)
    card = PredictorCard(
        predictor={},
        weights_sha256="",
        shape=trace.shape,
        trace_id=trace.manifest.trace_id,
        prompts=(PromptPart("p", "h", "", "held_out"), PromptPart("q", "i", "", "train")),
        training={},
        metrics={},
        latency=PathLatency(device="a pocket watch", prompt_tokens=4, points=((1, 0.03, 0.006),)),
        provenance=provenance(0, "imported"),
    )
    write_json(folder / CARD, replace(card, **changes))
    return folder


def test_rows_hold_the_path_of_their_own_token_and_layer(pairs):
    workload = workload_of(pairs).with_paths(truth(pairs, [1, 4]))
    rows = workload.rows

    known = (rows.path != NO_EXPERT).all(axis=1)
    assert (known == np.isin(rows.sequence, [1, 4]) & ~rows.is_pad).all()
    assert (rows.path[known] == rows.experts[known]).all()
    assert (rows.path[~known] == NO_EXPERT).all()


def test_rows_that_are_taken_keep_their_path(pairs):
    workload = workload_of(pairs).with_paths(truth(pairs, range(8)))
    places = np.arange(len(workload.steps))[3:9]

    some = workload.select(places)

    real = ~some.rows.is_pad
    assert (some.rows.path[real] == some.rows.experts[real]).all()


def test_signals_hold_later_layers_of_the_same_pass_only(pairs):
    workload = workload_of(pairs).with_paths(truth(pairs, range(8)))
    event_ptr = workload.event_ptr

    for number in range(int(event_ptr[4]), int(event_ptr[6])):
        layer = int(workload.layer[number])
        path = workload.signals(number, 0).path
        assert list(path) == list(range(1, 3 - layer))
        for ahead, groups in path.items():
            later = workload.signals(number + ahead, 0, routed=True)
            assert sorted(groups) == sorted(later.routed)
        assert path.get(3 - layer, ()) == ()
        assert path.get(0, ()) == ()


def test_layers_that_left_no_rows_are_not_mistaken_for_others(pairs):
    workload = workload_of(pairs).with_paths(truth(pairs, range(8)))
    every_other = replace(workload, layer=workload.layer * 2)

    assert list(every_other.signals(0, 0).path) == [2, 4]


def test_tokens_without_a_prediction_have_no_group(pairs):
    workload = workload_of(pairs).with_paths(truth(pairs, [1]))
    event = int(workload.event_ptr[1])  # a decode step of sequences 0 and 1

    assert len(workload.signals(event, 0, routed=True).routed) == 2
    assert len(workload.signals(event, 0).path[1]) == 1


def test_workloads_without_positions_are_refused(steps_of, pairs):
    with pytest.raises(TraceError, match="where in their sequence"):
        steps_of([[[0], [1]]]).with_paths(truth(pairs, [0]))


# --- what is predicted of it -------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"horizon": 2, "width": 1}])
def test_engines_agree_on_it(pairs, machine, params):
    workload = workload_of(pairs).with_paths(truth(pairs, [0, 1, 2, 3, 5]))
    costs = machine(copy=1e-3, mixer=2e-4, experts=3e-4, chunks=3, lookahead=1e-5)
    spec = make_spec(slots=9, predictor="path", predictor_params=params)

    reference = simulate(workload, spec, pairs.shape, costs)
    totals, engine = run(workload, spec, pairs.shape, costs)

    assert engine == "compiled"
    assert float(np.sum(totals.steps.total_s)) == pytest.approx(
        sum(
            seconds
            for seconds, layer in zip(
                reference.steps["total_s"], reference.steps["layer"], strict=True
            )
            if layer == -1
        )
    )
    assert len(tape_of(workload, spec).keys) == sum(e.kind == "predict" for e in reference.log)


def test_true_paths_make_every_later_layer_hit_on_a_quick_link(trace, machine):
    workload = workload_of(trace).with_paths(truth(trace, range(8)))
    spec = make_spec(slots=24, predictor="path", cache="lru")
    costs = machine(copy=1e-6, mixer=1e-3, experts=1e-3)

    log = simulate(workload, spec, trace.shape, costs).log

    later = [e.detail for e in log if e.kind == "event" and e.layer > 0]
    assert set(later) == {"hit"}


# --- who is judged -----------------------------------------------------------------------------


def test_only_batches_of_held_out_prompts_are_judged(pairs, tmp_path):
    folder = write(tmp_path, pairs, truth(pairs, [0, 3, 4, 5]))

    ready = judged_on_paths(forecaster(pairs), folder)

    # 0 ran beside 1, and 3 beside 2: the predictor has seen those.
    assert set(ready.workload.steps.members.tolist()) == {4, 5}
    assert any("Judged on 2 of 8 prompts" in warning for warning in ready.warnings)


def test_trace_without_such_a_batch_is_refused_with_a_way_out(pairs, tmp_path):
    folder = write(tmp_path, pairs, truth(pairs, [0, 3]))

    with pytest.raises(UsageError, match=r"2 of 8 are held out, batches of 2.*--predict-with"):
        judged_on_paths(forecaster(pairs), folder)


def test_trace_the_predictor_never_read_is_refused_with_a_way_out(trace, pairs, tmp_path):
    folder = write(tmp_path, trace, truth(trace, [0]))

    with pytest.raises(UsageError, match="--predict-with"):
        judged_on_paths(forecaster(pairs), folder)


def test_its_measured_time_is_charged_to_those_who_ask_it(trace, tmp_path):
    ready = judged_on_paths(forecaster(trace), write(tmp_path, trace, truth(trace, [2, 6])))

    def seconds(predictor, **params):
        spec = make_spec(slots=24, predictor=predictor, predictor_params=params)
        steps = ready.record(spec).steps
        found = zip(steps["lookahead_s"], steps["phase"], steps["layer"], strict=True)
        return {(phase, round(s, 9)) for s, phase, layer in found if layer >= 0}

    loads = ready.costs.decode.lookahead.weights[2]
    assert loads == 0
    # The first layer of a pass waits for it.
    assert seconds("path") == {
        ("prefill", 0.03),
        ("prefill", 0.0),
        ("decode", 0.006),
        ("decode", 0.0),
    }
    assert seconds("none") == {("prefill", 0.0), ("decode", 0.0)}


def test_latency_between_and_beyond_measured_batches():
    latency = PathLatency(device="", prompt_tokens=1, points=((1, 1.0, 0.1), (8, 8.0, 0.8)))

    assert latency.seconds("decode", 1) == 0.1
    assert latency.seconds("prefill", 4) == pytest.approx(4.0)
    assert latency.seconds("decode", 64) == 0.8


def test_policy_that_asks_paths_is_refused_where_there_are_none(trace, pairs, tmp_path):
    spec = make_spec(slots=8, predictor="path")
    ready = forecaster(trace)

    with pytest.raises(UsageError, match="--paths DIR"):
        ready.predict(spec)
    assert "--paths" in lacking({"paths"}, ready.workload, ready.costs)
    judged = judged_on_paths(ready, write(tmp_path, trace, truth(trace, [2, 6])))
    assert not lacking({"paths"}, judged.workload, judged.costs)


def test_requests_that_arrive_cannot_be_predicted_yet(trace, tmp_path):
    ready = judged_on_paths(forecaster(trace), write(tmp_path, trace, truth(trace, [2, 6])))
    serving = object.__new__(Serving)

    with pytest.raises(UsageError, match="leave --arrivals out"):
        ready.predict(make_spec(slots=8, predictor="path"), serving=serving)


# --- files -------------------------------------------------------------------------------------


def test_written_paths_are_read_again(trace, tmp_path):
    table = truth(trace, [1, 2])
    write_paths(tmp_path / "p.npz", table)

    again = read_paths(tmp_path / "p.npz", trace.shape)

    for name in ("sequence", "position", "experts"):
        assert (getattr(again, name) == getattr(table, name)).all()
    assert [file.name for file in tmp_path.iterdir()] == ["p.npz"]


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"experts": np.zeros((3, 2, 2), np.uint16)},
        {"experts": np.full((3, 3, 2), 8, np.uint16)},
        {"experts": np.zeros((3, 3, 2), np.int64)},
        {"sequence": np.zeros(2, np.int64)},
        {"sequence": np.array([{}, {}, {}], dtype=object)},
    ],
    ids=["missing", "layers", "expert", "type", "length", "object"],
)
def test_foreign_or_damaged_paths_are_refused(trace, tmp_path, arrays):
    sound = {
        "sequence": np.zeros(3, np.int64),
        "position": np.arange(3),
        "experts": np.zeros((3, 3, 2), np.uint16),
    }
    np.savez(tmp_path / "p.npz", **(sound | arrays if arrays else {}))

    with pytest.raises(InputError, match=r"p\.npz"):
        read_paths(tmp_path / "p.npz", trace.shape)


def test_files_that_are_no_archives_are_refused(trace, tmp_path):
    (tmp_path / "p.npz").write_text("paths")

    with pytest.raises(InputError, match="does not hold predicted paths"):
        read_paths(tmp_path / "p.npz", trace.shape)


def test_card_is_read_again_and_foreign_ones_are_refused(trace, tmp_path):
    folder = write(tmp_path, trace, truth(trace, [0]))
    card = read_card(folder)

    assert card.seen() == {"i"}
    write_json(folder / CARD, {"format": "a postcard"})
    with pytest.raises(InputError, match="a postcard"):
        read_card(folder)


def test_predictor_of_another_model_is_refused(trace, tmp_path):
    foreign = replace(trace.shape, num_experts=16)
    folder = write(tmp_path, trace, truth(trace, [0]), shape=foreign)

    with pytest.raises(PolicyError, match="num_experts 16"):
        judged_on_paths(forecaster(trace), folder)


def test_simulate_takes_the_folder(trace, tmp_path, capsys):
    folder = write(tmp_path / "p", trace, truth(trace, [2, 6]))

    with pytest.raises(SystemExit) as stop:
        main(
            [
                *("simulate", str(trace.path), "--predictor", "path"),
                *("--paths", str(folder), "--predictor-param", "horizon=2"),
            ]
        )

    out = capsys.readouterr().out
    assert not stop.value.code
    assert "path(horizon=2)" in out
    assert "Judged on 2 of 8 prompts" in out

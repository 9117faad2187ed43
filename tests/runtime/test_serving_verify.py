"""`verify --arrivals`: matched loads, tolerances that follow the load, texts in doubt, forecasts that are wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from expertflow.runtime import serving_calibrate, serving_deploy, serving_verify
from expertflow.runtime.deploy import Prepared, RunRequest
from expertflow.runtime.forecasts import forecaster_of
from expertflow.runtime.reference import reference_of
from expertflow.runtime.serving import NO_MEMORY, peak_in_passes, serve
from expertflow.runtime.serving_deploy import requests_of
from expertflow.runtime.serving_loads import Loads
from expertflow.runtime.speed_bands import SPEEDS, speed_bands
from expertflow.runtime.verdict import LATENCY_AT_MOST, SERVING_QUANTITIES, SPEED_STEP
from expertflow.simulator.arrivals import read_arrivals
from expertflow.simulator.commands.arrival_options import ArrivalOptions
from expertflow.simulator.costs import CostModel, Linear, PhaseCosts
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.result import Verdict
from expertflow.simulator.serving import ServingSettings
from expertflow.simulator.serving import serve as simulated
from expertflow.simulator.token_table import TokenTable
from expertflow.tracer.generate import Generated
from expertflow.tracer.load import load_model
from expertflow.tracer.record import Recording
from expertflow.tracer.records import from_json, to_json

from tests.runtime.bench import COSTS, CPU, NEW_TOKENS
from tests.runtime.test_commands import one_sentence, ran

OLD = Path(__file__).parents[2] / "traces" / "demo" / "verdict.json"


@pytest.fixture
def policy(bench, tmp_path):
    return bench.policy_file(tmp_path / "policy.json", bench.spec(9))


def verified(capsys, bench, policy, *more):
    return ran(
        capsys, "verify", policy, "--prompts", bench.prompts_file, "--max-new-tokens", NEW_TOKENS, "--device", "cpu",
        "--repeats", 1, *more,
    )  # fmt: skip


@pytest.fixture
def short(monkeypatch):
    """Two calibration policies: the others are tested elsewhere."""
    made = serving_verify.ServingCalibration

    def calibration(*args, **more):
        found = made(*args, **more)
        found.specs = found.specs[1:3]
        return found

    monkeypatch.setattr(made, "_memory_points", lambda self, specs: ())
    monkeypatch.setattr(serving_verify, "ServingCalibration", calibration)


@pytest.fixture
def few(monkeypatch, short):
    """The policy and the baseline alone."""
    monkeypatch.setattr(
        serving_verify,
        "neighbours",
        lambda spec, workload: [spec, make_spec(slots=spec.slots, cache="none")],
    )


def asked(arrivals: str, **more) -> ArrivalOptions:
    names = ("max_batch", "requests", "arrival_speed", "lengths", "prefill", "seed")
    return ArrivalOptions(**{**dict.fromkeys(names), **more}, arrivals=arrivals)


def loads_of(bench, arrivals: str, repeats=3, prompts=None, **more) -> Loads:
    run = RunRequest(max_new_tokens=NEW_TOKENS, batch_size=2, prompts=prompts)
    return Loads(bench.prompts, run, asked(arrivals, **more), frozenset(), repeats=repeats)


# --- loads ---------------------------------------------------------------------------------------


def test_judged_prompts_come_and_the_others_calibrate(bench):
    loads = loads_of(bench, "poisson:5")

    load = loads.of(0)

    kept = [prompt.token_ids for prompt in loads.others]
    assert [prompt.token_ids for prompt in load.requests] == [
        prompt.token_ids for prompt in bench.prompts if prompt.token_ids not in kept
    ]
    assert kept == [bench.prompts[2].token_ids]
    assert [prompt.sequence for prompt in load.requests] == [0, 1, 2, 3]


def test_poisson_arrivals_are_drawn_anew_in_each_repeat(bench):
    loads = loads_of(bench, "poisson:5", seed=4)

    times = {tuple(one.time_s for one in loads.of(n).arrivals.requests) for n in range(3)}

    assert len(times) == 3
    assert loads.of(2).arrivals == read_arrivals("poisson:5", limit=4, seed=6)
    assert loads.description == "Poisson, 5/s, seeds 4 to 6; 4 requests, at most 2 at once"


def test_requests_beyond_the_prompts_begin_anew_and_are_traced_once(bench):
    loads = loads_of(bench, "closed:2", requests=9)

    prompts, new_tokens = loads.distinct()

    assert len(loads.of(0).requests) == 9
    assert len(prompts) == 4
    assert new_tokens == [NEW_TOKENS] * 4
    assert loads.of(0).arrivals == loads.of(1).arrivals
    assert "9 requests are few" in loads.notes[0]


def test_requests_with_lengths_of_their_own_are_all_traced(bench, tmp_path):
    path = tmp_path / "lengths.jsonl"
    rows = [{"timestamp": 10 * n, "input_length": 3 + n, "output_length": 1 + n} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    prompts, new_tokens = loads_of(bench, str(path), lengths="arrivals", requests=6).distinct()

    assert [len(prompt.token_ids) for prompt in prompts] == [3, 4, 5, 6, 7, 8]
    assert new_tokens == [1, 2, 3, 4, 5, 6]


def test_a_queue_keeps_some_requests_for_calibration_and_says_so(bench, tmp_path):
    queue = tmp_path / "queue.jsonl"
    queue.write_text("".join(json.dumps({"text": str(n), "arrival_s": n}) + "\n" for n in range(5)))

    loads = loads_of(bench, str(queue), prompts=queue)

    assert [one.time_s for one in loads.of(0).arrivals.requests] == [0, 1, 3, 4]
    assert [prompt.token_ids for prompt in loads.of(1).requests] == [
        bench.prompts[n].token_ids for n in (0, 1, 3, 4)
    ]
    assert "1 requests of the queue were kept for calibration" in " ".join(loads.notes)


def test_a_reference_gives_every_prompt_its_own_number_of_tokens(bench):
    loaded = load_model(str(bench.model), device=CPU)
    prepared = Prepared(loaded, CPU, None, "ram", bench.prompts)
    wanted = [5, 5, 2, 3, 1]

    found = reference_of(
        prepared, bench.prompts, batch_size=1, new_tokens=wanted, recording=Recording()
    )

    assert [one.token_ids for one in found.outputs] == [
        text[:count] for text, count in zip(bench.resident[1], wanted, strict=True)
    ]
    table = TokenTable.of(found.workload)
    assert table.prompts.tolist() == [len(prompt.token_ids) for prompt in bench.prompts]
    generated = [len(one.token_ids) for one in found.outputs]
    assert table.first[-1] == sum(table.prompts) + sum(generated) - len(generated)


# --- memory --------------------------------------------------------------------------------------


def test_predicted_keys_and_values_are_those_of_the_pack(bench):
    spec = bench.spec(13)
    settings = ServingSettings(max_batch=3, max_step_tokens=9)
    load = requests_of(bench.prompts, read_arrivals("closed:3", limit=7), settings, NEW_TOKENS)
    load = replace(load, eos_ids=bench.loaded.eos_ids)
    served = serve(bench.machine, spec, load, memory=NO_MEMORY)

    table = TokenTable.of(bench.workloads[1])
    ahead = simulated(table, spec, load.arrivals, settings).closed_workload()

    steps = ahead.steps
    positions = steps.batch * steps.context + steps.kv_beside
    per_token = bench.shape.kv_bytes_per_token
    assert served.record.memory.kv_cache == positions.max() * per_token
    assert (steps.kv_beside < 0).any()


def test_peaks_are_those_of_the_passes_that_ran(bench):
    spec = bench.spec(13)
    together, alone = (
        requests_of(
            bench.prompts[:3],
            read_arrivals(arrivals, limit=3),
            ServingSettings(max_batch=3),
            NEW_TOKENS,
        )
        for arrivals in ("closed:3", "closed:1")
    )
    found = [
        peak_in_passes(
            bench.machine, spec, load, serve(bench.machine, spec, load, memory=NO_MEMORY).passes
        )
        for load in (together, alone)
    ]

    assert found[0].activations > found[1].activations > 0
    assert {one.slots for one in found} == {13 * bench.shape.expert_bytes}
    assert {one.kv_cache for one in found} == {0}


# --- tolerances ----------------------------------------------------------------------------------


def slower(costs: CostModel, times: float) -> CostModel:
    """A machine that takes so many times as long for everything."""

    def linear(one: Linear) -> Linear:
        return replace(one, weights=tuple(times * weight for weight in one.weights))

    def phase(one: PhaseCosts) -> PhaseCosts:
        return replace(
            one,
            mixer=linear(one.mixer),
            experts=linear(one.experts),
            head=linear(one.head),
            decision=linear(one.decision),
            lookahead=linear(one.lookahead),
            readback_s=times * one.readback_s,
        )

    return replace(
        costs,
        prefill=phase(costs.prefill),
        decode=phase(costs.decode),
        copy_s=times * costs.copy_s,
        busy_copy_s=times * costs.busy_copy_s,
        wake_s=times * costs.wake_s,
    )


def predicted(bench, costs: CostModel, arrivals, spec=None):
    spec = spec or bench.spec(9)
    table = TokenTable.of(bench.workloads[1])
    forecaster = forecaster_of(bench.machine, bench.workloads[1], costs)
    serving = simulated(table, spec, arrivals, ServingSettings(max_batch=2))
    return forecaster.predict(spec, serving=serving, with_bounds=False)


@pytest.mark.parametrize("rate", [20, 80])
def test_bands_are_what_a_slower_or_faster_machine_would_show(bench, rate):
    """The bands never build that machine; here it is built, and shows the same."""
    arrivals = read_arrivals(f"poisson:{rate}", limit=12)
    found = predicted(bench, COSTS, arrivals)

    bands = speed_bands(found, arrivals, lambda asked: predicted(bench, COSTS, asked))

    others = [predicted(bench, slower(COSTS, times), arrivals) for times in SPEEDS]
    for quantity in SERVING_QUANTITIES:
        changes = [abs(quantity.gap(quantity.of(one), quantity.of(found))) for one in others]
        assert bands[quantity.name] == pytest.approx(max(changes), abs=1e-6), quantity.name


def test_bands_widen_where_queues_begin_until_nothing_is_judged(bench):
    capacity = predicted(bench, COSTS, read_arrivals("closed:2", limit=40)).arrivals.served_per_s

    def band(share: float) -> float:
        arrivals = read_arrivals(f"poisson:{share * capacity}", limit=120)
        found = predicted(bench, COSTS, arrivals)
        bands = speed_bands(found, arrivals, lambda asked: predicted(bench, COSTS, asked))
        return bands["ttft_p50_s"]

    assert SPEED_STEP / 2 < band(0.2) < 0.25
    assert max(band(share) for share in (0.6, 0.7, 0.8, 0.9)) > LATENCY_AT_MOST


def test_a_closed_loop_has_no_band_for_its_passes_do_not_depend_on_the_clock(bench):
    arrivals = read_arrivals("closed:2", limit=6)

    assert speed_bands(predicted(bench, COSTS, arrivals), arrivals, pytest.fail) == {}


# --- the command ---------------------------------------------------------------------------------


def test_a_closed_loop_is_judged_with_its_neighbours(capsys, short, bench, policy, tmp_path):
    out = tmp_path / "verdict.json"

    code, printed, err = verified(
        capsys, bench, policy, "--arrivals", "closed:2", "--requests", 5, "--json", "--out", out
    )

    verdict = from_json(Verdict, json.loads(out.read_text()))
    assert code == (0 if verdict.validated else 5)
    assert json.loads(printed)["summary"] == verdict.summary
    assert verdict.arrivals == "closed loop of 2; 5 requests, at most 2 at once"
    same_size = ["lru @ 9 slots", "none @ 9 slots", "static @ 9 slots"]
    assert [run.label for run in verdict.runs] == [*same_size, "lru @ 6 slots", "lru @ 18 slots"]
    for run in verdict.runs:
        assert run.same_tokens
        assert run.log_replays
        checked = {check.quantity: check for check in run.checks}
        # Times may be off on a busy machine; decisions and bytes may not.
        assert checked["hit_rate"].gap == 0
        assert checked["bytes_per_token"].gap == 0
        assert {name: checked[name].unit for name in checked if name.startswith("t")} == {
            "tokens_per_s": "tokens/s",
            "ttft_p50_s": "s",
            "ttft_p99_s": "s",
            "tpot_p50_s": "s",
            "tpot_p99_s": "s",
        }
        assert all(check.is_judged for check in run.checks)
        measured = run.measured[0]
        assert measured.arrivals is not None
        assert checked["ttft_p99_s"].measured == measured.ttft.p99
        assert measured.memory.activations > 0
    assert "Median time to the first token" in verdict.summary
    assert "NOT validated" in err or verdict.validated


def test_people_see_latencies_and_whether_the_machine_keeps_up(capsys, few, bench, policy):
    code, printed, _ = verified(
        capsys, bench, policy, "--arrivals", "poisson:300", "--max-batch", 2, "--requests", 8,
        "--stop-at-eos",
    )  # fmt: skip

    assert code in (0, 5)
    assert printed.count("ttft_p99_s") == printed.count("tpot_p50_s") == 2
    assert printed.count("requests arrive at") == 4
    assert "same text             yes" in printed
    assert "same text             NO" not in printed
    assert "8 requests are few" in printed


def test_lengths_of_arrivals_are_served_and_predicted_alike(capsys, few, bench, policy, tmp_path):
    path = tmp_path / "lengths.jsonl"
    rows = [{"timestamp": 2 * n, "input_length": 9 + n, "output_length": 1 + n} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    code, printed, _ = verified(
        capsys,
        bench,
        policy,
        "--arrivals",
        path,
        "--lengths",
        "arrivals",
        "--requests",
        5,
        "--json",
    )

    verdict = json.loads(printed)
    assert code in (0, 5)
    for run in verdict["runs"]:
        assert run["same_tokens"]
        for result in (run["predicted"], run["measured"][0]):
            assert result["prefill"]["tokens"] == sum(range(9, 14))
            assert result["arrivals"]["requests"] == 5
    assert "prompts were cut or repeated" in " ".join(verdict["warnings"])


@pytest.mark.parametrize("quantity", ["time", "text"])
def test_a_wrong_forecast_is_not_validated(
    capsys, few, bench, policy, tmp_path, monkeypatch, quantity
):
    """All else is as it is: a machine is forecast that takes 20 times as long, or a text is expected nobody writes."""
    if quantity == "time":
        true = serving_calibrate.ServingCalibration.measure
        monkeypatch.setattr(
            serving_calibrate.ServingCalibration,
            "measure",
            lambda *args: slower(true(*args), 20),
        )
    else:
        wrong_reference(monkeypatch)
        monkeypatch.setattr(
            serving_verify,
            "text_in_passes",
            lambda loaded, requests, passes: [Generated(one.sequence, [7]) for one in requests],
        )

    code, printed, err = verified(
        capsys, bench, policy, "--arrivals", "closed:2", "--requests", 5, "--json"
    )

    verdict = json.loads(printed)
    assert code == 5
    assert not verdict["validated"]
    assert "NOT validated" in err
    if quantity == "time":
        for run in verdict["runs"]:
            failed = {check["quantity"] for check in run["checks"] if not check["passed"]}
            assert {"tokens_per_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s"} <= failed
            assert "hit_rate" not in failed
    else:
        assert "the text differs from the resident model's" in verdict["summary"]
        assert not any(run["same_tokens"] for run in verdict["runs"])


def wrong_reference(monkeypatch):
    true = serving_verify.reference_of

    def changed(*args, **more):
        found = true(*args, **more)
        found.outputs[0] = replace(found.outputs[0], token_ids=[7, *found.outputs[0].token_ids[1:]])
        return found

    monkeypatch.setattr(serving_verify, "reference_of", changed)


def test_texts_that_the_resident_writes_in_the_same_passes_are_rounding(
    capsys, few, bench, policy, monkeypatch
):
    """As with 16 bits, where the batch decides between tokens that are as good as equal."""
    wrong_reference(monkeypatch)

    _, printed, err = verified(
        capsys, bench, policy, "--arrivals", "closed:2", "--requests", 5, "--json"
    )

    verdict = json.loads(printed)
    assert all(run["same_tokens"] for run in verdict["runs"])
    assert all(one["same_tokens"] for run in verdict["runs"] for one in run["measured"])
    # Two configurations and the control, with the first of four prompts twice in five requests.
    assert "6 of 15 requests" in " ".join(verdict["warnings"])
    assert "text differs" not in verdict["summary"]
    assert "the resident model runs the same passes" in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"scheduler": "route_similarity"}, "arrivals out"), ({"predictor": "path"}, "arrivals out")],
)
def test_policies_that_cannot_be_served_are_refused_before_a_model_is_loaded(
    capsys, bench, tmp_path, monkeypatch, changes, words
):
    monkeypatch.setattr(serving_deploy, "prepare", lambda *args: pytest.fail("a model was loaded"))
    policy = bench.policy_file(tmp_path / "p.json", bench.spec(9, **changes))

    code, _, err = verified(capsys, bench, policy, "--arrivals", "closed:2")

    assert code == 2
    assert words in one_sentence(err)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--max-batch", 2), 2, "--max-batch is about requests that arrive; add --arrivals"),
        (("--stop-at-eos",), 2, "--stop-at-eos is about requests"),
        (("--arrivals", "poisson:0"), 2, "needs requests/s above 0"),
        (("--arrivals", "closed:4", "--max-step-tokens", 3), 2, "only 3 tokens"),
        (("--arrivals", "every:1", "--lengths", "arrivals"), 2, "say nothing about lengths"),
        (("--arrivals", "missing.jsonl"), 3, "cannot be read"),
        (("--arrivals", "closed:2", "--repeats", 0), 2, "--repeats"),
        (("--arrivals", "closed:2", "--limit", 1), 2, "at least 2 prompts"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_sentence(
    capsys, bench, policy, options, code, words
):
    got, _, err = verified(capsys, bench, policy, *options)

    assert got == code
    assert words in one_sentence(err)


def test_a_verdict_of_before_reads_as_judged_and_without_arrivals(bench):
    verdict = from_json(Verdict, json.loads(OLD.read_text()))

    assert verdict.arrivals == ""
    assert all(check.is_judged for run in verdict.runs for check in run.checks)
    assert from_json(Verdict, to_json(verdict)) == verdict

"""Baselines: the same text from each, bytes that add up, and a sentence where one cannot run."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from expertflow.dashboard.data import discover
from expertflow.runtime import baselines
from expertflow.runtime.accelerated import accelerated_runs
from expertflow.runtime.baselines import (
    BASELINES,
    NAMES,
    BaselineRequest,
    chosen,
    count_runs,
    in_the_middle,
    run_baselines,
)
from expertflow.runtime.deploy import Prepared, RunRequest
from expertflow.runtime.stock import stock_runs
from expertflow.simulator.policy.spec import PolicyFile
from expertflow.simulator.result import Result
from expertflow.tracer.errors import ResourceError, UsageError
from expertflow.tracer.load import load_model
from expertflow.tracer.main import main
from expertflow.tracer.quantities import LinkSpec
from expertflow.tracer.records import from_json

from tests.runtime.bench import CPU, NEW_TOKENS

SLOTS = 12
accelerate = pytest.importorskip("accelerate")


def request(bench, **more) -> BaselineRequest:
    run = RunRequest(
        model=str(bench.model),
        prompts=bench.prompts_file,
        max_new_tokens=NEW_TOKENS,
        device="cpu",
        threads=1,
        **more.pop("run", {}),
    )
    return BaselineRequest(**{"run": run, "repeats": 1, **more})


def ran(bench, **more):
    told = []
    report = run_baselines(request(bench, **more), say=lambda words: None, advance=told.append)
    return report, sum(told)


@pytest.fixture(scope="module")
def report(bench):
    return ran(bench)[0]


def prepared(bench, link=None) -> Prepared:
    loaded = load_model(str(bench.model), device=CPU)
    return Prepared(loaded, CPU, link, "ram", bench.prompts)


def accelerated(bench, slots, link=None):
    sizes = {"batch_size": 1, "max_new_tokens": NEW_TOKENS}
    with accelerated_runs(prepared(bench, link), slots=slots, **sizes) as runs:
        return runs.run()


def test_every_baseline_gives_the_stock_models_text(report):
    assert tuple(report.results) == NAMES
    assert report.skipped == {}
    assert all(result.same_tokens is True for result in report.results.values())
    assert all(result.source == "measured" for result in report.results.values())
    assert len({result.label for result in report.results.values()}) == len(NAMES)


def test_policies_among_them_replay_their_logs(report):
    for baseline in BASELINES:
        replays = report.results[baseline.name].log_replays
        assert replays is (True if baseline.spec else None)


def test_bytes_are_ordered_as_the_baselines_are_meant(bench, report):
    moved = {name: result.bytes_per_token for name, result in report.results.items()}

    assert moved["stock"] == moved["resident"] == 0
    assert 0 < moved["lru"] < moved["lru_write_back"] <= 2 * moved["lru"]
    assert moved["lru"] <= moved["on_demand"] < moved["whole_layer"]
    assert moved["accelerate"] > 0


def test_layer_streaming_moves_all_experts_in_every_pass(bench, report):
    found = report.results["whole_layer"]
    passes = found.prefill.steps + found.decode.steps
    total = (found.prefill.bytes_moved + found.decode.bytes_moved) / bench.shape.expert_bytes

    assert found.slots == SLOTS
    assert total >= passes * bench.shape.total_experts - found.slots


def test_memory_holds_what_each_keeps_on_the_device(bench, report):
    shape, found = bench.shape, report.results
    everything = shape.total_experts * shape.expert_bytes

    assert found["stock"].memory.slots == found["resident"].memory.slots == everything
    assert found["stock"].memory.non_expert_weights == shape.non_expert_bytes
    for name in ("on_demand", "lru", "lru_write_back"):
        assert found[name].memory.slots == SLOTS * shape.expert_bytes
    held = found["accelerate"].memory
    assert held.staging > 0
    assert held.slots + held.non_expert_weights + held.staging < everything + shape.non_expert_bytes
    assert all(result.memory.activations > 0 for result in found.values())


def test_accelerate_brings_its_modules_once_in_every_pass(bench):
    result, outputs = accelerated(bench, SLOTS)
    passes = result.prefill.steps + result.decode.steps
    shape = bench.shape
    weights = shape.non_expert_bytes + shape.total_experts * shape.expert_bytes
    away = weights - result.memory.slots - result.memory.non_expert_weights

    assert away > 0
    assert result.prefill.bytes_moved + result.decode.bytes_moved == passes * away
    assert result.stall_s > 0
    assert result.link == "disk to memory"
    assert [one.token_ids for one in outputs] == bench.resident[1]


def test_accelerate_with_room_for_all_moves_nothing(bench):
    result, outputs = accelerated(bench, 10 * bench.shape.total_experts)

    assert result.bytes_per_token == result.stall_s == 0
    assert [one.token_ids for one in outputs] == bench.resident[1]


def test_accelerate_behind_an_emulated_link_waits_at_least_as_long_as_the_link_takes(bench):
    link = LinkSpec.parse("100MB/s+1us")

    result, _ = accelerated(bench, SLOTS, link)

    moved = result.prefill.bytes_moved + result.decode.bytes_moved
    assert result.stall_s >= moved / link.bandwidth_Bps
    assert (result.link, result.link_origin) == ("100MB/s+1us", "emulated")


def test_accelerate_without_room_for_a_layer_says_so(bench):
    starved = prepared(bench)
    shape = replace(starved.loaded.shape, non_expert_bytes=0, expert_bytes=1)
    starved = replace(starved, loaded=replace(starved.loaded, shape=shape))

    with (
        pytest.raises(ResourceError, match="no layer on cpu"),
        accelerated_runs(starved, slots=1, batch_size=1, max_new_tokens=2),
    ):
        pass


def test_stock_runs_take_turns_without_changing(bench):
    runs = stock_runs(prepared(bench), batch_size=4, max_new_tokens=NEW_TOKENS)

    first, second = runs.run(), runs.run()

    assert [one.token_ids for one in first[1]] == [one.token_ids for one in second[1]]
    assert first[0].decode.steps == second[0].decode.steps > 0
    assert first[0].tokens_per_s > 0
    assert first[0].time.other_s == pytest.approx(first[0].time.total_s)


def test_a_policy_runs_beside_them_at_its_own_size(bench):
    spec = bench.spec(9, "lfu")
    policy = PolicyFile(
        behaviour=spec,
        behaviour_hash=spec.behaviour_hash(),
        shape=bench.shape,
        budget="9slots",
        trace="mine",
    )

    found, advanced = ran(bench, policy=policy, names=("lru",), repeats=2)

    assert list(found.results) == ["lru", "policy"]
    assert found.slots == found.results["lru"].slots == 9
    assert found.results["policy"].policy_hash == spec.behaviour_hash()
    assert {result.trace_id for result in found.results.values()} == {"mine"}
    assert advanced == 4 == count_runs(request(bench, policy=policy, names=("lru",), repeats=2))


def test_without_accelerate_the_others_run(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)

    found, _ = ran(bench, names=("accelerate", "lru"))

    assert list(found.results) == ["lru"]
    assert "expertflow-trace[accelerate]" in found.skipped["accelerate"]


def test_a_model_that_does_not_fit_is_run_without_its_text(bench, monkeypatch):
    monkeypatch.setattr(baselines, "choose_residency", lambda *args: "stream")

    found, _ = ran(bench, names=("stock", "lru"))

    assert list(found.results) == ["lru"]
    assert found.results["lru"].same_tokens is None
    assert "does not fit" in found.skipped["stock"]


def test_unknown_names_none_and_no_repeats_are_refused(bench):
    with pytest.raises(UsageError, match="Did you mean 'lru'"):
        chosen(["lruu"])
    with pytest.raises(UsageError, match="No baseline is named"):
        chosen([])
    with pytest.raises(UsageError, match="--repeats"):
        ran(bench, repeats=0)


def test_the_repeat_in_the_middle_is_shown_and_one_other_text_is_enough(report):
    runs = [replace(report.results["lru"], tokens_per_s=speed) for speed in (5.0, 1.0, 3.0)]

    assert in_the_middle(runs).tokens_per_s == 3.0
    assert in_the_middle(runs).same_tokens is True
    assert in_the_middle([replace(runs[0], same_tokens=False), *runs[1:]]).same_tokens is False


# --- the command ---------------------------------------------------------------------------------


def command(capsys, bench, *more) -> tuple[int, str, str]:
    capsys.readouterr()
    words = [
        "baselines",
        *("--model", bench.model),
        *("--prompts", bench.prompts_file),
        *("--limit", 2),
        *("--max-new-tokens", 3),
        *("--repeats", 1),
        *("--device", "cpu"),
        *more,
    ]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    torch.set_num_threads(1)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(stop.value.code), out, err


def test_command_writes_results_that_the_dashboard_compares(capsys, bench, tmp_path):
    out = tmp_path / "results"

    code, printed, _ = command(capsys, bench, "--only", "stock,lru", "--out", out, "--json")

    document = json.loads(printed)
    assert code == 0
    assert document["format"] == "expertflow.baselines/1"
    assert list(document["results"]) == ["stock", "lru"]
    (out / "all.json").write_text(printed)
    catalog = discover(out)
    assert catalog.problems == ()
    assert {one.name: one.value.same_tokens for one in catalog.results} == {
        "lru.json": True,
        "stock.json": True,
    }
    assert from_json(Result, document["results"]["lru"]).log_replays is True


def test_command_tells_people(capsys, bench):
    code, printed, _ = command(capsys, bench, "--only", "stock,accelerate", "--link", "1GB/s")

    assert code == 0
    assert "of stock" in printed
    assert "emulated" in printed
    assert "same text" in printed


def test_command_exits_4_if_nothing_can_run(capsys, bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)

    code, _, err = command(capsys, bench, "--only", "accelerate")

    assert code == 4
    assert "needs accelerate" in err


def test_command_exits_5_if_a_text_differs(capsys, bench, monkeypatch):
    monkeypatch.setattr(baselines, "same_text", lambda one, other: False)

    code, printed, err = command(capsys, bench, "--only", "lru")

    assert code == 5
    assert "ANOTHER TEXT" in printed
    assert "lru" in err

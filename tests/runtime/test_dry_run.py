"""`deploy --dry-run` says what a run takes without loading anything; what cannot fit is refused before it is loaded."""

import json

import pytest
import torch
from expertflow.runtime import deploy as deploying
from expertflow.runtime import room
from expertflow.runtime.run_plan import RunPlan
from expertflow.tracer.errors import ResourceError
from expertflow.tracer.main import main
from expertflow.tracer.records import from_json

from tests.runtime.bench import NEW_TOKENS


@pytest.fixture
def policy(bench, tmp_path):
    return bench.policy_file(tmp_path / "policy.json", bench.spec(9))


@pytest.fixture
def unloadable(monkeypatch):
    """Loading a model is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(deploying, "load_model", refuse)


def ran(capsys, bench, policy, *more) -> tuple[int, str, str]:
    capsys.readouterr()
    words = [
        "deploy", policy, "--prompts", bench.prompts_file, "--max-new-tokens", NEW_TOKENS,
        "--device", "cpu", *more,
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    torch.set_num_threads(1)
    streams = capsys.readouterr()
    return int(stop.value.code or 0), streams.out, streams.err


def test_a_dry_run_says_what_the_run_takes_and_loads_nothing(capsys, bench, policy, unloadable):
    code, out, err = ran(capsys, bench, policy, "--dry-run", "--json")
    plan = from_json(RunPlan, json.loads(out))

    assert code == 0
    assert "Nothing was loaded" in err
    assert plan.memory.slot_bytes == 9 * bench.shape.expert_bytes
    assert plan.memory.non_expert_weights == bench.shape.non_expert_bytes
    longest = max(len(prompt.token_ids) for prompt in bench.prompts)
    assert plan.size.tokens == longest
    assert plan.size.context == longest + NEW_TOKENS
    assert plan.memory.kv_cache == plan.size.context * bench.shape.kv_bytes_per_token
    assert plan.memory.is_host
    assert plan.policy_hash == bench.spec(9).behaviour_hash()


def test_the_run_stays_within_its_plan(capsys, bench, policy):
    _, out, _ = ran(capsys, bench, policy, "--dry-run", "--json", "--batch-size", "4")
    plan = from_json(RunPlan, json.loads(out))
    _, out, _ = ran(capsys, bench, policy, "--json", "--batch-size", "4")
    measured = json.loads(out)["memory"]

    assert measured["slots"] == plan.memory.slot_bytes
    assert measured["non_expert_weights"] == plan.memory.non_expert_weights
    assert measured["kv_cache"] <= plan.memory.kv_cache
    beside = plan.memory.activations + plan.memory.staging
    assert measured["activations"] <= beside < 12 * measured["activations"]


def test_people_read_the_same(capsys, bench, policy, unloadable):
    code, out, _ = ran(capsys, bench, policy, "--dry-run", "--memory", "1GiB")

    assert code == 0
    assert "expert slots" in out
    assert "9 of 24 experts" in out
    assert "upper estimate from the config" in out
    assert "as told by --memory" in out


@pytest.mark.parametrize("option", ["--memory", "--vram"])
def test_a_budget_that_is_too_small_is_refused_with_what_fits(
    capsys, bench, policy, unloadable, option
):
    code, out, _ = ran(capsys, bench, policy, "--dry-run", "--json")
    plan = from_json(RunPlan, json.loads(out))
    least = plan.memory.device_bytes - bench.shape.expert_bytes

    code, out, err = ran(capsys, bench, policy, "--dry-run", option, f"{least}B")

    assert code == 4
    assert "expert slots" in out  # the plan comes first
    assert "9 slots do not fit" in err
    assert "--budget 8slots" in err
    assert "Traceback" not in err


def test_a_run_is_refused_before_the_model_is_loaded(capsys, bench, policy, unloadable):
    code, out, err = ran(capsys, bench, policy, "--memory", "10KB")

    assert code == 4
    assert out == ""
    assert "9 slots do not fit" in err


def test_a_larger_budget_does_not_make_the_device_larger(bench, policy, monkeypatch, unloadable):
    from expertflow.simulator.policy.spec import read_policy

    request = deploying.RunRequest(prompts=bench.prompts_file, device="cpu", memory="100GiB")
    monkeypatch.setattr(room, "free_bytes", lambda device: 1000)

    with pytest.raises(ResourceError, match="1 KB may be used"):
        deploying.check_room(read_policy(policy), request)


def test_a_host_too_small_for_the_model_is_refused(capsys, bench, policy, monkeypatch, unloadable):
    monkeypatch.setattr(room, "available_host_bytes", lambda: 50_000)

    code, _, err = ran(capsys, bench, policy, "--memory", "1GiB", "--dry-run")

    assert code == 4
    assert "host memory" in err


def test_batches_that_are_decoded_in_turns_all_have_a_cache(capsys, bench, tmp_path, unloadable):
    spec = bench.spec(9, scheduler="route_similarity", scheduler_params={"batches": 3})
    together = bench.policy_file(tmp_path / "together.json", spec)
    alone = bench.policy_file(tmp_path / "alone.json", bench.spec(9))

    plans = [
        from_json(RunPlan, json.loads(ran(capsys, bench, path, "--dry-run", "--json")[1]))
        for path in (together, alone)
    ]

    assert plans[0].size.sequences == 3
    assert plans[0].memory.kv_cache == 3 * plans[1].memory.kv_cache


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (("--memory", "much"), 2),
        (("--batch-size", "0"), 2),
        (("--max-new-tokens", "0"), 2),
        (("--limit", "0"), 2),
        (("--device", "abacus"), 2),
        (("--tier", "tape"), 2),
        (("--machine", "gone.json"), 3),
        (("--model", "/nowhere/gone"), 4),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(
    capsys, bench, policy, unloadable, wrong, code
):
    found, out, err = ran(capsys, bench, policy, "--dry-run", *wrong)

    assert found == code
    assert out == ""
    assert "This is a bug" not in err

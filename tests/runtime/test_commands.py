"""`deploy` and `verify` from the outside: exit codes, JSON, and policies that are refused."""

import json
from dataclasses import replace

import pytest
import torch
from expertflow.simulator.policy.spec import Member
from expertflow.simulator.result import Result, Verdict
from expertflow.tracer.main import main
from expertflow.tracer.records import from_json

from tests.runtime.bench import NEW_TOKENS


@pytest.fixture
def policy(bench, tmp_path):
    return bench.policy_file(tmp_path / "policy.json", bench.spec(9))


def ran(capsys, *args) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    torch.set_num_threads(1)
    out, err = capsys.readouterr()
    return int(stop.value.code), out, err


def deployed(capsys, bench, policy, *more):
    return ran(
        capsys,
        "deploy",
        policy,
        *("--prompts", bench.prompts_file),
        *("--max-new-tokens", NEW_TOKENS),
        *("--device", "cpu"),
        *more,
    )


def one_sentence(err: str) -> str:
    [line] = [line for line in err.splitlines() if line.startswith("error:")]
    assert "Traceback" not in err
    assert "This is a bug" not in err
    assert line.endswith(".")
    return line


def test_deploy_prints_a_measured_result(capsys, bench, policy, tmp_path):
    out = tmp_path / "result.json"

    code, printed, _ = deployed(capsys, bench, policy, "--json", "--out", out)

    document = json.loads(printed)
    assert code == 0
    assert document["format"] == "expertflow.result/1"
    assert document["source"] == "measured"
    assert document["same_tokens"] is True
    assert document["log_replays"] is True
    for name in ("tokens_per_s", "ttft_s", "tpot_s", "peak_device_bytes", "bytes_per_token"):
        assert document[name] > 0, name
    rates = [document[name] for name in ("hit_rate", "late_rate", "miss_rate")]
    assert sum(rates) == pytest.approx(1.0)
    assert document["stall_s"] >= 0
    assert document["slots"] == 9
    assert document["total_experts"] == 24
    assert document["memory"]["slots"] == 9 * bench.shape.expert_bytes
    for phase in ("prefill", "decode"):
        assert document[phase]["demanded"] > 0
    assert "belady_tokens_per_s" in document["bounds"]
    written = from_json(Result, json.loads(out.read_text()))
    assert written.label == document["label"]
    assert written.policy_hash == bench.spec(9).behaviour_hash()


def test_deploy_tells_people(capsys, bench, policy):
    code, printed, _ = deployed(capsys, bench, policy)

    assert code == 0
    assert "same text" in printed
    assert "log replays" in printed


def test_deploy_says_when_text_was_not_compared(capsys, bench, policy):
    code, printed, _ = deployed(capsys, bench, policy, "--no-check", "--json", "--tier", "disk")

    document = json.loads(printed)
    assert code == 0
    assert document["same_tokens"] is None
    assert document["log_replays"] is True
    assert document["link"] == "disk to memory"


def test_deploy_with_prefetch_in_batches_on_an_emulated_link(capsys, bench, tmp_path):
    spec = bench.spec(12, "lfu", "global", "gate_lookahead")
    policy = bench.policy_file(tmp_path / "p.json", spec)

    code, printed, _ = deployed(
        capsys, bench, policy, "--json", "--batch-size", "4", "--link", "50MB/s+10us"
    )

    document = json.loads(printed)
    assert code == 0
    assert document["prefetch"]["issued"] > 0
    assert document["batch_size"] == 4
    assert document["link_origin"] == "emulated"
    assert document["same_tokens"] is True


def test_policy_of_another_shape_exits_3(capsys, bench, tmp_path):
    foreign = replace(bench.shape, num_experts=64)
    policy = bench.policy_file(tmp_path / "p.json", bench.spec(9), shape=foreign)

    code, _, err = deployed(capsys, bench, policy)

    assert code == 3
    assert "num_experts 64" in one_sentence(err)


@pytest.mark.parametrize("command", ["deploy", "verify"])
def test_policy_changed_by_hand_exits_3(capsys, policy, command):
    document = json.loads(policy.read_text())
    document["behaviour"]["slots"] = 10
    policy.write_text(json.dumps(document))

    code, _, err = ran(capsys, command, policy)

    assert code == 3
    assert "changed by hand" in one_sentence(err)


@pytest.mark.parametrize("body", ["", "{", "[]", '{"format": "expertflow.policy/1"}', "null"])
def test_file_that_is_no_policy_exits_3(capsys, policy, body):
    policy.write_text(body)

    code, _, err = ran(capsys, "deploy", policy)

    assert code == 3
    assert "policy.json" in one_sentence(err)


@pytest.mark.parametrize(("family", "member"), [("cache", "belady"), ("predictor", "oracle")])
def test_bound_exits_2_with_a_sentence(capsys, bench, tmp_path, family, member):
    spec = replace(bench.spec(9), **{family: Member(name=member)})
    policy = bench.policy_file(tmp_path / "p.json", spec)

    code, _, err = deployed(capsys, bench, policy)

    assert code == 2
    assert "cannot be deployed" in one_sentence(err)


@pytest.mark.parametrize(
    "wrong",
    [
        ("--tier", "tape"),
        ("--link", "quick"),
        ("--limit", "0"),
        ("--batch-size", "0"),
        ("--max-new-tokens", "0"),
        ("--device", "abacus"),
        ("--dtype", "int3"),
        ("--threads", "0"),
    ],
)
@pytest.mark.parametrize("command", ["deploy", "verify"])
def test_impossible_options_exit_2(capsys, bench, policy, command, wrong):
    code, _, err = ran(
        capsys, command, policy, "--prompts", bench.prompts_file, "--device", "cpu", *wrong
    )

    assert code == 2
    assert wrong[1] in one_sentence(err)


def test_missing_model_and_missing_cuda_exit_4(capsys, bench, policy, tmp_path):
    code, _, err = deployed(capsys, bench, policy, "--model", tmp_path / "gone")

    assert code == 4
    assert "gone" in one_sentence(err)
    if not torch.cuda.is_available():
        code, _, err = ran(capsys, "deploy", policy, "--device", "cuda")
        assert code == 4
        assert "CUDA" in one_sentence(err)


def test_policy_that_does_not_fit_exits_4_with_the_numbers(capsys, bench, policy, monkeypatch):
    from expertflow.runtime import room

    monkeypatch.setattr(room, "free_bytes", lambda device: 1000)

    code, _, err = deployed(capsys, bench, policy)

    assert code == 4
    assert "9 slots" in one_sentence(err)


def test_deploy_leaves_out_the_prompts_the_policy_was_tuned_on(capsys, bench, tmp_path):
    from expertflow.tracer.prompts import read_prompts

    seen = [prompt.sha256 for prompt in read_prompts(bench.prompts_file)[:3]]
    evidence = {"prompt_sha256": seen}
    policy = bench.policy_file(tmp_path / "p.json", bench.spec(9), evidence=evidence)

    code, printed, _ = deployed(capsys, bench, policy, "--json")

    assert code == 0
    assert json.loads(printed)["prefill"]["steps"] == 2


def test_verify_writes_a_verdict(capsys, bench, policy, tmp_path):
    out = tmp_path / "verdict.json"

    code, printed, err = ran(
        capsys,
        "verify",
        policy,
        *("--prompts", bench.prompts_file),
        *("--repeats", 1),
        *("--limit", 3),
        *("--max-new-tokens", 4),
        *("--device", "cpu"),
        *("--link", "200MB/s+20us"),
        *("--out", out),
        "--json",
    )

    verdict = from_json(Verdict, json.loads(out.read_text()))
    assert code == (0 if verdict.validated else 5)
    assert json.loads(printed)["summary"] == verdict.summary
    assert len(verdict.runs) >= 5
    assert len({run.label for run in verdict.runs}) == len(verdict.runs)
    for run in verdict.runs:
        assert run.same_tokens
        assert run.log_replays
        checked = {check.quantity: check for check in run.checks}
        # Times may be off on a busy machine; decisions and bytes may not.
        if "gate_lookahead" not in run.label:
            assert checked["hit_rate"].gap == 0
            assert checked["bytes_per_token"].gap == 0
    assert any("emulated" in words for words in verdict.warnings)
    assert "NOT validated" in err or verdict.validated


def test_verify_needs_two_prompts(capsys, bench, policy):
    code, _, err = ran(
        capsys, "verify", policy, "--prompts", bench.prompts_file, "--limit", 1, "--device", "cpu"
    )

    assert code == 2
    assert "at least 2 prompts" in one_sentence(err)


def test_verify_without_repeats_is_refused(capsys, bench, policy):
    code, _, err = ran(capsys, "verify", policy, "--repeats", 0, "--device", "cpu")

    assert code == 2
    assert "--repeats" in one_sentence(err)

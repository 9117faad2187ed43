"""`calibrate`: the runtime's own costs as a file, and forecasts that use it."""

import json

from expertflow.simulator.machine import MACHINE_FORMAT, read_machine

from tests.models import tiny
from tests.runtime.bench import NEW_TOKENS
from tests.runtime.test_commands import one_sentence, ran


def calibrated(capsys, bench, out, *more):
    return ran(
        capsys,
        "calibrate",
        *("--model", tiny()),
        *("--prompts", bench.prompts_file),
        *("--limit", 2),
        *("--max-new-tokens", NEW_TOKENS),
        *("--device", "cpu"),
        *("--out", out),
        *more,
    )


def traced(capsys, bench, out, *more):
    return ran(
        capsys,
        "run",
        *("--model", tiny(), "--prompts", bench.prompts_file, "--out", out),
        *("--max-new-tokens", NEW_TOKENS, "--device", "cpu"),
        *more,
    )


def test_a_calibrated_machine_feeds_forecasts(capsys, bench, tmp_path):
    machine, trace, policy = (tmp_path / name for name in ("machine.json", "trace", "policy.json"))

    code, printed, _ = calibrated(capsys, bench, machine, "--json", "--link", "1GB/s+20us")
    traced(capsys, bench, trace)
    tuned, _, _ = ran(
        capsys, "tune", trace, "--budget", "9slots", "--machine", machine, "--out", policy
    )

    assert code == tuned == 0
    assert json.loads(printed)["format"] == MACHINE_FORMAT
    found = read_machine(machine)
    assert found.link_origin == "emulated"
    assert found.costs.copy_s > 0
    assert found.costs.decode.decision(1, 2, 1) > 0
    tuning = json.loads((tmp_path / "policy.tuning.json").read_text())
    assert tuning["candidates"][0]["link"] == "1GB/s+20us"
    assert "The machine's costs were calibrated with the runtime itself." in tuning["explanation"]
    assert json.loads(policy.read_text())["evidence"]["calibrated"] is True


def test_a_file_of_another_kind_is_no_machine(capsys, bench, tmp_path):
    trace, foreign = tmp_path / "trace", tmp_path / "foreign.json"
    traced(capsys, bench, trace)
    foreign.write_text('{"format": "expertflow.policy/1"}')

    code, _, err = ran(capsys, "simulate", trace, "--machine", foreign)

    assert code == 3
    assert "foreign.json is not a machine file" in one_sentence(err)


def test_a_machine_of_another_model_is_refused(capsys, bench, tmp_path):
    trace, machine = tmp_path / "trace", tmp_path / "machine.json"
    traced(capsys, bench, trace)
    calibrated(capsys, bench, machine)
    document = json.loads(machine.read_text())
    document["shape"]["num_experts"] += 1
    machine.write_text(json.dumps(document))

    code, _, err = ran(capsys, "simulate", trace, "--machine", machine)

    assert code == 3
    one_sentence(err)

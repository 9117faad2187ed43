"""Whatever loads a model under a policy is refused before it is loaded if it cannot fit, by the sums of one plan."""

import json
from dataclasses import replace

import pytest
import torch
from expertflow.runtime import room as rooms
from expertflow.runtime.calibration_room import (
    check_calibrate,
    check_verify,
)
from expertflow.runtime.deploy import RunRequest, deploy
from expertflow.runtime.offloading import offload
from expertflow.runtime.replay import machine as replay_machine
from expertflow.runtime.replay.build import unfilled_model
from expertflow.runtime.replay.machine import ReplayMachine
from expertflow.runtime.replay.room import replay_room
from expertflow.runtime.replay.routing import token_routing
from expertflow.runtime.replay.run import Replay, planned
from expertflow.runtime.replay.shapes import shape_config
from expertflow.runtime.room import check_room, policy_room, room_of, unloaded
from expertflow.runtime.run_size import ONE_TOKEN, in_any_order, largest, served_size
from expertflow.runtime.serving import Load
from expertflow.runtime.serving_calibrate import calibration_of
from expertflow.runtime.serving_deploy import requests_of
from expertflow.simulator.arrivals import Arrival, Arrivals
from expertflow.simulator.policy.spec import PolicyFile, make_spec, read_policy
from expertflow.simulator.serving import ServingSettings
from expertflow.tracer import load as loading
from expertflow.tracer.blocks import HostBlocks
from expertflow.tracer.errors import ResourceError
from expertflow.tracer.generate import Prompt
from expertflow.tracer.main import main
from expertflow.tracer.prompts import batches
from expertflow.tracer.store import Trace
from expertflow.tracer.unloaded import describe
from hypothesis import given
from hypothesis import strategies as st

from tests.families import folder
from tests.models import tiny
from tests.runtime.bench import CPU, NEW_TOKENS

SLOTS = 9
MANY_LAYERS = {"num_hidden_layers": 12, "num_experts": 16}


@pytest.fixture
def policy(bench, tmp_path):
    return bench.policy_file(tmp_path / "policy.json", bench.spec(SLOTS))


@pytest.fixture
def unread(monkeypatch):
    """Reading or drawing a weight is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "_weights", refuse)
    monkeypatch.setattr(replay_machine, "random_blocks", refuse)


def words(command, bench, policy, folder) -> list[str]:
    """A command that runs the tiny model on a few prompts."""
    prompts = ["--prompts", bench.prompts_file, "--max-new-tokens", NEW_TOKENS]
    where = ["--device", "cpu", "--threads", "1"]
    found = {
        "deploy": ["deploy", policy, *prompts],
        "deploy --arrivals": ["deploy", policy, *prompts, "--arrivals", "closed:2"],
        "verify": ["verify", policy, *prompts],
        "verify --arrivals": ["verify", policy, *prompts, "--arrivals", "closed:2"],
        "baselines": ["baselines", "--model", bench.model, *prompts, "--repeats", "1"],
        "calibrate": ["calibrate", "--model", bench.model, *prompts, "--out", folder / "m.json"],
        "calibrate --max-batch": [
            *("calibrate", "--model", bench.model, *prompts, "--out", folder / "m.json"),
            *("--max-batch", "2"),
        ],
        "replay": [
            *("replay", bench.model, "--trace", bench.folder / "trace-1", "--slots", SLOTS),
            *("--new-tokens", "3"),
        ],
    }[command]
    return [str(word) for word in (*found, *where)]


COMMANDS = (
    "deploy",
    "deploy --arrivals",
    "verify",
    "verify --arrivals",
    "baselines",
    "calibrate",
    "calibrate --max-batch",
    "replay",
)


def ran(capsys, command: list[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(command)
    torch.set_num_threads(1)
    streams = capsys.readouterr()
    return int(stop.value.code or 0), streams.out, streams.err


def request_of(bench, **more) -> RunRequest:
    return RunRequest(
        **{
            "model": str(bench.model),
            "prompts": bench.prompts_file,
            "max_new_tokens": NEW_TOKENS,
            "device": "cpu",
            **more,
        }
    )


# --- before any weight is read -------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_device_cannot_hold_is_refused_before_a_weight_is_read(
    capsys, monkeypatch, bench, policy, tmp_path, unread, command
):
    monkeypatch.setattr(rooms, "free_bytes", lambda device: 50_000)

    code, out, err = ran(capsys, words(command, bench, policy, tmp_path))

    assert code == 4, err
    assert out == ""
    assert "non expert weights 107 KB" in err
    assert "50 KB may be used" in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("m.json"))


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_host_cannot_hold_is_refused_before_a_weight_is_read(
    capsys, monkeypatch, bench, policy, tmp_path, unread, command
):
    monkeypatch.setattr(rooms, "available_host_bytes", lambda: 50_000)

    code, out, err = ran(capsys, words(command, bench, policy, tmp_path))

    assert code == 4, err
    assert out == ""
    assert "host memory" in err
    assert "50 KB may be used" in err


def test_offload_is_refused_before_a_weight_is_read(monkeypatch, bench, policy, unread):
    with pytest.raises(ResourceError, match=r"9 slots do not fit.*10 KB may be used"):
        offload(str(bench.model), policy, device="cpu", memory="10KB")

    monkeypatch.setattr(rooms, "available_host_bytes", lambda: 50_000)
    with pytest.raises(ResourceError, match="host memory"):
        offload(str(bench.model), policy, device="cpu")


# --- to the byte ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "option", "few"),
    [
        ("deploy", "--memory", ["--no-check", "--json"]),
        ("deploy --arrivals", "--vram", ["--no-check", "--json"]),
        ("replay", "--memory", ["--no-predict", "--json"]),
    ],
)
def test_a_budget_holds_the_run_it_is_the_sum_of_and_one_byte_less_does_not(
    capsys, monkeypatch, bench, policy, tmp_path, command, option, few
):
    asked = [*words(command, bench, policy, tmp_path), *few]
    need = needed(capsys, monkeypatch, asked)

    code, _, err = ran(capsys, [*asked, option, f"{need - 1}B"])
    assert code == 4
    assert "may be used" in err

    code, out, err = ran(capsys, [*asked, option, f"{need}B"])
    assert code == 0, err
    if "--json" in few:
        assert 0 < sum(json.loads(out)["memory"].values()) <= need


def needed(capsys, monkeypatch, asked: list[str]) -> int:
    """Device bytes that a command's own check comes to."""
    found: list[int] = []

    def noted(room, slots, *words):
        found.append(room.needs.plan(slots).device_bytes)
        raise ResourceError("enough is known")

    with monkeypatch.context() as patched:
        patched.setattr(rooms.Room, "require", noted)
        patched.setattr(rooms.Room, "require_all", noted)
        assert ran(capsys, asked)[0] == 4
    [need] = found
    return need


def test_an_offloaded_model_answers_in_the_memory_it_was_declared(bench, policy):
    request = request_of(bench)
    room = policy_room(read_policy(policy), request, ONE_TOKEN)
    need = room.needs.plan(SLOTS).device_bytes

    with pytest.raises(ResourceError, match="--budget 8slots"):
        offload(str(bench.model), policy, device="cpu", memory=f"{need - 1}B")
    model = offload(str(bench.model), policy, device="cpu", memory=f"{need}B")

    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2).shape == (1, 5)
    model.expertflow.close()


# --- verify and calibrate ------------------------------------------------------------------------


def test_verify_counts_the_resident_model_and_says_so(bench, policy):
    chosen = read_policy(policy)
    request = request_of(bench)
    everything = bench.shape.total_experts * bench.shape.expert_bytes
    room = policy_room(chosen, request)
    whole = room.needs.plan(bench.shape.total_experts).device_bytes

    check_verify(chosen, replace(request, memory=f"{whole}B"))
    with pytest.raises(ResourceError) as refused:
        check_verify(chosen, replace(request, memory=f"{whole - 1}B"))
    check_room(chosen, replace(request, memory=f"{whole - 1}B"))  # the run alone fits

    said = str(refused.value)
    assert "resident model for reference" in said
    assert f"slots {everything / 1000:.0f} KB" in said
    assert "Use `deploy`, which takes the policy's 9 slots" in said
    assert "--budget" not in said  # a smaller policy would not help


def test_verify_is_refused_in_time_where_weights_would_take_nearly_all_that_is_free(
    monkeypatch, bench, policy
):
    """Placement keeps some of what is free for working tensors, and would say so after loading."""
    monkeypatch.setattr(
        "expertflow.runtime.calibration_room.choose_residency", lambda *asked: "stream"
    )

    with pytest.raises(ResourceError, match="too little is free beside them"):
        check_verify(read_policy(policy), request_of(bench))


def test_calibration_takes_the_slots_that_fit(bench):
    request = request_of(bench)
    model = str(bench.model)
    found = unloaded(model, request)
    size = largest(sorted(bench.prompts, key=lambda one: len(one.token_ids)), 1, NEW_TOKENS)
    needs = room_of(found, size, request).needs

    def fitting(device_bytes: int) -> int:
        return check_calibrate(replace(request, memory=f"{device_bytes}B"), model)

    assert check_calibrate(request, model) == bench.shape.total_experts
    for slots in (1, SLOTS, bench.shape.total_experts):
        need = needs.plan(slots).device_bytes
        assert needs.plan(fitting(need)).device_bytes <= need
        assert fitting(need) >= slots
    with pytest.raises(ResourceError, match="Not even one slot fits"):
        fitting(needs.plan(1).device_bytes - 1)


@pytest.mark.parametrize("serves", [None, 2])
def test_a_machine_too_small_for_the_model_is_calibrated_within_its_room(bench, serves):
    calibration = calibration_of(
        bench.machine, bench.prompts[:4], request_of(bench), serves=serves, slots=SLOTS
    )

    costs = calibration.measure(lambda _: None)

    assert max(spec.slots for spec in calibration.specs) == SLOTS < bench.shape.total_experts
    assert costs.copy_s > 0
    assert costs.decode.experts(1, 1, 2, 0, 0, 0) > 0
    assert calibration.measure_cpu().weights > (0.0, 0.0)


# --- baselines -----------------------------------------------------------------------------------


def test_baselines_that_do_not_fit_are_left_out_and_the_others_run(capsys, bench, policy, tmp_path):
    request = request_of(bench)
    room = policy_room(read_policy(policy), request)
    need = room.needs.plan(12).device_bytes

    code, out, err = ran(
        capsys,
        [*words("baselines", bench, policy, tmp_path), "--memory", f"{need}B", "--json"],
    )

    report = json.loads(out)
    assert code == 0, err
    assert set(report["skipped"]) == {"stock", "resident"}
    assert "keeps every expert on the device" in report["skipped"]["stock"]
    assert {"lru", "on_demand", "whole_layer"} <= set(report["results"])
    assert all(one["same_tokens"] for one in report["results"].values())


# --- what really fits is not refused -------------------------------------------------------------


def policy_for(model: str, slots: int) -> PolicyFile:
    shape = describe(model, device=CPU).shape
    spec = make_spec(slots=slots)
    return PolicyFile(
        behaviour=spec,
        behaviour_hash=spec.behaviour_hash(),
        shape=shape,
        budget=f"{slots}slots",
        trace="none",
    )


@pytest.mark.parametrize(
    ("family", "tier"), [("switch_transformers", "ram"), ("nllb_moe", "disk"), ("olmoe", "disk")]
)
def test_a_run_keeps_to_the_plan_that_let_it_in(bench, family, tier):
    """Encoder-decoder models among them, whose prompts pass another half of the model."""
    model = str(tiny(family)) if family == "olmoe" else str(folder(family))
    policy = policy_for(model, 8)
    request = request_of(bench, model=model, tier=tier, batch_size=2, limit=4)
    need = policy_room(policy, request).needs.plan(8).device_bytes

    result = deploy(policy, replace(request, memory=f"{need}B"), say=lambda _: None)

    assert result.same_tokens is True
    assert result.peak_device_bytes <= need < 3 * result.peak_device_bytes
    with pytest.raises(ResourceError):
        check_room(policy, replace(request, memory=f"{need - 1}B"))


def test_a_host_that_cannot_hold_the_experts_runs_them_from_disk(monkeypatch, bench, tmp_path):
    """The way out that the refusal names is one."""
    model = str(tiny("olmoe", **MANY_LAYERS))
    policy = policy_for(model, 24)
    request = request_of(bench, model=model, limit=2)
    on_disk = replace(request, tier="disk")
    plan = policy_room(policy, on_disk).needs.plan(24)
    assert plan.host_bytes < plan.total_experts * plan.expert_bytes
    monkeypatch.setattr(rooms, "available_host_bytes", lambda: plan.host_bytes)

    with pytest.raises(ResourceError, match="host memory"):
        deploy(policy, request, say=lambda _: None)
    result = deploy(policy, on_disk, say=lambda _: None)

    assert result.same_tokens is True


def replay_of(bench, model=None):
    loaded = unfilled_model(
        shape_config(str(model or bench.model)), name="tiny", dtype=torch.float32
    )
    routing = token_routing(Trace.open(bench.folder / "trace-1"))
    return loaded, planned(loaded, routing, limit=3, new_tokens=3, prompt_tokens=8)


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_a_replay_draws_in_the_host_memory_that_its_experts_take(monkeypatch, bench, tier):
    loaded, plan = replay_of(bench)
    needs = replay_room(loaded, plan, CPU, tier=tier).needs
    experts = loaded.shape.total_experts * loaded.shape.expert_bytes
    least = needs.plan(1).host_bytes
    assert least == needs.plan(1).device_bytes + (experts if tier == "ram" else 0)

    monkeypatch.setattr(rooms, "available_host_bytes", lambda: least)
    machine = ReplayMachine(loaded, plan, CPU, tier=tier)
    drawn: HostBlocks = machine.blocks
    machine.close()
    monkeypatch.setattr(rooms, "available_host_bytes", lambda: least - 1)

    assert drawn.tier == tier
    with pytest.raises(ResourceError, match="host memory"):
        ReplayMachine(*replay_of(bench), CPU, tier=tier)


def test_a_replay_on_a_device_of_its_own_takes_no_host_memory_but_for_the_experts(bench):
    loaded, plan = replay_of(bench)
    shape = loaded.shape
    found = replace(replay_room(loaded, plan, CPU).needs, is_host=False)

    assert found.plan(4).host_bytes == shape.total_experts * shape.expert_bytes
    assert replace(found, on_disk=True).plan(4).host_bytes == 0


def test_a_replay_is_calibrated_with_the_slots_that_fit(bench):
    loaded, plan = replay_of(bench)
    machine = ReplayMachine(loaded, plan, CPU)
    try:
        forecaster, calibration = Replay(machine, batch_size=1, slots=SLOTS).forecaster(
            lambda _: None
        )
        forecast = forecaster.predict(make_spec(slots=SLOTS))
    finally:
        machine.close()

    assert max(spec.slots for spec in calibration.specs) == SLOTS
    assert forecast.tokens_per_s > 0


# --- sizes ---------------------------------------------------------------------------------------

_PROMPTS = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(
    lambda lengths: [Prompt(n, (7,) * length) for n, length in enumerate(lengths)]
)


def _longest(prompts):
    return max(len(prompt.token_ids) for prompt in prompts)


@given(_PROMPTS, st.integers(1, 5), st.integers(1, 50), st.integers(1, 3))
def test_no_pass_is_larger_than_the_largest(prompts, batch_size, new_tokens, together):
    size = largest(prompts, batch_size, new_tokens, together=together)
    passes = [len(batch) * _longest(batch) for batch in batches(prompts, batch_size)]
    caches = [
        len(unit) * (_longest(unit) + new_tokens)
        for unit in batches(prompts, batch_size * together)
    ]

    assert size.tokens == max(passes)
    assert size.sequences * size.context == max(caches)


@given(_PROMPTS, st.integers(1, 5), st.integers(1, 9), st.randoms(), st.integers(0, 11))
def test_some_of_the_prompts_in_another_order_are_no_larger(prompts, batch_size, new, draw, left):
    bound = in_any_order(prompts, batch_size, new)
    some = draw.sample(prompts, max(1, len(prompts) - left))

    found = largest(some, batch_size, new)

    assert found.tokens <= bound.tokens
    assert found.sequences * found.context <= bound.sequences * bound.context


@given(_PROMPTS, st.integers(1, 5), st.integers(8, 60), st.integers(1, 9), st.randoms(), st.data())
def test_requests_in_progress_hold_no_more_than_was_planned(
    prompts, max_batch, step, new_tokens, draw, data
):
    settings = ServingSettings(max_batch=max_batch, max_step_tokens=step)
    arrivals = Arrivals(requests=(Arrival(0.0),) * len(prompts), description="all at once")
    load: Load = requests_of(prompts, arrivals, settings, new_tokens)
    size = served_size(load)
    some = draw.sample(prompts, min(max_batch, len(prompts)))
    fed = [data.draw(st.integers(1, len(prompt.token_ids))) for prompt in some]

    assert size.sequences * size.context >= sum(len(p.token_ids) + new_tokens for p in some)
    assert size.tokens >= min(step, sum(fed))
    assert size.tokens >= len(some)

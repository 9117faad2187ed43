"""Misses computed on the CPU: the same text and, where the CPU is the device, the same bits."""

import json
import threading

import pytest
import torch
from expertflow.runtime.calibrate import Calibration
from expertflow.runtime.cpu_experts import CpuWork
from expertflow.runtime.cpu_times import fit_cpu_expert
from expertflow.runtime.fake import FaultyBlocks
from expertflow.runtime.machine import generate_all
from expertflow.runtime.session import Session
from expertflow.simulator.machine import read_machine
from expertflow.simulator.policy.replay import replay
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.result import MemoryResult
from expertflow.tracer.blocks import HostBlocks
from expertflow.tracer.generate import Prompt
from expertflow.tracer.load import load_model
from expertflow.tracer.main import main
from expertflow.tracer.schema import WHOLE_STEP
from expertflow.tracer.timing import StepInfo

from tests.models import FAMILIES, tiny
from tests.runtime.bench import CPU, NEW_TOKENS, SIZES, SLOW

NO_MEMORY = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)
TIMES = {"copy_s": 2.0, "expert_s": 0.9, "token_s": 0.3}
"""Declared: one copy costs as much as an expert with three or four tokens on the CPU."""
ANSWERS = ("cpu", "sooner")
SLOTS = (2, 8, 13, 24)


def spec_of(bench, slots, answer, cache="lru", predictor="none"):
    return bench.spec(slots, cache, "global", predictor, misses=answer, cpu_times=TIMES)


def ran(bench, spec, size, link=None):
    bench.machine.link = link
    try:
        with bench.machine.session(spec) as session:
            outputs = generate_all(
                bench.loaded,
                bench.prompts,
                observer=session,
                batch_size=size,
                max_new_tokens=NEW_TOKENS,
            )
            return [one.token_ids for one in outputs], session.log, session.take_steps()
    finally:
        bench.machine.link = None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(
    ("answer", "cache"), [("cpu", "static"), ("cpu", "lru"), ("sooner", "lru")]
)
def test_text_and_decisions_are_the_residents_and_the_simulators(bench, answer, cache, slots, size):
    spec = spec_of(bench, slots, answer, cache)

    texts, log, _ = ran(bench, spec, size)

    assert texts == bench.resident[size]
    assert replay(log, spec, bench.shape).is_exact
    assert log == bench.simulated(spec, size)
    assert slots > 13 or any(entry.detail == "cpu" for entry in log)


@pytest.mark.parametrize("answer", ANSWERS)
def test_text_holds_with_prefetches_that_come_late(bench, answer):
    spec = spec_of(bench, 12, answer, predictor="gate_lookahead")

    texts, log, _ = ran(bench, spec, 1, SLOW)

    assert texts == bench.resident[1]
    assert replay(log, spec, bench.shape).is_exact
    assert {"cpu", "prefetch"} <= {entry.detail for entry in log}


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_logits_are_the_stock_kernels_to_the_last_bit(family, dtype, implementation):
    loaded = load_model(str(tiny(family)), device=CPU, dtype=dtype, implementation=implementation)
    ids = torch.arange(40, 52)[None]
    with torch.inference_mode():
        stock = loaded.model(ids).logits
    blocks = HostBlocks(loaded.layers)
    for answer in ANSWERS:
        spec = make_spec(slots=5, misses=answer, allocation="global", cpu_times=TIMES)
        session = Session(loaded, blocks, spec, CPU)
        session.begin_step(StepInfo(step=0, phase="prefill", batch=1, tokens=12, context=12))
        with torch.inference_mode():
            offloaded = loaded.model(ids).logits
        session.end_step()
        session.close()

        assert torch.equal(offloaded, stock), (answer, (offloaded - stock).abs().max())
        assert any(entry.detail == "cpu" for entry in session.log)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_text(family):
    loaded = load_model(str(tiny(family)), device=CPU)
    prompts = [Prompt(0, (40, 41, 42, 43)), Prompt(1, (90, 91))]
    resident = generate_all(loaded, prompts, batch_size=2, max_new_tokens=4)
    blocks = HostBlocks(loaded.layers)
    for answer in ANSWERS:
        session = Session(loaded, blocks, make_spec(slots=3, misses=answer, cpu_times=TIMES), CPU)
        outputs = generate_all(loaded, prompts, batch_size=2, max_new_tokens=4, observer=session)
        session.close()

        assert [g.token_ids for g in outputs] == [g.token_ids for g in resident]
        assert any(entry.detail == "cpu" for entry in session.log)


@pytest.fixture(scope="module")
def counted(bench):
    spec = spec_of(bench, 8, "sooner")
    record, _ = bench.machine.run(
        spec, bench.prompts, batch_size=4, max_new_tokens=NEW_TOKENS, memory=NO_MEMORY
    )
    return record, bench.machine.result(record, spec, batch_size=4)


def test_time_of_the_cpu_is_in_the_account_and_the_account_adds_up(counted):
    record, result = counted
    time = result.time
    waited = sum(
        s
        for s, layer in zip(record.steps["cpu_s"], record.steps["layer"], strict=True)
        if layer != WHOLE_STEP
    )
    laps = ("mixer_s", "experts_s", "stall_s", "decision_s", "readback_s", "lookahead_s", "cpu_s")

    assert time.cpu_s == pytest.approx(waited)
    assert time.cpu_s > 0
    assert sum(getattr(time, lap) for lap in laps) + time.other_s == pytest.approx(time.total_s)
    assert time.other_s >= -1e-6


def test_only_what_is_loaded_crosses_the_link(counted, bench):
    record, result = counted
    told = [entry.detail for entry in record.log if entry.kind == "event"]
    crossed = [copy for copy in record.copies if copy.why == "demand"]

    assert told.count("cpu") > 0
    assert len(crossed) == told.count("miss")
    assert result.prefill.misses + result.decode.misses == told.count("miss") + told.count("cpu")


def test_policies_that_load_have_no_such_thread_and_no_such_time(bench):
    _, _, steps = ran(bench, bench.spec(8), 1)
    before = threading.active_count()
    with bench.machine.session(spec_of(bench, 8, "cpu")) as session:
        generate_all(
            bench.loaded, bench.prompts[:1], observer=session, batch_size=1, max_new_tokens=2
        )
        during = threading.active_count()

    assert "cpu_s" not in steps
    assert (during - before, threading.active_count() - before) == (2, 0)


def test_failure_on_the_cpu_is_raised_and_leaves_the_session_usable(bench):
    is_broken = True
    blocks = FaultyBlocks(bench.machine.blocks, lambda key: is_broken and key.layer == 1)
    spec = spec_of(bench, 8, "cpu")
    session = Session(bench.loaded, blocks, spec, CPU)
    try:
        with pytest.raises(RuntimeError):
            generate_all(
                bench.loaded, bench.prompts, observer=session, batch_size=1, max_new_tokens=2
            )
        # What was once looked for there is not looked for again, so only the other layers can be told.
        assert any(entry.kind == "release" and entry.layer == 1 for entry in session.log)
        assert replay(session.log, spec, bench.shape).is_exact
    finally:
        session.close()

    texts, _, _ = ran(bench, spec, 1)
    assert texts == bench.resident[1]


def test_cost_of_an_expert_is_found_again_from_its_events():
    work = [CpuWork(n, p, 1e-3 * n + 2e-4 * p) for n, p in [(1, 1), (2, 2), (2, 9), (5, 40)]]
    noisy = [*work * 5, CpuWork(2, 2, 0.5)]

    assert fit_cpu_expert(noisy).weights == pytest.approx((1e-3, 2e-4))
    assert fit_cpu_expert([]).weights == (0.0, 0.0)


@pytest.mark.parametrize("seconds", [(1e-3, 0.5e-3), (1e-3, 9e-3)])
def test_cost_is_never_negative(seconds):
    weights = fit_cpu_expert([CpuWork(1, 1, seconds[0]), CpuWork(1, 2, seconds[1])]).weights

    assert min(weights) >= 0
    assert max(weights) > 0


def test_measured_costs_choose_between_link_and_cpu(bench):
    calibration = Calibration(bench.machine, bench.prompts, batch_size=1, max_new_tokens=NEW_TOKENS)
    measured = calibration.measure_cpu()
    expert_s, token_s = measured.weights

    def share_on_cpu(copy_s: float) -> float:
        times = {"copy_s": copy_s, "expert_s": expert_s, "token_s": token_s}
        spec = bench.spec(8, "lru", "global", misses="sooner", cpu_times=times)
        texts, log, _ = ran(bench, spec, 1)
        assert texts == bench.resident[1]
        told = [entry.detail for entry in log]
        return told.count("cpu") / (told.count("cpu") + told.count("miss"))

    assert measured(1, 1) > 0
    assert share_on_cpu(1e-9) == 0
    assert share_on_cpu(1.0) > 0.8


def test_calibrate_writes_what_the_cpu_takes_if_asked(bench, tmp_path, capsys):
    out = tmp_path / "machine.json"
    command = [
        "calibrate",
        "--out",
        str(out),
        "--model",
        str(bench.model),
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    short = ["--prompts", str(bench.prompts_file), "--limit", "2", "--max-new-tokens", "3"]
    with pytest.raises(SystemExit) as stop:
        main([*command, *short, "--cpu-experts"])

    assert stop.value.code == 0
    assert "one expert on the CPU" in capsys.readouterr().out
    assert read_machine(out).costs.has_cpu
    assert json.loads(out.read_text())["costs"]["cpu_expert"]["weights"] == list(
        read_machine(out).costs.cpu_expert.weights
    )

"""The same promises on a CUDA device, and what only it has: pinned blocks, streams, its own memory.

Run by `make gpu`; skipped where torch sees no device.
"""

import itertools
import time

import pytest
import torch
from expertflow.runtime.machine import Machine, generate_all
from expertflow.simulator.policy.replay import replay
from expertflow.tracer.blocks import HostBlocks, SlotArena
from expertflow.tracer.check import check_trace
from expertflow.tracer.copies import Copy, CudaCopyEngine, copy_engine
from expertflow.tracer.link import measure_link
from expertflow.tracer.load import load_model
from expertflow.tracer.memory import PeakMeter
from expertflow.tracer.schema import WHOLE_STEP
from expertflow.tracer.store import Trace
from expertflow.tracer.types import ExpertKey

from tests.models import FAMILIES, tiny
from tests.runtime.bench import ALLOCATIONS, CACHES, NEW_TOKENS, PREDICTORS, SIZES, Bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda", 0)
MIB = 2**20


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def bench(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"cuda-{request.param}")
    made = Bench(folder, device=CUDA, dtype=request.param)
    yield made
    made.close()


@pytest.fixture
def engine():
    made = copy_engine(CUDA, time.perf_counter, pinned=True)
    yield made
    made.close()


def copied(size: int, number: int, why="demand", target=None) -> Copy:
    generator = torch.Generator().manual_seed(number)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).pin_memory()
    if target is None:
        target = torch.zeros(size, dtype=torch.uint8, device=CUDA)
    return Copy(ExpertKey(0, number), source, target, why, step=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slots", [1, 2, 3, 8, 12, 24])
def test_text_is_the_residents_and_the_log_replays(bench, slots, size):
    for cache, allocation, predictor in itertools.product(CACHES, ALLOCATIONS, PREDICTORS):
        run = bench.run(slots, cache, allocation, predictor, size)
        report = replay(run.log, bench.spec(slots, cache, allocation, predictor), bench.shape)

        assert run.texts == bench.resident[size], (cache, allocation, predictor)
        assert report.is_exact, (cache, allocation, predictor, report.first_difference)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slots", [1, 3, 8, 12, 24])
def test_simulated_log_of_the_same_routing_is_the_real_one(bench, slots, size):
    for cache, allocation in itertools.product(CACHES, ALLOCATIONS):
        real = bench.run(slots, cache, allocation, "none", size).log

        assert real == bench.simulated(bench.spec(slots, cache, allocation), size), cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_residents_text(family, dtype):
    from expertflow.simulator.policy.spec import make_spec
    from expertflow.tracer.generate import Prompt

    loaded = load_model(str(tiny(family)), device=CUDA, dtype=dtype)
    loaded.model.to(CUDA)
    prompts = [Prompt(0, (40, 41, 42, 43)), Prompt(1, (90, 91))]
    resident = generate_all(loaded, prompts, batch_size=2, max_new_tokens=4)
    machine = Machine(loaded, CUDA)
    try:
        for slots in (2, 2 * loaded.shape.num_moe_layers, loaded.shape.total_experts):
            with machine.session(make_spec(slots=slots)) as session:
                outputs = generate_all(
                    loaded, prompts, batch_size=2, max_new_tokens=4, observer=session
                )
            assert [g.token_ids for g in outputs] == [g.token_ids for g in resident]
    finally:
        machine.close()


def test_a_traced_run_on_the_device_is_sound(bench):
    trace = Trace.open(bench.folder / "trace-1")

    check_trace(trace.path)
    table = trace.table("steps").to_pandas()
    layers = table[table.layer != WHOLE_STEP]
    laps = ["mixer_s", "readback_s", "decision_s", "lookahead_s", "stall_s", "experts_s"]
    assert (table[laps] >= 0).all().all()
    assert (layers.experts_s > 0).all()
    assert trace.hardware.device.startswith("cuda")


def test_blocks_are_pinned_at_their_exact_size():
    loaded = load_model(str(tiny("olmoe", intermediate_size=48)), device=CUDA)

    blocks = HostBlocks(loaded.layers, pin=True)

    assert blocks.pinned
    assert blocks.num_bytes == loaded.shape.total_experts * loaded.shape.expert_bytes
    assert blocks.buffer.untyped_storage().nbytes() == blocks.num_bytes
    assert blocks.buffer.is_pinned()
    blocks.close()
    assert not blocks.pinned
    blocks.close()


def test_every_block_reaches_its_slot(engine):
    loaded = load_model(str(tiny("gpt_oss")), device=CUDA)
    blocks = HostBlocks(loaded.layers, pin=True)
    experts = range(loaded.shape.num_experts)
    arena = SlotArena(blocks.layout, len(experts), CUDA)
    copies = [
        Copy(ExpertKey(1, e), blocks.block(ExpertKey(1, e)), arena.slot(e), "demand", 0)
        for e in experts
    ]

    engine.submit(copies)
    engine.wait(copies)

    for e in experts:
        assert torch.equal(arena.slot(e).cpu(), blocks.block(ExpertKey(1, e)))
    engine.close()
    blocks.close()


def test_compute_waits_for_the_copies_it_needs(engine):
    copies = [copied(64 * MIB, n) for n in range(3)]

    engine.submit(copies)
    engine.wait(copies)
    sums = [copy.target.sum(dtype=torch.int64) for copy in copies]  # queued, not synchronised

    assert [int(s) for s in sums] == [int(c.source.sum(dtype=torch.int64)) for c in copies]


def test_copies_wait_for_the_compute_that_still_reads_their_slot(engine):
    slot = torch.ones(64 * MIB, dtype=torch.uint8, device=CUDA)
    matrix = torch.rand(4096, 4096, device=CUDA)
    torch.cuda.synchronize()
    for _ in range(20):
        matrix = matrix @ matrix / 4096
    before = slot.sum(dtype=torch.int64)

    copy = copied(64 * MIB, 7, target=slot)
    engine.submit([copy])
    engine.wait([copy])
    after = slot.sum(dtype=torch.int64)

    assert int(before) == 64 * MIB
    assert int(after) == int(copy.source.sum(dtype=torch.int64))


def test_last_copy_into_a_slot_wins_over_a_cancelled_prefetch(engine):
    prefetch = copied(128 * MIB, 1, "prefetch")
    urgent = copied(128 * MIB, 2, target=prefetch.target)

    engine.submit([prefetch])
    engine.cancel(prefetch)
    engine.submit([urgent])
    engine.wait([urgent])

    assert torch.equal(prefetch.target.cpu(), urgent.source)
    torch.cuda.synchronize()
    assert engine.finished() == []


def test_finished_reports_prefetches_once(engine):
    copies = [copied(MIB, n, "prefetch" if n else "demand") for n in range(4)]

    engine.submit(copies)
    torch.cuda.synchronize()

    assert [copy.key.expert for copy in engine.finished()] == [1, 2, 3]
    assert engine.finished() == []


def test_records_have_times_on_the_runs_clock(engine):
    before = time.perf_counter()
    copies = [copied(16 * MIB, n) for n in range(3)]

    engine.submit(copies)
    engine.wait(copies)
    records = engine.take_records()
    after = time.perf_counter()

    assert isinstance(engine, CudaCopyEngine)
    assert [copy.key.expert for copy in records] == [0, 1, 2]
    slack = 2e-3  # two clocks, matched once
    for copy in records:
        assert before - slack <= copy.start_s < copy.end_s <= after + slack
        assert copy.end_s - copy.start_s > 16 * MIB / 1e12
    assert engine.take_records() == []


def test_peak_of_working_tensors_comes_from_the_allocator():
    kept = torch.zeros(8 * MIB, dtype=torch.uint8, device=CUDA)
    with PeakMeter(CUDA) as meter:
        big = torch.zeros(64 * MIB, dtype=torch.uint8, device=CUDA)
        del big
        first = meter.take_peak()
        small = torch.zeros(16 * MIB, dtype=torch.uint8, device=CUDA)
        second = meter.take_peak()

    assert first == pytest.approx(64 * MIB, abs=2 * MIB)
    assert second == pytest.approx(16 * MIB, abs=2 * MIB)
    assert kept.numel() + small.numel() == 24 * MIB


@pytest.mark.parametrize("slots", [1, 8, 24])
def test_peak_memory_is_what_the_allocator_held(bench, slots):
    spec = bench.spec(slots)
    torch.cuda.synchronize()

    memory = bench.machine.peak_memory(spec, bench.prompts, 1)

    assert memory.slots == slots * bench.shape.expert_bytes
    assert memory.non_expert_weights == bench.shape.non_expert_bytes
    assert memory.activations > 0
    with bench.machine.session(spec) as session:
        torch.cuda.reset_peak_memory_stats(CUDA)
        generate_all(
            bench.loaded,
            bench.prompts,
            observer=session,
            batch_size=1,
            max_new_tokens=NEW_TOKENS,
        )
        held = torch.cuda.max_memory_allocated(CUDA)
    # The allocator rounds each of a tiny model's tensors up to 512 bytes, and keeps workspaces.
    assert held >= 0.5 * memory.peak_device_bytes
    assert memory.peak_device_bytes <= 1.5 * held


def test_link_is_measured_pinned_and_not_idle_and_busy():
    profile = measure_link(CUDA, time.perf_counter, block_bytes=16 * MIB, repeats=5)

    kinds = {(curve.pinned, curve.busy) for curve in profile.curves}
    pinned = profile.curve(pinned=True, busy=False)
    assert kinds == set(itertools.product((True, False), repeat=2))
    assert profile.origin == "measured"
    assert all(seconds > 0 for curve in profile.curves for _, seconds in curve.points)
    assert 16 * MIB / pinned.copy_s(16 * MIB) > 1e9
    assert pinned.copy_s(64 * MIB) > pinned.copy_s(4 * MIB)

"""Sessions, machines and their numbers: what is counted, what is refused, what is given back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from expertflow.runtime.machine import Machine, generate_all
from expertflow.runtime.session import Session
from expertflow.simulator.outcomes import prefetch_outcomes
from expertflow.simulator.policy.registry import caches
from expertflow.simulator.policy.spec import Member, check_shape
from expertflow.simulator.result import MemoryResult
from expertflow.tracer.blocks import HostBlocks
from expertflow.tracer.errors import PolicyError, UsageError
from expertflow.tracer.generate import Prompt
from expertflow.tracer.load import load_model
from expertflow.tracer.schema import WHOLE_STEP

from tests.models import FAMILIES, tiny
from tests.runtime.bench import CPU, NEW_TOKENS, SLOW, deployable

NO_MEMORY = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)


def measured(bench, spec, *, size=1, link=None, memory=NO_MEMORY):
    bench.machine.link = link
    try:
        record, outputs = bench.machine.run(
            spec, bench.prompts, batch_size=size, max_new_tokens=NEW_TOKENS, memory=memory
        )
        return record, outputs, bench.machine.result(record, spec, batch_size=size)
    finally:
        bench.machine.link = None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_residents_text_from_few_slots(family):
    loaded = load_model(str(tiny(family)), device=CPU)
    prompts = [Prompt(0, (40, 41, 42, 43)), Prompt(1, (90, 91))]
    resident = generate_all(loaded, prompts, batch_size=2, max_new_tokens=4)
    blocks = HostBlocks(loaded.layers)
    from expertflow.simulator.policy.spec import make_spec

    for spec in (
        make_spec(slots=2),
        make_spec(slots=2 * loaded.shape.num_moe_layers, predictor="gate_lookahead"),
    ):
        session = Session(loaded, blocks, spec, CPU)
        outputs = generate_all(loaded, prompts, batch_size=2, max_new_tokens=4, observer=session)
        session.close()

        assert [g.token_ids for g in outputs] == [g.token_ids for g in resident]
    blocks.close()


@pytest.mark.parametrize(("family", "member"), [("cache", "belady"), ("predictor", "oracle")])
def test_members_that_know_the_future_are_refused_in_a_sentence(bench, family, member):
    spec = replace(bench.spec(8), **{family: Member(name=member)})

    with pytest.raises(UsageError, match=rf"{member}.*bound.*cannot be deployed.*\.$"):
        bench.machine.session(spec).__enter__()

    assert bench.loaded.model.config._experts_implementation == "grouped_mm"


def test_log_holds_the_tokens_of_each_expert_and_which_passes_are_prefill(bench):
    record, _, _ = measured(bench, bench.spec(8), size=4)
    columns = record.steps
    demanded = [entry for entry in record.log if entry.kind == "event"]

    sizes = {
        (step, layer): (tokens * bench.shape.top_k, phase == "prefill")
        for step, layer, tokens, phase in zip(
            *(columns[name] for name in ("step", "layer", "tokens", "phase")), strict=True
        )
    }
    for place in {(entry.step, entry.layer) for entry in demanded}:
        own = [entry for entry in demanded if (entry.step, entry.layer) == place]
        told = (sum(entry.tokens for entry in own), own[0].is_prefill)
        assert told == sizes[place]
    assert {entry.is_prefill for entry in demanded} == {True, False}
    assert {entry.weight for entry in demanded} == {-1.0}


@pytest.mark.parametrize(
    "cache", [name for name in deployable(caches) if "gate_weights" in caches.get(name).needs]
)
def test_caches_that_weigh_experts_are_told_what_the_router_gave_them(bench, cache):
    record, _, _ = measured(bench, bench.spec(8, cache))
    demanded = [entry for entry in record.log if entry.kind == "event"]

    assert all(0 <= entry.weight <= entry.tokens for entry in demanded)
    assert len({entry.weight for entry in demanded}) > 10


def test_predictor_that_needs_gates_is_refused_without_them(bench):
    layers = [replace(layer, gate=None) for layer in bench.loaded.layers]
    gateless = replace(bench.loaded, layers=layers)

    with pytest.raises(UsageError, match="Choose predictor none"):
        Session(gateless, bench.machine.blocks, bench.spec(8, predictor="gate_lookahead"), CPU)


@pytest.mark.parametrize("slots", [0, -3])
def test_policy_without_slots_is_refused(bench, slots):
    with pytest.raises(UsageError, match="at least 1 slot"):
        Session(bench.loaded, bench.machine.blocks, bench.spec(slots), CPU)


@pytest.mark.parametrize(
    "changes", [{"num_experts": 9}, {"top_k": 1}, {"moe_layers": (0, 1, 2, 3)}]
)
def test_policy_for_another_shape_is_refused_with_what_differs(bench, changes):
    foreign = replace(bench.shape, model_id="other", **changes)

    with pytest.raises(PolicyError, match=r"made for other .*Tune on a trace of this model"):
        check_shape(foreign, bench.shape)


def test_policy_for_the_same_shape_of_another_name_is_taken(bench):
    check_shape(replace(bench.shape, model_id="copy", expert_bytes=1), bench.shape)


def test_closing_gives_the_stock_function_back(bench):
    with bench.machine.session(bench.spec(5)):
        during = bench.loaded.model.config._experts_implementation

    assert during == "expertflow"
    assert bench.loaded.model.config._experts_implementation == "grouped_mm"
    for layer in bench.loaded.layers:
        assert not any("expertflow" in name for name in vars(layer.module))


def test_failure_in_a_run_gives_the_stock_function_back(bench):
    with pytest.raises(RuntimeError, match="stop"), bench.machine.session(bench.spec(5)):
        raise RuntimeError("stop")

    assert bench.loaded.model.config._experts_implementation == "grouped_mm"


def test_no_copy_thread_outlives_its_session(bench):
    import threading

    before = threading.active_count()
    with bench.machine.session(bench.spec(5)):
        assert threading.active_count() == before + 1

    assert threading.active_count() == before


def test_running_twice_gives_the_same_tokens_and_the_same_log(bench):
    spec = bench.spec(7, "lfu", "global")

    first, once, _ = measured(bench, spec)
    second, twice, _ = measured(bench, spec)

    assert [g.token_ids for g in once] == [g.token_ids for g in twice] == bench.resident[1]
    assert first.log == second.log


@pytest.mark.parametrize("cache", ["lru", "static", "none"])
@pytest.mark.parametrize("slots", [1, 8, 24])
def test_peak_memory_counts_weights_and_slots_exactly(bench, cache, slots):
    memory = bench.machine.peak_memory(bench.spec(slots, cache), bench.prompts, 1)

    assert memory.slots == slots * bench.shape.expert_bytes
    assert memory.non_expert_weights == bench.shape.non_expert_bytes
    assert memory.kv_cache >= bench.shape.kv_bytes_per_token * max(
        len(p.token_ids) for p in bench.prompts
    )
    assert memory.activations > 0
    assert memory.peak_device_bytes == (
        memory.slots + memory.non_expert_weights + memory.kv_cache + memory.activations
    )


def test_larger_batches_need_more_memory_beside_the_slots(bench):
    spec = bench.spec(8)

    one = bench.machine.peak_memory(spec, bench.prompts, 1)
    four = bench.machine.peak_memory(spec, bench.prompts, 4)

    assert four.kv_cache > one.kv_cache
    assert four.activations > one.activations


@pytest.fixture(scope="module", params=["none", "gate_lookahead"])
def counted(request, bench):
    """A run on a slow link with few slots: hits, lates and misses all happen."""
    spec = bench.spec(12, "lru", "global", request.param)
    record, _, result = measured(bench, spec, size=4, link=SLOW)
    return record, result


def test_outcomes_sum_to_the_distinct_experts_demanded(counted):
    record, result = counted
    layer = np.asarray(record.steps["layer"])
    distinct = np.asarray(record.steps["distinct"])[layer != WHOLE_STEP]

    for phase in (result.prefill, result.decode):
        assert phase.hits + phase.lates + phase.misses == phase.demanded
    demanded = result.prefill.demanded + result.decode.demanded
    assert demanded == distinct.sum()
    assert demanded == sum(entry.kind == "event" for entry in record.log)
    assert result.hit_rate + result.late_rate + result.miss_rate == pytest.approx(1.0)


def test_prefetches_are_each_judged_once(counted, bench):
    record, result = counted
    found = prefetch_outcomes(record.log)

    asked = sum(e.kind == "load" and e.detail == "prefetch" for e in record.log)
    assert found == result.prefetch
    assert found.issued == asked
    assert found.issued == found.useful + found.late + found.wasted + found.cancelled
    assert min(found.useful, found.late, found.wasted, found.cancelled, found.harmful) >= 0
    assert found.late == sum(e.kind == "event" and e.detail == "late" for e in record.log)
    assert (found.issued > 0) == ("gate_lookahead" in result.label)


def test_bytes_are_those_of_the_copies(counted, bench):
    record, result = counted
    demand = [copy for copy in record.copies if copy.why == "demand"]
    misses = result.prefill.misses + result.decode.misses

    assert len(demand) == misses
    assert all(copy.num_bytes == bench.shape.expert_bytes for copy in demand)
    moved = sum(copy.num_bytes for copy in record.copies if copy.why != "warm")
    assert result.prefill.bytes_moved + result.decode.bytes_moved == moved


def test_copies_have_times_in_order_and_demand_is_waited_for(counted):
    record, _ = counted
    for copy in record.copies:
        assert copy.queued_s <= copy.start_s <= copy.end_s
        if copy.why == "demand":
            assert copy.needed_s is not None
            assert copy.needed_s >= copy.queued_s


def test_times_of_a_result_add_up(counted):
    _record, result = counted
    time = result.time
    parts = [
        getattr(time, name)
        for name in (
            "mixer_s",
            "experts_s",
            "stall_s",
            "decision_s",
            "readback_s",
            "lookahead_s",
            "other_s",
        )
    ]

    assert sum(parts) == pytest.approx(time.total_s)
    assert min(parts[:-1]) >= 0
    assert time.other_s >= -1e-6
    assert time.total_s == pytest.approx(result.prefill.seconds + result.decode.seconds)
    assert time.stall_s == pytest.approx(result.stall_s)
    assert result.stall_s > 0


def test_tokens_and_latencies_are_those_of_the_sequences(counted, bench):
    _record, result = counted
    generated = sum(len(text) for text in bench.resident[4])

    assert result.tokens_per_s == pytest.approx(generated / result.time.total_s)
    assert result.prefill.tokens == sum(len(p.token_ids) for p in bench.prompts)
    assert result.decode.tokens == generated - len(bench.prompts)
    assert 0 < result.ttft.p50 <= result.ttft.p95 <= result.ttft.p99
    assert 0 < result.tpot.p50 <= result.tpot.p99


def test_result_says_it_was_measured_and_that_its_log_replays(counted):
    _, result = counted

    assert result.source == "measured"
    assert result.log_replays is True
    assert result.link_origin == "emulated"
    assert result.link == SLOW.text


def test_all_slots_load_every_expert_once(bench):
    _, _, result = measured(bench, bench.spec(24))

    misses = result.prefill.misses + result.decode.misses
    assert misses <= 24
    assert result.late_rate == 0


def test_warm_placement_of_everything_never_misses(bench):
    record, _, result = measured(bench, bench.spec(24, "static"))

    assert result.hit_rate == 1.0
    assert result.bytes_per_token == 0
    assert sum(copy.why == "warm" for copy in record.copies) == 24


def test_disk_tier_gives_the_same_text_and_leaves_no_file(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    machine = Machine(load_model(str(bench.model), device=CPU), CPU, tier="disk")
    try:
        _, outputs = machine.run(
            bench.spec(5),
            bench.prompts,
            batch_size=1,
            max_new_tokens=NEW_TOKENS,
            memory=NO_MEMORY,
        )
    finally:
        machine.close()

    assert [g.token_ids for g in outputs] == bench.resident[1]
    assert machine.link_name == "disk to memory"
    assert list(tmp_path.iterdir()) == []


def test_results_on_bfloat16_weights_are_the_residents(bench):
    loaded = load_model(str(bench.model), device=CPU, dtype="bfloat16")
    resident = generate_all(loaded, bench.prompts, batch_size=4, max_new_tokens=NEW_TOKENS)
    machine = Machine(loaded, CPU)

    for slots in (1, 5, 12):
        with machine.session(bench.spec(slots)) as session:
            outputs = generate_all(
                loaded, bench.prompts, batch_size=4, max_new_tokens=NEW_TOKENS, observer=session
            )
        assert [g.token_ids for g in outputs] == [g.token_ids for g in resident]
    machine.close()
    assert loaded.model.dtype == torch.bfloat16

"""The reference engine on a virtual clock: timelines worked out by hand, and what holds for any run."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from expertflow.simulator.account import LAPS, RunRecord
from expertflow.simulator.costs import Linear
from expertflow.simulator.engine import simulate
from expertflow.simulator.memory import PassSizes, predicted_memory
from expertflow.simulator.policy.checked import tiny_lessons, tiny_shape
from expertflow.simulator.policy.registry import allocations, caches, misses, predictors
from expertflow.simulator.policy.replay import replay
from expertflow.simulator.policy.spec import Member, PolicySpec, make_spec
from expertflow.simulator.whole_layers import as_demanded
from expertflow.simulator.workload import Workload
from expertflow.tracer.errors import UsageError
from expertflow.tracer.schema import WHOLE_STEP
from expertflow.tracer.types import ExpertKey, MemoryPoint, ModelShape
from hypothesis import given, settings
from hypothesis import strategies as st


def seconds(record: RunRecord) -> float:
    """Time of all passes."""
    columns = record.steps
    return sum(
        total
        for layer, total in zip(columns["layer"], columns["total_s"], strict=True)
        if layer == WHOLE_STEP
    )


def stalls(record: RunRecord) -> list[float]:
    columns = record.steps
    return [
        stall
        for layer, stall in zip(columns["layer"], columns["stall_s"], strict=True)
        if layer != WHOLE_STEP
    ]


def outcomes(record: RunRecord) -> Counter[str]:
    return Counter(entry.detail for entry in record.log if entry.kind == "event")


def copy_of(record: RunRecord, layer: int, expert: int):
    (copy,) = [copy for copy in record.copies if copy.key == (layer, expert)]
    return copy


def lookahead_run(machine, steps_of, demanded, guessed, *, slots=16, allocation="equal", **costs):
    """One step of two layers: layer 0 demands expert 0, and guesses what layer 1 will demand.

    The demand copy runs from 0 to 1, the experts of layer 0 for 0.6 after it, so layer 1 asks at 1.6.
    """
    workload = steps_of([[(0,), demanded]], guesses={(0, 0): guessed})
    spec = make_spec(slots=slots, cache="lru", predictor="gate_lookahead", allocation=allocation)
    costs = {"copy": 1.0, "experts": 0.6, "chunks": 4, **costs}
    return simulate(workload, spec, tiny_shape(2, 8), machine(**costs))


# --- the clock ---------------------------------------------------------------------------------


def test_with_a_free_link_the_time_is_compute(machine, steps_of):
    workload = steps_of([[(0, 1), (2,)], [(3,), (4,)], [(5,), (0,)]])
    costs = machine(mixer=3.0, readback=0.5, decision=0.25, experts=2.0, head=1.0)

    record = simulate(workload, make_spec(slots=2, cache="lru"), tiny_shape(2, 8), costs)

    assert seconds(record) == 3 * (2 * (3.0 + 0.5 + 0.25 + 2.0) + 1.0)
    assert stalls(record) == [0.0] * 6
    assert outcomes(record)["miss"] == 7


def test_without_compute_the_time_is_loads_and_waits(machine, steps_of):
    workload = steps_of([[(0, 1)], [(0, 1)], [(2, 3)], [(0,)]])
    costs = machine(copy=1.0, wake=0.125, chunks=3)

    record = simulate(workload, make_spec(slots=2, cache="lru"), tiny_shape(1, 8), costs)

    assert len(record.copies) == 5
    assert seconds(record) == pytest.approx(5 * 1.0 + 3 * 0.125)


def test_waves_load_one_after_the_other(machine, steps_of):
    workload = steps_of([[(0, 1, 2)]])
    costs = machine(copy=1.0, wake=0.5, experts=3.0)

    record = simulate(workload, make_spec(slots=1, cache="lru"), tiny_shape(1, 8), costs)

    # Three waves of load, wake and a third of the experts' time; no load runs ahead into a used slot.
    assert seconds(record) == pytest.approx(3 * (1.0 + 0.5 + 1.0))
    assert record.steps["waves"][0] == 3
    assert [copy.start_s for copy in record.copies] == [0.0, 2.5, 5.0]


def test_warm_loads_cost_no_time_on_the_run(machine, steps_of):
    spec = make_spec(slots=8, cache="static", popularity=[[1] * 8])

    record = simulate(
        steps_of([[(0, 1)], [(7,)]]), spec, tiny_shape(1, 8), machine(copy=1.0, experts=1.0)
    )

    assert seconds(record) == 2.0
    assert outcomes(record) == {"hit": 3}
    assert [entry.detail for entry in record.log[:8]] == ["warm"] * 8


def test_decision_and_lookahead_are_charged(machine, steps_of):
    record = lookahead_run(machine, steps_of, (4,), (4,), decision=0.5, lookahead=0.25)

    columns = record.steps
    assert columns["decision_s"][:2] == [0.5, 0.5]
    assert columns["lookahead_s"][:2] == [0.25, 0.25]


def test_loads_of_the_event_before_weigh_on_the_next_mixer(machine, steps_of):
    costs = machine()
    phase = replace(costs.decode, mixer=Linear((1.0, 0.0, 0.0, 0.5, 0.5)))
    costs = replace(costs, prefill=phase, decode=phase)
    spec = make_spec(slots=16, predictor="gate_lookahead")
    workload = steps_of([[(0, 1), (2,)], [(0,), (2,)]], guesses={(0, 0): (4, 5, 6)})

    columns = simulate(workload, spec, tiny_shape(2, 8), costs).steps

    layers = [place for place, layer in enumerate(columns["layer"]) if layer != WHOLE_STEP]
    # Before: nothing; 2 demanded and 3 prefetched; 1 demanded, one pass ago; nothing.
    assert [columns["mixer_s"][place] for place in layers] == [1.0, 3.5, 1.5, 1.0]


def test_a_run_without_a_predictor_pays_no_lookahead(machine, steps_of):
    record = simulate(
        steps_of([[(0,)]]), make_spec(slots=1), tiny_shape(1, 8), machine(lookahead=9.0)
    )

    assert seconds(record) == 0.0


# --- prefetch ----------------------------------------------------------------------------------


def test_prefetch_hidden_under_compute_removes_the_stall(machine, steps_of):
    workload = steps_of([[(0,)], [(1,)], [(2,)], [(3,)]])
    costs = machine(copy=1.0, wake=0.25, experts=10.0)
    spec = make_spec(slots=4, cache="lru", predictor="oracle")

    record = simulate(workload, spec, tiny_shape(1, 8), costs)

    assert stalls(record) == [1.25, 0.0, 0.0, 0.0]
    assert outcomes(record) == {"miss": 1, "hit": 3}
    assert seconds(record) == 41.25


def test_late_prefetch_is_late_not_hit_and_waits_for_the_rest_alone(machine, steps_of):
    record = lookahead_run(machine, steps_of, (4,), (4,), wake=0.125)

    assert outcomes(record) == {"miss": 1, "late": 1}
    # Loads end at 1 and 2; layer 1 asks 0.6 after layer 0 woke at 1.125.
    assert stalls(record) == [1.125, pytest.approx(2.0 - 1.725 + 0.125)]
    assert copy_of(record, 1, 4).needed_s == pytest.approx(1.725)


def test_demand_goes_before_waiting_prefetches(machine, steps_of):
    record = lookahead_run(machine, steps_of, (1,), (4, 5), chunks=1)

    # Expert 4 was being copied and cannot be interrupted; 5 was still waiting.
    assert copy_of(record, 1, 4).end_s == 2.0
    assert (copy_of(record, 1, 1).start_s, copy_of(record, 1, 1).end_s) == (2.0, 3.0)
    assert not [copy for copy in record.copies if copy.key == (1, 5) and copy.start_s < 3.0]


def test_demand_interrupts_a_prefetch_at_its_next_chunk(machine, steps_of):
    record = lookahead_run(machine, steps_of, (1,), (4,), head=5.0)

    demand, prefetch = copy_of(record, 1, 1), copy_of(record, 1, 4)
    assert demand.queued_s == pytest.approx(1.6)
    assert (demand.start_s, demand.end_s) == (1.75, 2.75)
    assert (prefetch.start_s, prefetch.end_s) == (1.0, 3.0)  # its last chunk follows the demand
    assert prefetch.num_bytes == demand.num_bytes


def test_late_prefetch_is_not_interrupted_any_more(machine, steps_of):
    record = lookahead_run(machine, steps_of, (1, 4), (4,))

    assert copy_of(record, 1, 4).end_s == 2.0
    assert copy_of(record, 1, 1).start_s == 2.0


def test_cancelled_prefetch_stops_at_its_next_chunk(machine, steps_of):
    record = lookahead_run(machine, steps_of, (1, 2), (4,), slots=2, allocation="global")

    cancelled = copy_of(record, 1, 4)
    assert [entry.kind for entry in record.log].count("cancel") == 1
    assert cancelled.end_s == 1.75
    assert cancelled.num_bytes == 0.75 * tiny_shape().expert_bytes
    assert copy_of(record, 1, 1).start_s == 1.75
    assert seconds(record) == pytest.approx(3.75 + 0.6)


def test_prefetch_cancelled_after_an_interruption_still_counts_its_bytes(machine, steps_of):
    # Expert 4 of layer 1 is guessed at 1.0, interrupted at 1.75 by layer 1's own load, and cancelled
    # when layer 2 needs every slot; layer 2 asks as soon as layer 1 is through.
    workload = steps_of([[(0,), (1,), (2, 3, 5)]], guesses={(0, 0): (4,)})
    spec = make_spec(slots=3, cache="lru", predictor="gate_lookahead", allocation="global")
    costs = machine(copy=1.0, chunks=4, experts=0.6)
    hidden = machine(copy=1.0, chunks=4, experts=0.1)

    resumed = simulate(workload, spec, tiny_shape(3, 8), costs)
    interrupted = simulate(workload, spec, tiny_shape(3, 8), hidden)

    assert [e.kind for e in resumed.log].count("cancel") == 0  # it ended before layer 2 asked
    assert [e.kind for e in interrupted.log].count("cancel") == 1
    assert copy_of(interrupted, 1, 4).num_bytes == 0.5 * tiny_shape().expert_bytes


def test_prefetch_cancelled_the_moment_it_is_asked_for_moves_nothing(machine, steps_of):
    # Layer 0 hits and computes in no time: layer 1 takes the slot back before the link has begun.
    workload = steps_of([[(0,), (1, 2)]], guesses={(0, 0): (4,)})
    popularity = [[9] + [0] * 6 + [5], [0] * 8]
    spec = make_spec(
        slots=2,
        cache="static",
        predictor="gate_lookahead",
        allocation="global",
        popularity=popularity,
    )

    record = simulate(workload, spec, tiny_shape(2, 8), machine(copy=1.0, decision=0.5))

    assert [(copy.key, copy.end_s) for copy in record.copies] == [((1, 1), 2.0), ((1, 2), 3.0)]
    assert [entry.kind for entry in record.log].count("cancel") == 1
    assert seconds(record) == 3.0


def test_copies_under_compute_take_the_measured_busy_time(machine, steps_of):
    workload = steps_of([[(0,)], [(1,)]])
    costs = machine(copy=1.0, busy=2.0, experts=10.0, chunks=8)
    spec = make_spec(slots=2, cache="lru", predictor="oracle")

    record = simulate(workload, spec, tiny_shape(1, 8), costs)

    idle, busy = record.copies
    assert idle.end_s - idle.start_s == 1.0
    # Its first chunk starts in the very moment the demand ends, just before compute goes on.
    assert busy.end_s - busy.start_s == pytest.approx(1 / 8 + 7 / 8 * 2.0)


# --- the CPU -----------------------------------------------------------------------------------


def cpu_spec(misses: str, *, copy: float, cpu: tuple[float, float], **more) -> PolicySpec:
    times = {"copy_s": copy, "expert_s": cpu[0], "token_s": cpu[1]}
    return make_spec(misses=misses, cpu_times=times, **more)


def test_experts_on_the_cpu_run_beside_the_device_which_waits_for_them(machine, steps_of):
    # Expert 0 has the only slot for good; 1 is computed on the CPU, from the decision on: 0.25 to 3.75.
    workload = steps_of([[(0, 1)], [(0, 1)]])
    costs = machine(copy=9.0, experts=2.0, decision=0.25, cpu=(3.0, 0.5))
    spec = cpu_spec(
        "cpu", copy=9.0, cpu=(3.0, 0.5), slots=1, cache="static", popularity=[[8] + [1] * 7]
    )

    record = simulate(workload, spec, tiny_shape(1, 8), costs)

    columns = record.steps
    # The device is through with expert 0 at 2.25.
    assert (columns["experts_s"][0], columns["cpu_s"][0], columns["stall_s"][0]) == (2.0, 1.5, 0.0)
    assert (columns["total_s"][0], seconds(record)) == (3.75, 7.5)
    assert outcomes(record) == {"hit": 2, "cpu": 2}
    assert record.copies == []


def test_an_event_all_on_the_cpu_charges_the_device_nothing(machine, steps_of):
    costs = machine(experts=2.0, head=1.0, cpu=(3.0, 0.5))
    spec = cpu_spec("cpu", copy=9.0, cpu=(3.0, 0.5), slots=1)

    record = simulate(steps_of([[(0, 1)]]), spec, tiny_shape(1, 8), costs)

    columns = record.steps
    # One after the other.
    assert (columns["experts_s"][0], columns["cpu_s"][0]) == (0.0, 2 * 3.5)
    assert columns["waves"][0] == 1
    assert seconds(record) == 8.0


def with_tokens(workload: Workload, *counts: int) -> Workload:
    return replace(workload, counts=np.array(counts, dtype=np.int32))


def test_experts_of_few_tokens_go_to_the_cpu_while_the_link_loads_the_others(machine, steps_of):
    # On the CPU they take 1.5, 3 and 5: with the first alone there, the link is through at 4;
    # with two of them there, the CPU is through at 4.5.
    workload = with_tokens(steps_of([[(0, 1, 2)]]), 1, 4, 8)
    costs = machine(copy=2.0, wake=0.5, experts=1.0, cpu=(1.0, 0.5))
    spec = cpu_spec("sooner", copy=2.0, cpu=(1.0, 0.5), slots=8)

    record = simulate(workload, spec, tiny_shape(1, 8), costs)

    columns = record.steps
    assert [(copy.key.expert, copy.start_s, copy.end_s) for copy in record.copies] == [
        (1, 0.0, 2.0),
        (2, 2.0, 4.0),
    ]
    assert (columns["stall_s"][0], columns["experts_s"][0], columns["cpu_s"][0]) == (4.5, 1.0, 0.0)
    assert seconds(record) == 5.5
    assert outcomes(record) == {"cpu": 1, "miss": 2}


def test_the_device_waits_for_the_cpu_only_beyond_its_own_waits(machine, steps_of):
    # Expert 0 is on the CPU until 2.5; expert 1 is loaded until 2 and computed until 2.125.
    workload = steps_of([[(0, 1)]])
    costs = machine(copy=2.0, experts=0.125, cpu=(2.0, 0.5))
    spec = cpu_spec("sooner", copy=2.0, cpu=(2.0, 0.5), slots=8)

    record = simulate(workload, spec, tiny_shape(1, 8), costs)

    columns = record.steps
    assert (columns["stall_s"][0], columns["cpu_s"][0], seconds(record)) == (2.0, 0.375, 2.5)


def test_loads_alone_count_as_traffic(machine, steps_of):
    workload = steps_of([[(0, 1)], [(0, 1)]])
    costs = machine()
    phase = replace(costs.decode, mixer=Linear((1.0, 0.0, 0.0, 0.5, 0.0)))
    costs = replace(costs, prefill=phase, decode=phase)

    def mixer_s(misses):
        spec = cpu_spec(misses, copy=1.0, cpu=(0.0, 0.0), slots=2)
        return simulate(workload, spec, tiny_shape(1, 8), costs).steps["mixer_s"][2]

    assert (mixer_s("load"), mixer_s("cpu")) == (2.0, 1.0)


# --- rows --------------------------------------------------------------------------------------


def test_core_is_called_in_the_order_of_the_runtime(machine, steps_of):
    record = lookahead_run(machine, steps_of, (4, 5), (4,), copy=0.5)

    # Of each event: what ended, the demand, its loads, the prediction, its loads, the release.
    assert [(entry.kind, entry.layer, entry.detail) for entry in record.log] == [
        ("event", 0, "miss"),
        ("load", 0, "demand"),
        ("predict", 1, ""),
        ("load", 1, "prefetch"),
        ("release", 0, ""),
        ("loaded", 1, ""),
        ("event", 1, "hit"),
        ("event", 1, "miss"),
        ("load", 1, "demand"),
        ("release", 1, ""),
    ]


def test_tokens_are_timed_from_the_start_of_their_sequence(machine, steps_of):
    both = steps_of([[(0,)], [(0,)], [(0,)], [(0,)]])
    # Passes 0 and 1 are of sequence 0, passes 2 and 3 of sequence 1.
    steps = replace(both.steps, members=np.array([0, 0, 1, 1]))
    both = replace(both, steps=steps, prompt_tokens={0: 4, 1: 7})

    record = simulate(both, make_spec(slots=1), tiny_shape(1, 8), machine(mixer=1.0, head=0.5))

    assert [(s.sequence, s.prompt_tokens, s.token_s) for s in record.sequences] == [
        (0, 4, (1.5, 3.0)),
        (1, 7, (1.5, 3.0)),
    ]


def test_memory_peaks_where_cache_and_working_tensors_together_are_largest(machine, steps_of):
    # The first pass has the largest working tensors, if any; the last has the longest context.
    workload = steps_of([[(0,)], [(1,)], [(2,)]])
    shape = tiny_shape(1, 8)
    heavy = MemoryPoint(phase="prefill", batch=1, tokens=4, context=4, activation_bytes=10**6)

    def found(costs):
        passes = PassSizes.of_steps(workload.steps, np.zeros(3))
        return predicted_memory(passes, 3, shape, costs)

    late, early = found(machine()), found(replace(machine(), memory=(heavy,)))

    assert late.slots == 3 * shape.expert_bytes
    assert late.non_expert_weights == shape.non_expert_bytes
    assert (late.kv_cache, late.activations) == (6 * shape.kv_bytes_per_token, 0)
    assert (early.kv_cache, early.activations) == (4 * shape.kv_bytes_per_token, 10**6)
    assert late.peak_device_bytes == sum(
        (late.slots, late.non_expert_weights, late.kv_cache, late.activations)
    )


def test_memory_of_a_run_grows_by_the_rows_it_gathers_from_waves(machine, steps_of):
    workload = steps_of([[(0, 1, 2, 3)], [(0,)]])
    heavy = MemoryPoint(phase="prefill", batch=1, tokens=4, context=4, activation_bytes=10**6)
    costs = replace(machine(), gathered_bytes_per_token=10, memory=(heavy,))

    whole, waves = (
        simulate(workload, make_spec(slots=slots), tiny_shape(1, 8), costs).memory.activations
        for slots in (4, 3)
    )

    assert (whole, waves) == (10**6, 10**6 + 4 * 10)


def test_a_policy_without_slots_is_refused(machine, steps_of):
    with pytest.raises(UsageError, match="at least 1 slot, got 0"):
        simulate(steps_of([[(0,)]]), make_spec(slots=0), tiny_shape(1, 8), machine())


def test_writing_back_costs_the_way_of_what_is_evicted(machine, steps_of):
    workload = steps_of([[(0,)], [(1,)]], experts=2)
    spec = make_spec(slots=1, misses="write_back")

    record = simulate(workload, spec, tiny_shape(1, 2), machine(copy=3.0))

    # The first load finds an empty slot.
    assert [copy.end_s - copy.start_s for copy in record.copies] == [3.0, 6.0]
    assert [copy.num_bytes for copy in record.copies] == [1 << 20, 2 << 20]


# --- anything goes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """A small workload, any policy from one slot to all, and any machine."""

    steps: list[list[set[int]]]
    num_experts: int
    guesses: dict[tuple[int, int], list[int]]
    facts_seed: int
    spec: PolicySpec
    shape: ModelShape
    costs: dict[str, Any]

    def workload(self, steps_of) -> Workload:
        found = steps_of(self.steps, experts=self.num_experts, guesses=self.guesses)
        dice = np.random.default_rng(self.facts_seed)
        counts = dice.integers(1, 9, len(found.experts)).astype(np.int32)
        return replace(found, counts=counts, weights=counts * dice.random(len(counts)))


@st.composite
def runs(draw: st.DrawFn) -> Given:
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    shape = tiny_shape(layers, experts)
    event = st.sets(st.integers(0, experts - 1))
    steps = draw(
        st.lists(st.lists(event, min_size=layers, max_size=layers), min_size=1, max_size=5)
    )
    guess = st.lists(st.integers(0, experts - 1), max_size=3, unique=True)
    guesses = {
        (step, layer): draw(guess) for step in range(len(steps)) for layer in range(layers - 1)
    }
    spec = make_spec(
        slots=draw(st.integers(1, layers * experts)),
        cache=draw(st.sampled_from(caches.names())),
        allocation=draw(st.sampled_from(allocations.names())),
        predictor=draw(st.sampled_from(predictors.names())),
        misses=draw(st.sampled_from(misses.names())),
        **tiny_lessons(shape),
    )
    costs: dict[str, Any] = {
        name: draw(st.sampled_from((0.0, 0.3, 1.0, 2.5)))
        for name in ("copy", "mixer", "experts", "wake", "decision", "lookahead")
    }
    costs["chunks"] = draw(st.sampled_from((1, 3, 8)))
    costs["cpu"] = draw(st.sampled_from(((0.0, 0.0), (0.5, 0.25))))
    return Given(steps, experts, guesses, draw(st.integers(0, 99)), spec, shape, costs)


@settings(max_examples=200, deadline=None)
@given(run=runs())
def test_any_run_ends_with_its_books_in_order(machine, steps_of, run):
    record = simulate(run.workload(steps_of), run.spec, run.shape, machine(**run.costs))

    columns = record.steps
    for place, layer in enumerate(columns["layer"]):
        parts = sum(columns[name][place] for name in LAPS)
        if layer != WHOLE_STEP:
            assert columns["total_s"][place] == pytest.approx(parts)
    layers = sum(t for t, la in zip(columns["total_s"], columns["layer"], strict=True) if la >= 0)
    assert seconds(record) == pytest.approx(layers)
    demanded = as_demanded(run.workload(steps_of), run.spec)
    assert sum(outcomes(record).values()) == len(demanded.experts)
    demanded = sum(entry.detail == "demand" for entry in record.log)
    assert seconds(record) >= demanded * run.costs["copy"] - 1e-9
    assert {copy.key for copy in record.copies} <= {
        ExpertKey(layer, expert)
        for layer in range(run.shape.num_layers)
        for expert in range(run.num_experts)
    }
    for copy in record.copies:
        assert copy.queued_s <= copy.start_s <= copy.end_s
        ways = 2 if run.spec.writes_back else 1
        assert 0 <= copy.num_bytes <= ways * run.shape.expert_bytes
    assert replay(record.log, run.spec, run.shape).is_exact


@settings(max_examples=40, deadline=None)
@given(run=runs())
def test_two_runs_are_equal_to_the_last_bit(machine, steps_of, run):
    first, second = (
        simulate(run.workload(steps_of), run.spec, run.shape, machine(**run.costs))
        for _ in range(2)
    )

    assert first.steps == second.steps
    assert first.copies == second.copies
    assert first.log == second.log
    assert first.sequences == second.sequences


@settings(max_examples=60, deadline=None)
@given(run=runs())
def test_a_faster_link_changes_no_decision_of_a_demand_only_policy(machine, steps_of, run):
    workload = run.workload(steps_of)
    spec = replace(run.spec, predictor=Member(name="none"))

    slow = simulate(workload, spec, run.shape, machine(copy=5.0, experts=0.1))
    fast = simulate(workload, spec, run.shape, machine(copy=0.1, experts=5.0))

    assert slow.log == fast.log

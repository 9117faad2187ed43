"""Batches decoded in turns and regrouped for real: same text, the simulator's decisions, its costs in the account."""

from dataclasses import replace

import pytest
import torch
from expertflow.runtime import units as units_module
from expertflow.runtime.kv_rows import measure_kv_move, move_rows, require_movable, widen
from expertflow.simulator.engine import simulate
from expertflow.simulator.policy.replay import replay
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.policy.units import Placement, arrange
from expertflow.simulator.regroup import charged, in_units
from expertflow.simulator.result import MemoryResult
from expertflow.tracer.errors import UsageError
from expertflow.tracer.schema import WHOLE_STEP
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from tests.runtime.bench import COSTS, CPU, NEW_TOKENS

NO_MEMORY = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)
UNITS = (
    ("fcfs", {"batches": 2}),
    ("route_similarity", {"min_gain": 0.0}),
    ("route_similarity", {"batches": 3, "every": 2, "min_gain": 0.0}),
    ("path_similarity", {"min_gain": 0.0}),
)
SIZES = (1, 2, 4)


def spec_of(name, params, slots=13, **more):
    return make_spec(slots=slots, scheduler=name, scheduler_params=params, **more)


def measured(bench, spec, size, memory=NO_MEMORY):
    record, outputs = bench.machine.run(
        spec, bench.prompts, batch_size=size, max_new_tokens=NEW_TOKENS, memory=memory
    )
    return record, [one.token_ids for one in outputs]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "params"), UNITS)
def test_text_is_the_residents_and_the_log_replays_whoever_runs_together(bench, name, params, size):
    spec = spec_of(name, params, slots=3 if size == 1 else 13)

    record, texts = measured(bench, spec, size)

    assert texts == bench.resident[1]
    assert replay(record.log, spec, bench.shape).is_exact


@pytest.mark.parametrize(("name", "params"), UNITS[:3])
def test_batches_and_decisions_are_those_of_the_simulator(bench, name, params):
    spec = spec_of(name, params)
    units = in_units(bench.workloads[4], spec)

    record, _ = measured(bench, spec, 4)

    workload, expected = charged(units, COSTS, bench.shape)
    assert list(simulate(workload, spec, bench.shape, COSTS).log) == record.log
    assert replace(record.regrouping, decision_s=0.0, move_s=0.0) == replace(
        expected, decision_s=0.0, move_s=0.0
    )
    assert expected.kv_bytes > 0


def test_sequences_do_change_batches_in_these_runs(bench):
    """Else the tests above would show nothing."""
    found = measured(bench, spec_of(*UNITS[1]), 2)[0].regrouping

    assert found.changed > 0
    assert found.moved > 0


def test_text_would_show_a_row_in_the_wrong_place(bench, monkeypatch):
    """Else same text would be no proof: rows are not moved though sequences are."""
    monkeypatch.setattr(
        units_module, "move_rows", lambda caches, placed: move_rows(caches, arrange_nothing(placed))
    )

    assert measured(bench, spec_of(*UNITS[1]), 2)[1] != bench.resident[1]


def arrange_nothing(placed):
    """The same batches with everyone's keys and values left where they are."""
    return [
        Placement(p.base, p.rows, tuple((p.base, r % p.room) for r in range(len(p.rows))), p.room)
        for p in placed
    ]


def test_a_path_predictor_serves_scheduler_and_prefetches(bench):
    spec = spec_of("path_similarity", {"min_gain": 0.0}, predictor="path")

    record, texts = measured(bench, spec, 2)

    assert texts == bench.resident[1]
    assert any(entry.kind == "predict" for entry in record.log)
    assert replay(record.log, spec, bench.shape).is_exact


def test_scheduling_has_its_own_column_and_counts_in_the_time(bench):
    spec = spec_of(*UNITS[1])
    record, _ = measured(bench, spec, 2)
    columns = record.steps

    result = bench.machine.result(record, spec, batch_size=2)

    whole = [n for n, layer in enumerate(columns["layer"]) if layer == WHOLE_STEP]
    spent = sum(columns["schedule_s"][n] for n in whole)
    found = result.regrouping
    assert result.time.schedule_s == pytest.approx(spent)
    assert 0 < found.decision_s + found.move_s <= spent
    assert all(columns["total_s"][n] > columns["schedule_s"][n] for n in whole)
    assert result.time.total_s == pytest.approx(sum(columns["total_s"][n] for n in whole))
    # Nothing before prompts, and in a round of turns only before the first of them.
    assert all(columns["schedule_s"][n] == 0 for n in whole if columns["phase"][n] == "prefill")
    assert result.log_replays


def test_times_of_tokens_count_what_was_spent_on_scheduling(bench):
    record, _ = measured(bench, spec_of(*UNITS[1]), 4)

    longest = max(one.token_s[-1] for one in record.sequences)
    assert longest <= sum(
        t for t, layer in zip(record.steps["total_s"], record.steps["layer"], strict=True)
        if layer == WHOLE_STEP
    )  # fmt: skip
    assert all(list(one.token_s) == sorted(one.token_s) for one in record.sequences)


def test_memory_counts_the_caches_of_all_batches_of_a_unit(bench):
    alone = bench.machine.peak_memory(bench.spec(13), bench.prompts, 2)

    turns = bench.machine.peak_memory(spec_of("fcfs", {"batches": 2}), bench.prompts, 2)

    assert turns.kv_cache > 1.5 * alone.kv_cache
    assert turns.slots == alone.slots


@pytest.mark.parametrize("name", ["route_oracle"])
def test_schedulers_that_know_the_future_are_refused(bench, name):
    with pytest.raises(UsageError, match=rf"scheduler '{name}'.*cannot be deployed"):
        bench.machine.session(make_spec(slots=8, scheduler=name)).__enter__()


def test_a_scheduler_without_its_path_predictor_is_refused(bench):
    paths, bench.machine.paths = bench.machine.paths, None
    try:
        with pytest.raises(UsageError, match="scheduler 'path_similarity' needs a trained path"):
            bench.machine.session(make_spec(slots=8, scheduler="path_similarity")).__enter__()
    finally:
        bench.machine.paths = paths


# --- rows ----------------------------------------------------------------------------------------


def cache_of(*names: int, width=3, layers=2):
    """A cache whose rows hold their own names, one thousand more for each layer, values below zero."""
    cache = DynamicCache()
    for layer in range(layers):
        rows = torch.tensor([float(name + 1000 * layer) for name in names])
        keys = rows[:, None, None, None].expand(len(names), 2, width, 4).contiguous()
        cache.update(keys, -keys, layer)
    return cache


def names_of(cache, layer=0):
    return [int(row[0, -1, 0]) - 1000 * layer for row in cache.layers[layer].keys]


@pytest.mark.parametrize(
    "groups", [[[1, 3], [2, 4]], [[4, 3], [1, 2]], [[1, 2, 3, 4]], [[3], [1]], [[2, 3, 4], [1]]]
)
def test_keys_and_values_go_where_their_sequences_go(groups):
    held = [[1, 2], [3, 4]]

    placed = arrange(held, groups)
    moved = move_rows([cache_of(*rows) for rows in held], placed)

    for cache, placement in zip(moved, placed, strict=True):
        for layer in range(2):
            assert names_of(cache, layer) == list(placement.rows)
            assert torch.equal(cache.layers[layer].keys, -cache.layers[layer].values)


def test_a_cache_is_made_wider_in_front():
    cache = cache_of(1, 2, width=3)

    widen(cache, 5)

    keys = cache.layers[1].keys
    assert keys.shape == (2, 2, 5, 4)
    assert keys[:, :, :2].abs().sum() == 0
    assert keys[0, 0, 2:, 0].tolist() == [1001.0] * 3


def test_caches_that_forget_are_refused():
    cache = cache_of(1)
    cache.layers[1] = DynamicSlidingWindowLayer(sliding_window=8)

    with pytest.raises(UsageError, match="DynamicSlidingWindowLayer, which forget"):
        require_movable(cache)


def test_moving_rows_is_measured_on_the_device(bench):
    found = measure_kv_move(bench.shape, CPU)

    assert min(found.weights) >= 0
    assert found(2, 1e6) > 0

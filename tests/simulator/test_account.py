"""Adding up: hand-written rows of a run, and every number that comes out of them."""

from dataclasses import replace

import pytest
from expertflow.simulator.account import (
    LAPS,
    CopyRow,
    RunContext,
    RunRecord,
    SequenceTimes,
    percentiles,
    summarize,
    totals_of,
)
from expertflow.simulator.engine import simulate
from expertflow.simulator.outcomes import Ledger, prefetch_outcomes
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.policy.log import Entry
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.result import MemoryResult, PrefetchResult
from expertflow.tracer.probe import provenance
from expertflow.tracer.schema import WHOLE_STEP
from expertflow.tracer.types import ExpertKey


def prefetched(expert: int, evicts: int = -1) -> Entry:
    gone = (0, evicts) if evicts >= 0 else (-1, -1)
    return Entry("load", 0, 0, expert, 0, *gone, detail="prefetch")


def demanded(expert: int, outcome: str, step: int = 0) -> Entry:
    return Entry("event", step, 0, expert, 0, wave=0, detail=outcome)


ENDED = Entry("release", 0, 0, -1)
"""Between two events; what is demanded without it between belongs to one event."""

# --- prefetches --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ([], PrefetchResult()),
        ([prefetched(1), demanded(1, "hit")], PrefetchResult(issued=1, useful=1)),
        ([prefetched(1), demanded(1, "late")], PrefetchResult(issued=1, late=1)),
        ([prefetched(1)], PrefetchResult(issued=1, wasted=1)),
        # Evicted before it was asked for: the demand missed, the copy was for nothing.
        ([prefetched(1), demanded(1, "miss")], PrefetchResult(issued=1, wasted=1)),
        (
            [prefetched(1), Entry("cancel", 0, 0, 1), demanded(1, "miss")],
            PrefetchResult(issued=1, cancelled=1),
        ),
        # Only the first use of a prefetch is its merit.
        (
            [prefetched(1), demanded(1, "hit"), ENDED, demanded(1, "hit")],
            PrefetchResult(issued=1, useful=1),
        ),
        # Twice prefetched, used once.
        (
            [prefetched(1), prefetched(1), demanded(1, "hit")],
            PrefetchResult(issued=2, useful=1, wasted=1),
        ),
        # What it evicted was needed first: harmful, and here also wasted.
        (
            [prefetched(1, evicts=2), demanded(2, "miss")],
            PrefetchResult(issued=1, wasted=1, harmful=1),
        ),
        # … harmful, though used later.
        (
            [prefetched(1, evicts=2), demanded(2, "miss"), ENDED, demanded(1, "hit")],
            PrefetchResult(issued=1, useful=1, harmful=1),
        ),
        # … harmful, if its victim is computed on the CPU as well.
        (
            [prefetched(1, evicts=2), demanded(2, "cpu")],
            PrefetchResult(issued=1, wasted=1, harmful=1),
        ),
        # What it evicted was needed, but after it had paid off itself.
        (
            [prefetched(1, evicts=2), demanded(1, "hit"), ENDED, demanded(2, "miss")],
            PrefetchResult(issued=1, useful=1),
        ),
        # … or in the same event, whatever the order of rows: one load was exchanged for another.
        (
            [prefetched(1, evicts=2), demanded(1, "hit"), demanded(2, "miss")],
            PrefetchResult(issued=1, useful=1),
        ),
        (
            [prefetched(2, evicts=1), demanded(1, "miss"), demanded(2, "late")],
            PrefetchResult(issued=1, late=1),
        ),
        # Both were needed and neither was there: the prefetch had been evicted itself.
        (
            [prefetched(1, evicts=2), demanded(1, "miss"), demanded(2, "miss")],
            PrefetchResult(issued=1, wasted=1, harmful=1),
        ),
        # Given up by the very event that misses its victim. The cancel is logged before the event's rows.
        (
            [prefetched(1, evicts=2), Entry("cancel", 0, 0, 1), demanded(2, "miss")],
            PrefetchResult(issued=1, cancelled=1, harmful=1),
        ),
        # Given up first, missed later: its victim is no longer its doing.
        (
            [prefetched(1, evicts=2), Entry("cancel", 0, 0, 1), ENDED, demanded(2, "miss")],
            PrefetchResult(issued=1, cancelled=1),
        ),
        # What it evicted came back in time by another prefetch.
        (
            [prefetched(1, evicts=2), prefetched(2), ENDED, demanded(2, "hit")],
            PrefetchResult(issued=2, useful=1, wasted=1),
        ),
        # … which was evicted again, by a third: that one is to blame, and it alone.
        (
            [prefetched(1, evicts=2), prefetched(2), prefetched(3, evicts=2), demanded(2, "miss")],
            PrefetchResult(issued=3, wasted=3, harmful=1),
        ),
        # One victim is blamed once.
        (
            [prefetched(1, evicts=2), demanded(2, "miss"), ENDED, demanded(2, "miss")],
            PrefetchResult(issued=1, wasted=1, harmful=1),
        ),
        # Demand loads are no prefetches.
        (
            [demanded(3, "miss"), Entry("load", 0, 0, 3, 0, detail="demand")],
            PrefetchResult(),
        ),
    ],
)
def test_prefetches_are_judged_by_what_became_of_their_expert(log, expected):
    assert prefetch_outcomes(log) == expected


def test_ledger_counts_as_things_happen():
    ledger, (a, b, c) = Ledger(), [ExpertKey(0, expert) for expert in range(3)]
    ledger.prefetched(a, None)
    ledger.prefetched(b, c)

    assert ledger.result() == PrefetchResult(issued=2, wasted=2)  # so far nobody asked for them
    ledger.demanded([a], [b], [])
    assert ledger.result() == PrefetchResult(issued=2, useful=1, late=1)
    ledger.demanded([a, b], [], [c])
    assert ledger.result() == PrefetchResult(issued=2, useful=1, late=1)


def test_every_prefetch_has_one_outcome(machine, steps_of):
    steps = [[((s * 3) % 5,), ((s * 2 + 1) % 6, (s + 3) % 7)] for s in range(12)]
    guesses = {(s, 0): ((s + 3) % 7, (s * 5) % 8, s % 4) for s in range(12)}
    spec = make_spec(slots=4, predictor="gate_lookahead", allocation="global")
    costs = machine(copy=1.0, experts=1.3, chunks=4)

    record = simulate(steps_of(steps, guesses=guesses), spec, tiny_shape(2, 8), costs)

    found = prefetch_outcomes(record.log)
    assert found.issued > 5
    assert found.useful + found.late + found.wasted + found.cancelled == found.issued
    assert min(found.useful, found.late, found.wasted, found.cancelled) >= 0


# --- percentiles -------------------------------------------------------------------------------


def test_percentiles_of_a_known_distribution():
    found = percentiles([float(n) for n in range(101)])

    assert (found.mean, found.p50, found.p95, found.p99) == (50.0, 50.0, 95.0, 99.0)


def test_percentiles_of_one_value_and_of_none():
    assert percentiles([0.25]).p99 == percentiles([0.25]).mean == 0.25
    assert percentiles([]).p95 == 0.0


# --- whole runs --------------------------------------------------------------------------------


def context(**more) -> RunContext:
    arguments = {
        "source": "predicted",
        "spec": make_spec(slots=4),
        "shape": tiny_shape(2, 8),
        "trace_id": "t",
        "device": "d",
        "link": "l",
        "link_origin": "declared",
        "batch_size": 1,
        "provenance": provenance(0, "imported"),
    }
    return RunContext(**(arguments | more))


def row(step: int, layer: int, phase: str, total: float, **laps: float) -> dict[str, object]:
    times = dict.fromkeys(LAPS, 0.0) | laps
    return {"step": step, "layer": layer, "phase": phase, "distinct": 2, **times, "total_s": total}


def copied(step: int, start: float, end: float, why: str = "demand", size: int = 100) -> CopyRow:
    return CopyRow(ExpertKey(0, 0), why, step, size, start, start, end, start)


def small_run() -> RunRecord:
    """Prefill of 6 s (1 stalled) with 2 misses; two decode steps of 2 s, in all 2 hits, 1 late, 1 miss."""
    rows = [
        row(0, 0, "prefill", 5.0, mixer_s=2.0, stall_s=1.0, experts_s=2.0),
        row(0, WHOLE_STEP, "prefill", 6.0),
        row(1, 0, "decode", 1.5, mixer_s=0.5, stall_s=0.25, experts_s=0.75),
        row(1, WHOLE_STEP, "decode", 2.0),
        row(2, 0, "decode", 2.0, mixer_s=1.0, stall_s=0.5, decision_s=0.5),
        row(2, WHOLE_STEP, "decode", 2.0),
    ]
    log = [
        demanded(0, "miss"), demanded(1, "miss"),
        demanded(0, "hit", 1), demanded(2, "late", 1),
        demanded(0, "hit", 2), demanded(3, "miss", 2),
    ]  # fmt: skip
    return RunRecord(
        steps={name: [r[name] for r in rows] for name in rows[0]},
        copies=[
            copied(-1, 0.0, 50.0, "warm"),
            copied(0, 1.0, 2.0),
            copied(0, 2.0, 3.0),
            copied(1, 6.0, 7.0, "prefetch", 40),
            copied(2, 8.0, 9.0),
        ],
        log=log,
        sequences=[SequenceTimes(0, 10, (6.0, 8.0, 10.0)), SequenceTimes(1, 4, (6.0,))],
        memory=MemoryResult(
            non_expert_weights=1, slots=20, kv_cache=300, activations=4000, staging=50_000
        ),
    )


def test_phases_are_kept_apart():
    result = summarize(small_run(), context())

    prefill, decode = result.prefill, result.decode
    assert (prefill.steps, prefill.tokens, prefill.seconds) == (1, 14, 6.0)
    assert (prefill.hits, prefill.lates, prefill.misses) == (0, 0, 2)
    assert (prefill.bytes_moved, prefill.stall_s) == (200, 1.0)
    assert (decode.steps, decode.tokens, decode.seconds) == (2, 2, 4.0)
    assert (decode.hits, decode.lates, decode.misses) == (2, 1, 1)
    assert (decode.bytes_moved, decode.stall_s) == (140, 0.75)
    assert (decode.hit_rate, decode.late_rate, decode.miss_rate) == (0.5, 0.25, 0.25)
    assert decode.tokens_per_s == 0.5
    assert decode.bytes_per_token == 70


def test_totals_are_those_of_the_whole_run():
    result = summarize(small_run(), context())

    assert result.tokens_per_s == 4 / 10.0
    assert (result.ttft_s, result.tpot_s) == (6.0, 2.0)
    assert result.bytes_per_token == 340 / 4
    assert result.stall_s == 1.75
    assert result.peak_device_bytes == 54_321
    assert result.slots_ratio == 2 / (4 / 2)


def test_passes_are_added_up_one_by_one():
    totals = totals_of(small_run())

    steps = totals.steps
    assert steps.is_decode.tolist() == [False, True, True]
    assert steps.total_s.tolist() == [6.0, 2.0, 2.0]
    assert steps.laps_s["stall_s"].tolist() == [1.0, 0.25, 0.5]
    assert steps.laps_s.keys() == set(LAPS)
    assert (steps.events.tolist(), steps.distinct.tolist()) == ([1, 1, 1], [2, 2, 2])
    assert steps.hits.tolist() == [0, 1, 1]
    assert steps.lates.tolist() == [0, 1, 0]
    assert steps.misses.tolist() == [2, 0, 1]
    # Warm loads are of no pass.
    assert steps.bytes_moved.tolist() == [200, 40, 100]
    assert totals.link_busy_s == 4.0
    assert summarize(totals, context()) == summarize(small_run(), context())


def test_experts_on_the_cpu_count_as_missed_and_waits_for_them_apart():
    run = small_run()
    log = [entry._replace(detail="cpu") if entry.detail == "miss" else entry for entry in run.log]
    steps = {**run.steps, "cpu_s": [0.0, 0.0, 0.25, 0.0, 0.0, 0.0]}

    result = summarize(replace(run, log=log, steps=steps), context())

    assert (result.prefill.misses, result.decode.misses) == (2, 1)
    assert (result.time.cpu_s, result.stall_s) == (0.25, 1.75)
    assert result.time.other_s == 1.25


def test_link_time_a_run_has_counted_itself_is_taken():
    run = replace(small_run(), link_busy_s=2.5)

    assert summarize(run, context()).link_busy_share == 0.25


def test_rates_add_up_to_one():
    result = summarize(small_run(), context())

    for part in (result, result.prefill, result.decode):
        assert part.hit_rate + part.late_rate + part.miss_rate == pytest.approx(1.0)


def test_time_parts_add_up_to_the_total():
    time = summarize(small_run(), context()).time

    parts = (time.mixer_s, time.experts_s, time.stall_s, time.decision_s, time.readback_s)
    assert time.total_s == 10.0
    assert sum(parts) + time.lookahead_s + time.other_s == pytest.approx(10.0)
    assert time.other_s == 1.5


def test_link_is_busy_while_any_copy_is_under_way():
    run = small_run()
    # A prefetch from 0 to 5 that gave way to a demand from 1 to 3.
    interrupted = [copied(0, 0.0, 5.0, "prefetch"), copied(0, 1.0, 3.0)]

    assert summarize(run, context()).link_busy_share == pytest.approx(0.4)
    assert summarize(replace(run, copies=interrupted), context()).link_busy_share == 0.5


def test_run_without_rows_gives_zeros():
    memory = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)

    result = summarize(RunRecord({}, [], [], [], memory), context())

    assert result.tokens_per_s == result.hit_rate == result.stall_s == result.ttft.p99 == 0.0
    assert result.time.total_s == 0.0

"""Same text and same decisions, at every budget, under every policy that can be deployed."""

import itertools

import pytest
from expertflow.simulator.policy.registry import predictors
from expertflow.simulator.policy.replay import replay

from tests.runtime.bench import ALLOCATIONS, CACHES, CRAWLING, PREDICTORS, SIZES, SLOW

BUDGETS = (1, 2, 3, 8, 13, 24)
"""One slot, one token's experts, one per layer, one layer's experts, half (and one over), all."""
PLACES = [("lru", allocation) for allocation in ALLOCATIONS]
PLACES += [(cache, "equal") for cache in CACHES if cache != "lru"]
LOOKING = [name for name in PREDICTORS if name in ("none", "gate_lookahead")]
POLICIES = [(*place, predictor) for place, predictor in itertools.product(PLACES, LOOKING)]
POLICIES += [("lru", "equal", name) for name in PREDICTORS if name not in LOOKING]
LISTENING = [name for name in PREDICTORS if hasattr(predictors.get(name), "hear")]
INFERRING = [name for name in PREDICTORS if name not in (*LOOKING, *LISTENING, "path")]
"""Every member once beside plain others; all combinations are tested on pretended devices."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slots", BUDGETS)
def test_text_is_the_residents_under_every_policy(bench, slots, size):
    for cache, allocation, predictor in POLICIES:
        run = bench.run(slots, cache, allocation, predictor, size)

        assert run.texts == bench.resident[size], (cache, allocation, predictor)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slots", BUDGETS)
def test_log_of_every_run_replays_exactly(bench, slots, size):
    for cache, allocation, predictor in POLICIES:
        run = bench.run(slots, cache, allocation, predictor, size)

        report = replay(run.log, bench.spec(slots, cache, allocation, predictor), bench.shape)

        assert report.is_exact, (cache, allocation, predictor, report.first_difference)
        assert report.rows == len(run.log) > 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slots", BUDGETS)
def test_simulated_log_of_the_same_routing_is_the_real_one(bench, slots, size):
    for cache, allocation in PLACES:
        real = bench.run(slots, cache, allocation, "none", size).log

        simulated = bench.simulated(bench.spec(slots, cache, allocation), size)

        for place, (ours, theirs) in enumerate(zip(real, simulated, strict=False)):
            assert ours == theirs, (cache, allocation, place)
        assert len(real) == len(simulated)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("predictor", INFERRING)
def test_predictors_that_infer_say_here_what_they_say_in_the_simulator(bench, predictor, size):
    real = bench.run(8, "lru", "equal", predictor, size).log
    simulated = bench.simulated(bench.spec(8, predictor=predictor), size)

    said, expected = ([e for e in log if e.kind == "predict"] for log in (real, simulated))

    assert len(said) > 50
    assert said == expected


@pytest.mark.parametrize("slots", [3, 8, 12])
def test_text_and_replay_hold_when_prefetches_come_late(bench, slots):
    for cache, allocation in PLACES:
        run = bench.run(slots, cache, allocation, "gate_lookahead", 1, link=SLOW)

        report = replay(
            run.log, bench.spec(slots, cache, allocation, "gate_lookahead"), bench.shape
        )

        assert run.texts == bench.resident[1]
        assert report.is_exact, report.first_difference


@pytest.mark.parametrize("slots", [12, 17])
def test_text_and_replay_hold_when_prefetches_are_given_up(bench, slots):
    run = bench.run(slots, "lru", "equal", "gate_lookahead", 4, link=CRAWLING)

    report = replay(run.log, bench.spec(slots, "lru", "equal", "gate_lookahead"), bench.shape)

    assert run.texts == bench.resident[4]
    assert report.is_exact, report.first_difference


def test_lates_and_cancels_do_occur_in_these_runs(bench):
    """Else the tests above would show nothing."""
    runs = [bench.run(12, "lru", "global", "gate_lookahead", 1, link=SLOW)]
    runs += [
        bench.run(slots, "lru", "equal", "gate_lookahead", 4, link=CRAWLING) for slots in (12, 17)
    ]

    details = {entry.detail for run in runs for entry in run.log}
    kinds = {entry.kind for run in runs for entry in run.log}

    assert {"hit", "late", "miss", "prefetch", "demand"} <= details
    assert {"event", "load", "predict", "loaded", "release", "cancel"} <= kinds


def test_sequences_end_early_in_these_runs(bench):
    """Else steps would line up by chance."""
    lengths = {len(text) for text in bench.resident[1]}

    assert len(lengths) > 1


def test_text_would_show_a_wrong_expert(bench):
    """Else same text would be no proof: two experts are exchanged on the host, and back."""
    from expertflow.tracer.types import ExpertKey

    rows = [bench.machine.blocks.block(ExpertKey(1, expert)) for expert in range(8)]
    saved = [row.clone() for row in rows]
    try:
        for row, other in zip(rows, reversed(saved), strict=True):
            row.copy_(other)
        with bench.machine.session(bench.spec(12)) as session:
            from expertflow.runtime.machine import generate_all

            outputs = generate_all(
                bench.loaded, bench.prompts, observer=session, batch_size=1, max_new_tokens=5
            )
    finally:
        for row, own in zip(rows, saved, strict=True):
            row.copy_(own)

    assert [one.token_ids for one in outputs] != bench.resident[1]

"""Peaks of working tensors: forecast from short calibration runs, measured over every pass of a run."""

import pytest
from expertflow.runtime.calibrate import Calibration
from expertflow.runtime.forecasts import forecaster_of
from expertflow.tracer.generate import Prompt

from tests.runtime.bench import NEW_TOKENS


@pytest.fixture(scope="module")
def forecasters(bench):
    """By batch size, from a calibration on other prompts than all of them, and to another length."""
    found = {}
    for size in (1, 4):
        calibration = Calibration(
            bench.machine, bench.prompts[::2] * 2, batch_size=size, max_new_tokens=2
        )
        costs = calibration.measure(lambda _: None)
        found[size] = forecaster_of(bench.machine, bench.workloads[size], costs)
    return found


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("slots", [3, 8, 24])
@pytest.mark.parametrize("cache", ["lru", "static", "none"])
def test_the_forecast_peak_is_that_of_the_whole_run(bench, forecasters, cache, slots, size):
    spec = bench.spec(slots, cache, "global")

    found = forecasters[size].predict(spec).memory
    measured = bench.machine.peak_of_run(
        spec, bench.prompts, batch_size=size, max_new_tokens=NEW_TOKENS
    )

    assert (found.slots, found.non_expert_weights) == (measured.slots, measured.non_expert_weights)
    assert found.peak_device_bytes == pytest.approx(measured.peak_device_bytes, rel=0.02)
    working = (found.kv_cache + found.activations, measured.kv_cache + measured.activations)
    assert working[0] == pytest.approx(working[1], rel=0.15)


def test_the_peak_of_a_run_is_not_below_that_of_its_first_passes(bench):
    spec = bench.spec(8)

    first = bench.machine.peak_memory(spec, bench.prompts, 4)
    whole = bench.machine.peak_of_run(spec, bench.prompts, batch_size=4, max_new_tokens=NEW_TOKENS)

    assert whole.kv_cache + whole.activations >= 0.98 * (first.kv_cache + first.activations)


def test_a_long_text_peaks_where_its_cache_is_longest(bench):
    given = bench.prompts[0].token_ids
    short, long = (
        bench.machine.peak_of_run(
            bench.spec(24),
            [Prompt(0, given[:2], forced=given[:count])],
            batch_size=1,
            max_new_tokens=count,
        )
        for count in (1, len(given))
    )

    assert long.kv_cache >= bench.shape.kv_bytes_per_token * len(given)
    assert short.kv_cache <= bench.shape.kv_bytes_per_token * 3

"""A predictor is judged by the time it saves."""

from dataclasses import replace

import pytest
from expertflow.simulator.forecast import forecaster
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.worth import worth_of


@pytest.fixture(scope="module")
def ready(trace):
    return replace(forecaster(trace), decision_is_measured=True)


@pytest.fixture(scope="module")
def predicted(ready):
    return ready.predict(make_spec(slots=16, predictor="gate_lookahead"))


def test_worth_is_told_next_to_no_prediction_and_a_perfect_one(ready, predicted):
    without = ready.predict(make_spec(slots=16), with_bounds=False)
    perfect = ready.predict(make_spec(slots=16, predictor="oracle"), with_bounds=False)

    worth = predicted.worth

    assert worth.without_tokens_per_s == without.tokens_per_s
    assert worth.perfect_tokens_per_s == perfect.tokens_per_s
    assert worth.stall_saved_s == without.stall_s - predicted.stall_s
    saved_s = without.time.total_s - predicted.time.total_s
    assert worth.stall_saved_s - worth.spent_s == pytest.approx(saved_s)
    assert worth.extra_bytes_per_token == predicted.bytes_per_token - without.bytes_per_token


def faster(result, factor: float):
    return replace(result, tokens_per_s=result.tokens_per_s * factor)


@pytest.mark.parametrize(
    ("gain", "possible", "is_worth_it", "words"),
    [
        (1.2, 1.5, True, "Worth it here: +20.0%"),
        (1.001, 1.5, False, "Not worth it here: +0.1%"),
        (0.9, 1.4, False, "perfect prediction would give +40.0%"),
        (0.99, 1.002, False, "no predictor would be"),
    ],
)
def test_verdict_is_said_in_words(predicted, gain, possible, is_worth_it, words):
    worth = worth_of(faster(predicted, gain), predicted, faster(predicted, possible))

    assert worth.is_worth_it is is_worth_it
    assert words in worth.finding


@pytest.mark.parametrize("predictor", ["none", "oracle"])
def test_nothing_is_said_where_there_is_nothing_to_judge(ready, predictor):
    assert ready.predict(make_spec(slots=16, predictor=predictor)).worth is None

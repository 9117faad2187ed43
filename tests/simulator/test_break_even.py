"""From which recall a predictor pays, on machines where it can be told beforehand; and the command."""

import json

import pytest
from expertflow.simulator.break_even import _where, break_even, runs_of
from expertflow.simulator.forecast import Forecaster
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.policy.spec import Member, make_spec
from expertflow.tracer.errors import UsageError
from expertflow.tracer.main import main
from expertflow.tracer.probe import provenance
from expertflow.tracer.synthetic import synthetic_trace

from tests.builders import make_machine, make_steps

STEPS = 60


def ready_on(**costs) -> Forecaster:
    """Two layers of 8 experts; each layer turns to the next two experts, so that nothing ever hits."""
    steps = [
        [[(2 * n) % 8, (2 * n + 1) % 8], [(2 * n + 4) % 8, (2 * n + 5) % 8]] for n in range(STEPS)
    ]
    return Forecaster(
        workload=make_steps(steps),
        costs=make_machine(**costs),
        shape=tiny_shape(num_layers=2),
        trace_id="t",
        device="none",
        link="none",
        link_origin="declared",
        submit_s=0.0,
        decision_is_measured=True,
        is_declared=True,
        provenance=provenance(0, "imported"),
    )


SPEC = make_spec(slots=8)


def test_on_a_link_with_time_to_spare_any_recall_pays():
    found = break_even(ready_on(copy=0.1, experts=1.0), SPEC)

    assert found.recall is not None
    assert found.recall < 0.1
    assert found.until is None
    speeds = [point.tokens_per_s for point in found.points]
    assert speeds == sorted(speeds)
    assert found.points[0].gain == 0.0
    assert found.points[-1].tokens_per_s == pytest.approx(found.perfect_tokens_per_s)
    assert [point.recall for point in found.points] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert "pays here from a recall" in found.finding


def test_a_predictors_time_is_hidden_behind_the_copies_that_are_waited_for():
    # Without prefetch an event takes 1.2 s, of which it waits 0.2 s. 0.1 s of predicting fits into that.
    found = break_even(ready_on(copy=0.1, experts=1.0), SPEC, latency_s=0.1)

    assert found.points[0].gain == pytest.approx(0.0)
    assert found.points[-1].gain == pytest.approx(1.2 / 1.1 - 1.0, abs=0.01)


def test_one_that_takes_longer_than_all_copies_never_pays():
    found = break_even(ready_on(copy=0.1, experts=1.0), SPEC, latency_s=0.3)

    assert found.recall is None
    assert found.until is None
    assert "No predictor pays" in found.finding


def test_on_a_slow_link_wrong_copies_have_to_be_paid_for():
    slow = ready_on(copy=1.0, experts=0.1)

    found = break_even(slow, SPEC, precision=0.25)

    # Three of four copies are wrong: a few of them fit into the gaps, many do not.
    assert found.until is not None
    assert 0.2 < found.until < 0.4
    assert found.points[-1].gain < 0.0 < found.points[1].gain
    assert found.points[-1].wasted > found.points[1].wasted > 0
    less = break_even(slow, SPEC, precision=0.25, recalls=(found.until, found.until + 0.01))
    assert less.points[1].gain <= 0.0 < less.points[0].gain
    assert break_even(slow, SPEC, precision=1.0).until is None


def test_intervals_are_halved_where_paying_begins_and_ends():
    recalls = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

    assert _where(recalls, lambda recall: recall > 0.3) == (pytest.approx(0.3, abs=0.01), None)
    begins, until = _where(recalls, lambda recall: 0.3 < recall < 0.7)
    assert (begins, until) == (pytest.approx(0.3, abs=0.01), pytest.approx(0.7, abs=0.01))
    assert _where(recalls, lambda recall: False) == (None, None)
    assert _where(recalls, lambda recall: True) == (0.0, None)


def test_the_policys_own_predictor_is_replaced():
    advanced = []
    spec = make_spec(slots=8, predictor="previous_token")

    found = break_even(ready_on(copy=0.1, experts=1.0), spec, advance=advanced.append)

    assert found.policy == "lru @ 8 slots"
    assert 8 < sum(advanced) <= runs_of()
    assert spec.predictor == Member(name="previous_token")


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="precision"):
        break_even(ready_on(copy=0.1, experts=1.0), SPEC, precision=0.0)


# --- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return synthetic_trace(
        tmp_path_factory.mktemp("even") / "t", new_tokens=6, prompt_tokens=4, layers=3
    ).path


@pytest.fixture
def command(capsys):
    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        streams = capsys.readouterr()
        return int(stop.value.code or 0), streams.out, streams.err

    return run


def test_break_even_is_printed_and_written(command, small, tmp_path):
    path = tmp_path / "even.json"
    options = ("--budget", "0.25", "--precision", "0.5", "--latency", "20us", "--out", path)

    code, out, _ = command("break-even", small, *options)
    _, document, _ = command("break-even", small, *options, "--cache", "lfu", "--json")

    assert code == 0
    assert "Break-even of a predictor: lru @" in out
    assert "recall 0.4" in out
    found = json.loads(document)
    assert found == json.loads(path.read_text())
    assert found["format"] == "expertflow.break_even/1"
    assert found["latency_s"] == pytest.approx(20e-6)
    assert found["policy"].startswith("lfu @")
    assert len(found["points"]) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--precision", "2"), "precision"),
        (("--latency", "soon"), "for example 200us"),
        (("--cache", "lruu"), "Did you mean 'lru'"),
        (("--cache-param", "x=1"), "takes no parameters"),
    ],
)
def test_break_even_says_what_is_wrong(command, small, options, words):
    code, _, err = command("break-even", small, *options)

    assert code == 2
    assert words in " ".join(err.split())


@pytest.mark.parametrize(
    "name", ["previous_token", "previous_layer", "popular", "token_table", "markov"]
)
def test_simulate_takes_predictors_that_learn(command, small, name):
    params = ("--predictor-param", "horizon=2", "--predictor-param", "width=1")

    code, out, _ = command("simulate", small, "--predictor", name, *params, "--json")

    document = json.loads(out)
    assert code == 0
    assert document["policy"]["predictor"] == f"{name}(horizon=2, width=1)"
    # What the last token used is in an LRU already.
    assert (document["prefetch"]["issued"] > 0) == (name != "previous_token")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--predictor", "markov", "--predictor-param", "widht=1"), "Did you mean 'width'"),
        (("--predictor", "markov", "--predictor-param", "width"), "KEY=VALUE"),
        (("--predictor", "markov", "--predictor-param", "width=wide"), "a whole number"),
        (("--predictor", "markov", "--predictor-param", "width=1.5"), "a whole number"),
        (("--predictor", "markov", "--predictor-param", "transitions=[]"), "Known: horizon, width"),
        (("--predictor", "popular", "--predictor-param", "horizon=0"), "horizon >= 1"),
        (("--predictor-param", "depth=1"), "takes no parameters"),
        (("--cache", "slru", "--cache-param", "protect=0.5"), "Did you mean 'protected'"),
        (
            ("--cache", "slru", "--cache-param", "protected=1", "--cache-param", "protected=1"),
            "given twice",
        ),
        (("--policy", "policy.json", "--cache-param", "a=1"), "--policy brings its own"),
    ],
)
def test_simulate_refuses_parameters_that_are_not_there(command, small, options, words):
    code, _, err = command("simulate", small, *options)

    assert code == 2
    assert words in " ".join(err.split())

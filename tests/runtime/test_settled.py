"""Everything resident: the core is told later, and nobody can tell the difference."""

from dataclasses import replace

import pytest
from expertflow.runtime.machine import generate_all
from expertflow.runtime.session import Session
from expertflow.simulator.costs import Linear
from expertflow.simulator.policy.replay import replay

from tests.runtime.bench import COSTS, CPU, NEW_TOKENS


def spec(bench, cache="static", **more):
    return bench.spec(bench.shape.total_experts, cache, **more)


def run(bench, chosen, size=1, *, settles=True, keep_log=True):
    session = Session(
        bench.loaded, bench.machine.blocks, chosen, CPU, settles=settles, keep_log=keep_log
    )
    try:
        outputs = generate_all(
            bench.loaded,
            bench.prompts,
            observer=session,
            batch_size=size,
            max_new_tokens=NEW_TOKENS,
        )
        was_settled = bool(session.settled)
        return [one.token_ids for one in outputs], session, was_settled
    finally:
        session.close()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("cache", ["static", "lru", "sieve"])
def test_log_counts_and_text_are_those_of_a_core_that_is_always_asked(bench, cache, size):
    text, session, was_settled = run(bench, spec(bench, cache), size)
    asked_text, asked, was_asked_settled = run(bench, spec(bench, cache), size, settles=False)

    assert text == asked_text == bench.resident[size]
    assert session.log == asked.log
    assert session.outcomes == asked.outcomes
    assert replay(session.log, spec(bench, cache), bench.shape).is_exact
    assert not was_asked_settled
    if cache == "static":
        assert was_settled
        assert session.outcomes["misses"] == 0
    rows, others = session.take_steps(), asked.take_steps()
    for name in ("step", "layer", "distinct", "waves"):
        assert rows[name] == others[name]


def test_the_log_may_be_read_in_between(bench):
    with bench.machine.session(spec(bench)) as session:
        before = len(session.log)
        first = generate_all(
            bench.loaded,
            bench.prompts[:1],
            observer=session,
            batch_size=1,
            max_new_tokens=2,
        )
        middle = len(session.log)
        generate_all(
            bench.loaded, bench.prompts[:1], observer=session, batch_size=1, max_new_tokens=2
        )

        assert first
        assert before == bench.shape.total_experts  # warm loads
        assert middle - before == len(session.log) - middle > 0


def test_without_a_log_hits_are_counted(bench):
    _, logged, _ = run(bench, spec(bench))
    _, session, was_settled = run(bench, spec(bench), keep_log=False)

    assert was_settled
    assert session.log == []
    assert session.outcomes == logged.outcomes


@pytest.mark.parametrize(
    ("cache", "more"),
    [
        ("none", {}),
        ("lru", {"predictor": "gate_lookahead"}),
        ("score", {}),
    ],
)
def test_policies_that_let_go_or_listen_are_asked_every_time(bench, cache, more):
    chosen = spec(bench, cache, **more)

    text, session, was_settled = run(bench, chosen)

    assert not was_settled
    assert text == bench.resident[1]
    assert replay(session.log, chosen, bench.shape).is_exact


def test_one_slot_too_few_is_never_settled(bench):
    chosen = spec(bench).with_slots(bench.shape.total_experts - 1)

    assert not run(bench, chosen)[2]
    assert not chosen.may_settle(bench.shape.total_experts)


def test_calibration_sees_what_deciding_takes(bench):
    with bench.machine.always_asking(), bench.machine.session(spec(bench)) as session:
        assert not session.settled
    with bench.machine.session(spec(bench)) as session:
        assert session.settled


def test_forecasts_of_settled_policies_charge_loads_and_no_decisions(bench):
    costs = replace(
        COSTS, decode=replace(COSTS.decode, decision=Linear((1e-5, 2e-5, 3e-5)))
    ).without_decisions()

    assert costs.decision_s("decode", 4, 0) == 0.0
    assert costs.decision_s("decode", 4, 2) == pytest.approx(6e-5)
    assert spec(bench).may_settle(bench.shape.total_experts)

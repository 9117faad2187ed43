"""Residents are computed while the rest of the event is copied: the same text, the simulator's decisions."""

import pytest
from expertflow.runtime.machine import generate_all
from expertflow.runtime.store import ExpertStore
from expertflow.simulator.activations import ONE_CALL, wave_rows
from expertflow.simulator.policy.replay import replay
from expertflow.tracer.schema import WHOLE_STEP
from expertflow.tracer.slotwise import SlotCompute

from tests.runtime.bench import NEW_TOKENS, SIZES, SLOW

SLOTS = (2, 8, 13, 24)
"""Less than an event, a layer's experts, half and one, all."""


def resident_first(bench, slots, predictor="none", **more):
    return bench.spec(slots, "lru", "global", predictor, misses="resident_first", **more)


def ran(bench, spec, size, link=None):
    bench.machine.link = link
    try:
        with bench.machine.session(spec) as session:
            outputs = generate_all(
                bench.loaded,
                bench.prompts,
                observer=session,
                batch_size=size,
                max_new_tokens=NEW_TOKENS,
            )
            texts = [one.token_ids for one in outputs]
            return texts, session.log, session.take_steps(), list(session.copies())
    finally:
        bench.machine.link = None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slots", SLOTS)
def test_text_and_decisions_are_what_they_were(bench, slots, size):
    spec = resident_first(bench, slots)
    texts, log, _, _ = ran(bench, spec, size)

    assert texts == bench.resident[size]
    assert replay(log, spec, bench.shape).is_exact
    assert log == bench.simulated(spec, size)


@pytest.mark.parametrize("predictor", ["gate_lookahead", "adaptive", "adaptive_forest"])
def test_text_and_replay_hold_when_prefetches_come_late(bench, predictor):
    spec = resident_first(bench, 12, predictor)
    texts, log, _, _ = ran(bench, spec, 1, SLOW)

    assert texts == bench.resident[1]
    assert replay(log, spec, bench.shape).is_exact
    assert any(entry.detail == "prefetch" for entry in log)


def test_residents_are_computed_between_asking_for_copies_and_waiting_for_them(bench, monkeypatch):
    calls: list[str] = []

    def noted(owner, name):
        real = getattr(owner, name)

        def call(self, *told):
            # Asking for nothing and waiting for nothing are no events.
            if name == "wave" or told[-1]:
                calls.append(name)
            return real(self, *told)

        monkeypatch.setattr(owner, name, call)

    noted(ExpertStore, "submit")
    noted(ExpertStore, "wait")
    noted(SlotCompute, "wave")
    _, log, steps, _ = ran(bench, resident_first(bench, 12), 1)
    split = sum(
        count == 2 and layer != WHOLE_STEP
        for count, layer in zip(steps["waves"], steps["layer"], strict=True)
    )
    walked = " ".join(calls)

    assert split > 10
    assert walked.count("submit wave wait wave") == split
    rows = wave_rows(log, bench.loaded.shape.num_moe_layers)
    assert any(later != ONE_CALL for layers in rows.values() for _, later in layers)

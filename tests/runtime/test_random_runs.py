"""Two thousand random runs on experts that exist in name only: nothing hangs, nothing is computed with wrong weights.

Each is a policy, a size, a batch and a trace drawn by lot. It is driven twice: on a pretended device, where prefetches
end, fail and are cancelled in random order; and by the runtime's own driver, with the real copy thread behind a random
link, where they come when they come. Blocks that hold their own number show what each slot really has.
"""

import faulthandler
import time
from dataclasses import replace

import pytest
import torch
from expertflow.runtime.driver import Driver
from expertflow.runtime.fake import FaultyBlocks, LabelledBlocks
from expertflow.runtime.store import ExpertStore
from expertflow.simulator.outcomes import prefetch_outcomes
from expertflow.simulator.policy.base import Signals
from expertflow.simulator.policy.checked import (
    Dice,
    random_script,
    require_replay,
    tiny_lessons,
    tiny_shape,
)
from expertflow.simulator.policy.registry import allocations, caches, misses, predictors
from expertflow.simulator.policy.replay import replay
from expertflow.simulator.policy.spec import make_spec
from expertflow.tracer.errors import ResourceError
from expertflow.tracer.quantities import LinkSpec
from expertflow.tracer.types import ExpertKey

from tests.runtime.bench import deployable

RUNS = 2000
PARTS = 8
LINKS = (None, None, LinkSpec.parse("1GB/s+5us"), LinkSpec.parse("1GB/s+60us"))
"""Copies that end before they are looked for, soon after, and mostly late."""
STUCK_S = 120
CPU = torch.device("cpu")
MEMBERS = {family.kind: deployable(family) for family in (caches, predictors, allocations, misses)}


@pytest.fixture(autouse=True)
def _says_where_it_hangs():
    faulthandler.dump_traceback_later(STUCK_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def drawn(seed: int):
    """A shape, a policy that can be deployed on it, and a script of events with batches of all sizes."""
    dice = Dice(seed)
    shape = tiny_shape(1 + dice.below(4), 3 + dice.below(6), 1 + dice.below(3))
    some = {kind: dice.some(names, 1)[0] for kind, names in MEMBERS.items()}
    total = shape.total_experts
    slots = (1, 2, shape.num_experts, 1 + dice.below(total), total)[dice.below(5)]
    spec = make_spec(slots=slots, **some, **tiny_lessons(shape))
    script = random_script(
        shape, dice.below(10**6), steps=2 + dice.below(4), failures=seed % 3 == 0
    )
    return shape, spec, [told(event, shape, dice) for event in script]


def told(event, shape, dice: Dice):
    """An event with all that predictors listen to, or with given predictions instead."""
    if dice.below(3) == 0:
        return event
    top_k, experts = shape.top_k, range(shape.num_experts)
    ahead = range(1, shape.num_moe_layers - event.layer)
    rows = [event.experts[place : place + top_k] for place in range(0, len(event.experts), top_k)]
    signals = Signals(
        {depth: [dice.some(experts, top_k) for _ in rows] for depth in ahead},
        rows,
        [dice.below(3) for _ in rows],
        [dice.below(30) - 1 for _ in rows],
        {depth: [dice.some(experts, 2 * top_k) for _ in rows] for depth in ahead},
    )
    return replace(event, predicted=None, signals=signals)


class Watched:
    """Stands for the computation: looks at the weights that would be used, and says if they are somebody else's."""

    def __init__(self, blocks: LabelledBlocks, store: ExpertStore, event) -> None:
        self._blocks, self._store, self._event = blocks, store, event
        self.seen: list[int] = []
        self.on_cpu: list[int] = []

    def hand_over(self, experts) -> None:
        self.on_cpu = list(experts)

    def signals(self) -> Signals:
        return self._event.signals

    def wave(self, wave, *, is_all) -> None:
        assert len(set(wave.slots)) == len(wave.slots)
        for expert, slot in zip(wave.experts, wave.slots, strict=True):
            held = self._blocks.holder(self._store.arena.slot(slot))
            assert held == (self._event.layer, expert), f"slot {slot} holds {held}, not {expert}"
        self.seen += wave.experts
        if is_all:
            assert sorted(self.seen) == list(self._event.experts)

    def take_back(self) -> None:
        for expert in self.on_cpu:
            key = ExpertKey(self._event.layer, expert)
            assert self._blocks.holder(self._blocks.block(key)) == key
        self.seen += self.on_cpu


def run(seed: int):
    """One run by the runtime's driver; checks it, and returns what became of it."""
    shape, spec, script = drawn(seed)
    luck = Dice(~seed)
    labelled = LabelledBlocks(shape)
    is_faulty = seed % 4 == 1
    blocks = FaultyBlocks(labelled, lambda key: is_faulty and luck.below(12) == 0)
    log, failed = [], 0
    core = spec.build(shape, log=log)
    store = ExpertStore(
        blocks,
        spec.slots,
        CPU,
        time.perf_counter,
        link=LINKS[luck.below(4)],
        writes_back=spec.writes_back,
    )
    driver = Driver(core, store, lambda name: None)
    try:
        while True:
            try:
                driver.warm()
                break
            except ResourceError:
                is_faulty = False  # a session that cannot be warmed is not opened
                core, log[:] = spec.build(shape, log=log), []
                driver = Driver(core, store, lambda name: None)
        for event in script:
            driver.step, driver.is_prefill = event.step, event.facts.is_prefill
            work = Watched(labelled, store, event)
            tokens = event.facts.tokens or [1] * len(event.experts)
            try:
                driver.event(event.layer, event.experts, tokens, event.facts.weights, work)
            except ResourceError as error:
                if not is_faulty:
                    raise AssertionError(f"a copy failed by itself: {error}") from error
                failed += 1
            else:
                assert sorted(work.seen) == list(event.experts)
        settle(driver, core, store, shape)
        check_places(core, store, labelled, shape)
        rows = store.rows()
    finally:
        store.close()
    check_counts(driver, log, rows, script, failed, is_faulty)
    assert replay(log, spec, shape).is_exact
    return log, failed


def keys_of(shape) -> list[ExpertKey]:
    return [
        ExpertKey(la, e) for la in range(shape.num_moe_layers) for e in range(shape.num_experts)
    ]


def settle(driver: Driver, core, store: ExpertStore, shape) -> None:
    """Let all that is on its way arrive."""
    while any(core.is_loading(key) for key in keys_of(shape)):
        for key in store.failed():
            core.lost(driver.step, key)
        for key in store.arrived():
            core.loaded(driver.step, key)
        time.sleep(2e-5)


def check_places(core, store: ExpertStore, blocks: LabelledBlocks, shape) -> None:
    """Whoever counts as resident is in its slot, alone, and no slot is lost."""
    residents = {key: slot for key in keys_of(shape) if (slot := core.slot_of(key)) is not None}
    assert len(set(residents.values())) == len(residents)
    for key, slot in residents.items():
        assert blocks.holder(store.arena.slot(slot)) == key
    free = [slot for pool in core.pools for slot in pool.free]
    assert sorted([*free, *residents.values()]) == list(
        range(sum(len(p.slots) for p in core.pools))
    )


def check_counts(driver: Driver, log, rows, script, failed: int, is_faulty: bool) -> None:
    """Every expert that was demanded is a hit, late or a miss; every copy was asked for by the log."""
    demanded = sum(len(event.experts) for event in script)
    outcomes = driver.outcomes
    assert sum(outcomes.values()) == demanded
    told = [entry.detail for entry in log if entry.kind == "event"]
    assert (told.count("hit"), told.count("late")) == (outcomes["hits"], outcomes["lates"])
    assert told.count("miss") + told.count("cpu") == outcomes["misses"]
    asked = [entry.detail for entry in log if entry.kind == "load"]
    if is_faulty:
        return
    assert failed == 0
    assert not any(entry.kind == "lost" for entry in log)
    assert sum(row.why == "demand" for row in rows) == asked.count("demand") == told.count("miss")
    found = prefetch_outcomes(log)
    assert found.issued == asked.count("prefetch")
    assert found.issued == found.useful + found.late + found.wasted + found.cancelled


@pytest.mark.parametrize("part", range(PARTS))
def test_runs_compute_with_the_right_weights_count_right_and_replay(part):
    for seed in range(part, RUNS, PARTS):
        try:
            run(seed)
        except AssertionError as error:
            raise AssertionError(f"run {seed}: {drawn(seed)[1].label}: {error}") from error


@pytest.mark.parametrize("part", range(PARTS))
def test_endings_failures_and_cancels_in_any_order_replay(part):
    for seed in range(part, RUNS, PARTS):
        shape, spec, script = drawn(seed)
        try:
            require_replay(spec, shape, script)
        except AssertionError as error:
            raise AssertionError(f"run {seed}: {spec.label}: {error}") from error


def test_the_runs_meet_what_they_are_for():
    logs = {seed: run(seed) for seed in range(1, 400, 4)}
    kinds = {entry.kind for log, _ in logs.values() for entry in log}
    details = {entry.detail for log, _ in logs.values() for entry in log}
    waves = {entry.wave for log, _ in logs.values() for entry in log}

    assert kinds == {"event", "load", "cancel", "predict", "loaded", "lost", "release"}
    assert details >= {"hit", "late", "miss", "cpu", "demand", "prefetch", "warm"}
    assert max(waves) >= 2
    assert sum(failed for _, failed in logs.values()) > 20

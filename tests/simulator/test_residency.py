"""The decision core: what must hold for any events, and small cases worked out by hand."""

from collections.abc import Iterator, Sequence
from functools import cache as memoized
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from expertflow.simulator.policy.base import BaseCache, Facts, Signals
from expertflow.simulator.policy.checked import (
    CheckedDriver,
    ScriptedEvent,
    random_script,
    require_replay,
    tiny_lessons,
    tiny_shape,
)
from expertflow.simulator.policy.future import NEVER, Future
from expertflow.simulator.policy.log import Entry
from expertflow.simulator.policy.ranked import Ranked
from expertflow.simulator.policy.registry import allocations, caches, misses, predictors
from expertflow.simulator.policy.replay import replay
from expertflow.simulator.policy.residency import Residency
from expertflow.simulator.policy.spec import PolicySpec, make_spec
from expertflow.tracer.types import ExpertKey
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "gpt-oss-20b-decode" / "routing.npz"
OTHER_CACHES = [name for name in caches.names() if name != "belady"]


# --- anything goes -----------------------------------------------------------------------------


def facts_of(step: int, tokens: Sequence[int]) -> Facts:
    """Facts of prefill in the first two steps; weights a third of the tokens."""
    return Facts(step < 2, tuple(tokens), tuple(count / 3 for count in tokens))


@st.composite
def scripts(draw: st.DrawFn, layers: int, experts: int) -> list[ScriptedEvent]:
    """Random events, empty to larger than any pool, with random prefetches ending in random order."""
    key = st.builds(ExpertKey, st.integers(0, layers), st.integers(0, experts - 1))
    event = st.tuples(
        st.integers(0, layers - 1),
        st.sets(st.integers(0, experts - 1)),
        st.one_of(st.none(), st.lists(key, max_size=6)),
        st.lists(st.integers(0, 9), max_size=4),
        st.lists(st.lists(st.integers(0, experts - 1), max_size=3), max_size=2),
        st.lists(st.integers(1, 9), min_size=experts, max_size=experts),
    )
    drawn = draw(st.lists(event, min_size=1, max_size=14))
    return [
        ScriptedEvent(
            step,
            layer,
            tuple(sorted(wanted)),
            None if predicted is None else tuple(predicted),
            tuple(ends),
            Signals({1: ahead} if layer + 1 < layers else {}),
            facts_of(step, [tokens[expert] for expert in sorted(wanted)]),
        )
        for step, (layer, wanted, predicted, ends, ahead, tokens) in enumerate(drawn)
    ]


@st.composite
def situations(draw: st.DrawFn) -> tuple[PolicySpec, int, int, list[ScriptedEvent]]:
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    spec = make_spec(
        slots=draw(st.integers(1, layers * experts)),
        cache=draw(st.sampled_from(caches.names())),
        allocation=draw(st.sampled_from(allocations.names())),
        predictor=draw(st.sampled_from(predictors.names())),
        misses=draw(st.sampled_from(misses.names())),
        **tiny_lessons(tiny_shape(layers, experts)),
    )
    return spec, layers, experts, draw(scripts(layers, experts))


@settings(max_examples=200, deadline=None)
@given(situations())
def test_any_events_are_served_safely_and_the_log_replays(situation):
    spec, layers, experts, script = situation

    # CheckedDriver holds the promises: slots are never shared, each expert of an event runs once, in a
    # slot that holds it; no wave evicts its own; loading experts give way to a cancel alone; counts add up.
    log = require_replay(spec, tiny_shape(layers, experts), script)

    demanded = [(entry.step, entry.expert) for entry in log if entry.kind == "event"]
    assert len(demanded) == len(set(demanded)) == sum(len(event.experts) for event in script)


@settings(max_examples=60, deadline=None)
@given(situations())
def test_loading_experts_lose_their_slot_to_a_cancel_alone(situation):
    spec, layers, experts, script = situation
    future = Future([event.keys for event in script])
    log: list[Entry] = []
    CheckedDriver(spec.build(tiny_shape(layers, experts), future=future, log=log)).run(script)

    loading: dict[int, ExpertKey] = {}
    for entry in log:
        key = ExpertKey(entry.layer, entry.expert)
        if entry.kind == "load":
            assert entry.slot not in loading
            if entry.detail == "prefetch":
                loading[entry.slot] = key
        elif entry.kind in ("cancel", "loaded") or entry.detail == "late":
            loading = {slot: held for slot, held in loading.items() if held != key}


@settings(max_examples=60, deadline=None)
@given(situations())
def test_a_changed_log_is_caught(situation):
    spec, layers, experts, script = situation
    log = require_replay(spec, tiny_shape(layers, experts), script)
    assume(any(event.experts for event in script))
    place = next(place for place, entry in enumerate(log) if entry.kind == "event")
    log[place] = log[place]._replace(slot=log[place].slot + 1)

    report = replay(log, spec, tiny_shape(layers, experts))

    assert not report.is_exact
    assert report.equal == report.rows - 1
    assert f"row {place}: recorded" in report.first_difference


def test_a_log_cut_short_or_of_another_policy_is_caught():
    shape, script = tiny_shape(1, 4), events([(0, 1), (2,), (0, 3), (1,), (2,), (0,)])
    spec = make_spec(slots=2, cache="lru")
    log = require_replay(spec, shape, script)

    assert not replay(log, make_spec(slots=3, cache="lru"), shape).is_exact
    assert not replay(log, make_spec(slots=2, cache="none"), shape).is_exact
    assert not replay(log[:-2] + log[-1:], spec, shape).is_exact
    assert replay([], spec, shape).is_exact


# --- facts ---------------------------------------------------------------------------------------


class Lightest(BaseCache):
    """Evicts what the router gave least weight when it was demanded last."""

    name = "lightest"
    needs = frozenset({"gate_weights"})
    is_lossless = True

    def __init__(self) -> None:
        self._ranked = Ranked()
        self._weights: dict[ExpertKey, float] = {}

    def begin(self, keys, facts):
        self._weights = dict(zip(keys, facts.weights, strict=bool(facts.weights)))

    def admit(self, key):
        self._ranked.put(key, (self._weights.get(key, 0.0), 0.0))

    touch = admit

    def remove(self, key):
        self._ranked.drop(key)

    def victim(self, protected):
        return self._ranked.lowest(protected)


@pytest.fixture
def lightest() -> Iterator[str]:
    caches.register("lightest", Lightest)
    yield "lightest"
    caches.unregister("lightest")


def test_policy_that_weighs_experts_replays_from_its_log_alone(lightest):
    shape = tiny_shape()
    spec = make_spec(slots=7, cache=lightest, misses="sooner", **tiny_lessons(shape))

    log = require_replay(spec, shape, random_script(shape, 1))

    assert {entry.detail for entry in log if entry.kind == "event"} >= {"hit", "miss", "cpu"}
    # Else the log would not have needed them.
    for fact in ({"weight": 1.0}, {"tokens": 1}):
        changed = [e._replace(**fact) if e.kind == "event" else e for e in log]
        assert not replay(changed, spec, shape).is_exact, fact


def event_rows(spec: PolicySpec, facts: Facts | None) -> list[Entry]:
    log: list[Entry] = []
    core = spec.build(tiny_shape(1, 6), log=log)
    told = () if facts is None else (facts,)
    core.demand(0, 0, [1, 4], *told)
    return [entry for entry in log if entry.kind == "event"]


def test_log_holds_the_facts_of_each_expert(lightest):
    facts = Facts(True, (3, 1), (1.5, 0.25))

    rows = event_rows(make_spec(slots=1, cache=lightest), facts)

    assert [(e.expert, e.wave, e.tokens, e.weight, e.is_prefill) for e in rows] == [
        (1, 0, 3, 1.5, True),
        (4, 1, 1, 0.25, True),
    ]


def test_log_leaves_out_weights_that_nobody_decides_by():
    rows = event_rows(make_spec(slots=1), Facts(True, (3, 1), (1.5, 0.25)))

    assert [(e.tokens, e.weight, e.is_prefill) for e in rows] == [(3, -1.0, True), (1, -1.0, True)]


def test_facts_nobody_knows_are_one_token_each_and_no_weight():
    rows = event_rows(make_spec(slots=1), None)

    assert [(e.tokens, e.weight, e.is_prefill) for e in rows] == [(1, -1.0, False)] * 2


def test_experts_on_the_cpu_stay_out_of_the_slots_and_are_logged_as_such():
    log: list[Entry] = []
    times = {"copy_s": 2.0, "expert_s": 0.5, "token_s": 0.25}
    spec = make_spec(slots=4, misses="sooner", cpu_times=times)
    core = spec.build(tiny_shape(1, 6), log=log)

    # CPU: 0.75 for expert 1 and 2.75 for expert 4; both on the link: 4; one each: 2.
    answer = core.demand(0, 0, [1, 4], Facts(False, (1, 9)))

    assert (answer.hits, answer.lates, answer.misses, answer.on_cpu) == (0, 0, 2, (1,))
    assert [load.key.expert for load in answer.waves[0].loads] == [4]
    assert core.slot_of(ExpertKey(0, 1)) is None
    cpu, loaded = (entry for entry in log if entry.kind == "event")
    assert (cpu.expert, cpu.detail, cpu.slot, cpu.wave, cpu.tokens) == (1, "cpu", -1, -1, 1)
    assert (loaded.expert, loaded.detail, loaded.tokens) == (4, "miss", 9)


# --- by hand -----------------------------------------------------------------------------------


def events(rows: Sequence[Sequence[int]]) -> list[ScriptedEvent]:
    """Demand-only events of layer 0."""
    return [ScriptedEvent(step, 0, tuple(sorted(row))) for step, row in enumerate(rows)]


def driver(
    rows: Sequence[Sequence[int]], slots: int, cache: str, *, experts: int = 6, **more
) -> CheckedDriver:
    shape = tiny_shape(1, experts)
    spec = make_spec(slots=slots, cache=cache, **(tiny_lessons(shape) | more))
    future = Future([event.keys for event in events(rows)])
    return CheckedDriver(spec.build(shape, future=future))


def evictions(rows: Sequence[Sequence[int]], slots: int, cache: str, **more) -> list[list[int]]:
    """Who is evicted by each event."""
    running = driver(rows, slots, cache, **more)
    return [
        [load.evicts.expert for wave in answer.waves for load in wave.loads if load.evicts]
        for answer in running.run(events(rows))
    ]


def hits(rows: Sequence[Sequence[int]], slots: int, cache: str, **more) -> int:
    return sum(answer.hits for answer in driver(rows, slots, cache, **more).run(events(rows)))


def test_lru_evicts_what_was_demanded_longest_ago():
    assert evictions([(0,), (1,), (2,), (0,), (3,), (1,)], 3, "lru") == [[], [], [], [], [1], [2]]


def test_lru_never_evicts_an_expert_of_the_same_event():
    # One by one, loading 2 would evict 0, which the same event needs.
    assert evictions([(0,), (1,), (0, 2)], 2, "lru") == [[], [], [1]]


def test_lfu_evicts_what_was_demanded_least():
    assert evictions([(0,), (0,), (1,), (2,), (3,)], 2, "lfu") == [[], [], [], [1], [2]]


def test_lfu_breaks_ties_by_the_least_recent_use():
    assert evictions([(0,), (1,), (1,), (0,), (2,)], 2, "lfu") == [[], [], [], [], [1]]


def test_lfu_counts_start_again_at_admission():
    # 0 has three demands, is pushed out by busier ones, and comes back as a beginner.
    rows = [(0,), (0,), (1,), (1,), (1,), (2,), (0,), (3,)]

    assert evictions(rows, 2, "lfu") == [[], [], [], [], [], [0], [2], [0]]


def test_static_starts_with_the_most_popular_and_gives_up_the_least():
    rows = [(3,), (0,), (1,), (2,)]

    running = driver(rows, 2, "static", experts=4, popularity=[[9, 1, 5, 7]])
    assert set(running.contents.values()) == {ExpertKey(0, 0), ExpertKey(0, 3)}
    gone = evictions(rows, 2, "static", experts=4, popularity=[[9, 1, 5, 7]])

    assert gone == [[], [], [3], [1]]


def test_no_cache_keeps_nothing():
    running = driver([(0, 1), (0, 1)], 4, "none")

    answers = running.run(events([(0, 1), (0, 1)]))

    assert [answer.misses for answer in answers] == [2, 2]
    assert running.contents == {}


def test_lru_takes_the_experts_of_one_event_for_equally_recent_hit_or_missed():
    # 4 hits and 1 misses: 1 goes first, for its number alone.
    assert evictions([(4,), (1, 4), (2,), (3,)], 2, "lru") == [[], [], [1], [4]]


def kept(rows: Sequence[Sequence[int]], slots: int, cache: str, **more) -> list[set[int]]:
    """Who is resident after each event."""
    running = driver(rows, slots, cache, **more)
    found: list[set[int]] = []
    for event in events(rows):
        running.event(event)
        found.append({key.expert for key in running.contents.values()})
    return found


def test_belady_keeps_what_is_needed_soonest_a_miss_if_it_pays():
    rows = [(0,), (1,), (2,), (1,), (0,), (2,)]

    # Event 2 misses expert 2, which is needed after 1 and 0: it is used and let go.
    assert kept(rows, 2, "belady")[:4] == [{0, 1}] * 4
    assert hits(rows, 2, "belady") == 4


def test_belady_need_not_give_a_slot_to_an_expert_used_once():
    rows = [(0, 1), (2,), (0, 1)]

    assert hits(rows, 2, "belady") == 4
    assert hits(rows, 2, "belady_forced") == 3


def test_belady_runs_an_event_larger_than_its_pool_in_one_wave():
    rows = [(0,), (0, 1, 2, 3), (2,)]
    running = driver(rows, 1, "belady")

    answers = running.run(events(rows))

    assert [len(answer.waves) for answer in answers] == [1, 1, 1]
    assert [answer.hits for answer in answers] == [1, 1, 1]
    assert set(running.contents.values()) == {ExpertKey(0, 2)}
    assert running.core.num_slots == running.core.pool_slots(0) == 1


def test_belady_forced_evicts_what_is_needed_last_for_every_miss():
    rows = [(0,), (1,), (2,), (1,), (0,), (2,)]

    # 2 takes the slot of 0, which is needed after 1; then 0 that of 1, which is needed no more.
    assert evictions(rows, 2, "belady_forced") == [[], [], [0], [], [1], []]
    assert kept(rows, 2, "belady_forced")[2:] == [{1, 2}, {1, 2}, {0, 2}, {0, 2}]


@pytest.mark.parametrize("cache", ["belady", "belady_forced"])
def test_clairvoyant_caches_start_with_what_is_needed_first(cache):
    running = driver([(5,), (3,), (1,)], 2, cache)

    assert set(running.contents.values()) == {ExpertKey(0, 5), ExpertKey(0, 3)}


def test_prefetches_take_no_slots_that_only_a_running_event_may_use():
    rows = [(0, 1), (2,), (0,), (1,)]
    running = driver(rows, 2, "belady")
    core, keys = running.core, [ExpertKey(0, expert) for expert in (3, 4, 5)]
    core.demand(0, 0, [0, 1])
    core.release(0, 0)
    core.demand(1, 0, [2])

    loads = core.prefetch(1, keys)

    # Expert 2 runs beside the two slots. They go to two prefetches, the one needed last first.
    assert [(load.key, load.evicts) for load in loads] == [
        (keys[0], ExpertKey(0, 1)),
        (keys[1], ExpertKey(0, 0)),
    ]
    core.release(1, 0)
    assert core.slot_of(ExpertKey(0, 2)) is None  # both slots await a prefetch
    core.loaded(2, keys[0])
    core.loaded(2, keys[1])
    assert [core.slot_of(key) is not None for key in keys] == [True, True, False]


def test_prefetch_takes_a_free_slot_before_it_evicts_even_beside_staging():
    core = driver([(0,), (1,)], 3, "belady").core  # starts with 0 and 1
    core.demand(0, 0, [0])

    first, second = core.prefetch(0, [ExpertKey(0, 5), ExpertKey(0, 4)])

    assert (first.evicts, second.evicts) == (None, ExpertKey(0, 1))


def test_event_larger_than_its_pool_runs_in_waves_with_what_is_there_first():
    running = driver([(2, 3), (0, 1, 2, 3, 4)], 2, "lru")

    _, answer = running.run(events([(2, 3), (0, 1, 2, 3, 4)]))

    assert [wave.experts for wave in answer.waves] == [(2, 3), (0, 1), (4,)]
    assert (answer.hits, answer.lates, answer.misses) == (2, 0, 3)


def test_one_slot_serves_any_event():
    answers = driver([(0, 1, 2, 3)], 1, "lru").run(events([(0, 1, 2, 3)]))

    assert [wave.slots for wave in answers[0].waves] == [(0,)] * 4


def test_late_prefetch_is_late_and_not_a_hit():
    spec = make_spec(slots=4, cache="lru")
    core = spec.build(tiny_shape(1, 6))
    core.demand(0, 0, [0])
    (load,) = core.prefetch(0, [ExpertKey(0, 5)])
    core.release(0, 0)

    answer = core.demand(1, 0, [0, 5])

    assert (answer.hits, answer.lates, answer.misses) == (1, 1, 0)
    assert answer.waves[0].late == (ExpertKey(0, 5),)
    assert load.slot in answer.waves[0].slots
    assert core.slot_of(ExpertKey(0, 5)) == load.slot


def test_prefetch_gives_way_when_demand_needs_its_slot():
    core = make_spec(slots=2, cache="lru").build(tiny_shape(1, 6))
    core.demand(0, 0, [0])
    core.prefetch(0, [ExpertKey(0, 4)])
    core.release(0, 0)

    answer = core.demand(1, 0, [1, 2])

    assert answer.cancels == (ExpertKey(0, 4),)
    assert answer.misses == 2
    core.loaded(1, ExpertKey(0, 4))  # it ends anyway: nobody cares
    assert core.slot_of(ExpertKey(0, 4)) is None


def test_prefetch_does_not_evict_the_event_or_its_own_companions():
    core = make_spec(slots=3, cache="lru").build(tiny_shape(1, 6))
    core.demand(0, 0, [0, 1, 2])

    assert core.prefetch(0, [ExpertKey(0, 3)]) == []
    core.release(0, 0)
    core.demand(1, 0, [0])
    first, second = core.prefetch(1, [ExpertKey(0, 3), ExpertKey(0, 4), ExpertKey(0, 5)])

    assert {first.evicts, second.evicts} == {ExpertKey(0, 1), ExpertKey(0, 2)}


def test_future_tells_only_what_comes():
    a, b = ExpertKey(0, 0), ExpertKey(0, 1)
    future = Future([(a,), (b,), (a,)])

    assert (future.next_use(a), future.next_use(b)) == (0, 1)
    future.advance()
    assert (future.next_use(a), future.next_use(b)) == (2, 1)
    assert future.upcoming(2) == [(b,), (a,)]
    future.advance()
    future.advance()
    assert future.next_use(a) == future.next_use(b) == NEVER
    assert list(future.upcoming(5)) == []


# --- against something simpler ------------------------------------------------------------------


def lru_in_ten_lines(rows: Sequence[Sequence[int]], slots: int) -> list[tuple[int, list[int]]]:
    """Event-atomic LRU by time of last use, ties by number; events fit. (hits, evicted) by event."""
    used: dict[int, int] = {}
    told: list[tuple[int, list[int]]] = []
    for time, row in enumerate(rows):
        present = [expert for expert in row if expert in used]
        others = sorted(set(used) - set(row), key=lambda expert: (used[expert], expert))
        gone = others[: max(0, len(used) + len(row) - len(present) - slots)]
        used = {expert: used[expert] for expert in used if expert not in gone}
        used |= dict.fromkeys(row, time)
        told.append((len(present), gone))
    return told


def demands(experts: int, largest: int, events_at_most: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.sets(st.integers(0, experts - 1), min_size=1, max_size=largest).map(sorted)
    return st.lists(row, min_size=1, max_size=events_at_most)


@given(st.integers(3, 6), demands(8, 3, 40))
@settings(deadline=None)
def test_lru_agrees_with_the_simplest_program_for_it(slots, rows):
    answers = driver(rows, slots, "lru", experts=8).run(events(rows))

    told = [
        (a.hits, [ld.evicts.expert for w in a.waves for ld in w.loads if ld.evicts])
        for a in answers
    ]
    assert told == lru_in_ten_lines(rows, slots)


def most_hits(
    rows: Sequence[Sequence[int]], slots: int, experts: int, *, forced: bool = False
) -> int:
    """The optimum, by trying every content of the cache before and after every event.

    `forced`: an event's experts stay until the next one; events fit.
    """
    everything = range(experts)

    @memoized
    def best(place: int, content: frozenset[int]) -> int:
        if place == len(rows):
            return 0
        row = frozenset(rows[place])
        stay = row if forced else frozenset()
        others = sorted((content | row) - stay)
        kept = combinations(others, min(len(others), slots - len(stay)))
        return len(row & content) + max(best(place + 1, stay | frozenset(some)) for some in kept)

    return max(best(0, frozenset(start)) for start in combinations(everything, min(slots, experts)))


@given(st.integers(1, 4), demands(5, 5, 9))
@settings(max_examples=200, deadline=None)
def test_belady_is_the_optimum_whatever_the_size_of_events(slots, rows):
    assert hits(rows, slots, "belady", experts=5) == most_hits(rows, slots, 5)


@given(st.integers(2, 4), demands(5, 2, 9))
@settings(max_examples=200, deadline=None)
def test_belady_forced_is_the_optimum_if_every_miss_takes_a_slot(slots, rows):
    assert hits(rows, slots, "belady_forced", experts=5) == most_hits(rows, slots, 5, forced=True)


OVERFLOWING = [
    [0, 1, 2, 3, 6, 7], [0, 1, 2, 3, 4, 6, 7], [6], [0, 7], [4, 5, 6], [2, 4, 5, 6],
    [0, 1, 2, 4, 5, 6, 7], [2, 3, 6, 7], [1, 2, 4, 5, 6], [1, 3], [0, 1, 2, 4, 5, 6, 7],
    [1, 2, 7], [0, 3, 5, 6], [0, 2, 3, 5],
]  # fmt: skip
"""Which experts of an overflowing event stay is no cache's choice (hits run first), and it matters here."""


@given(st.integers(1, 8), demands(8, 8, 40), st.sampled_from(OTHER_CACHES))
@example(3, [[2], [3]], "static")
@example(2, OVERFLOWING, "static")
@settings(max_examples=300, deadline=None)
def test_no_cache_beats_belady(slots, rows, cache):
    counts = [[sum(expert in row for row in rows) for expert in range(8)]]

    assert hits(rows, slots, "belady", experts=8) >= hits(
        rows, slots, cache, experts=8, popularity=counts
    )


def test_a_cache_that_learns_can_beat_belady_forced_when_events_overflow():
    """So it is no bound there; belady is."""
    counts = [[sum(expert in row for row in OVERFLOWING) for expert in range(8)]]

    static = hits(OVERFLOWING, 2, "static", experts=8, popularity=counts)

    assert hits(OVERFLOWING, 2, "belady_forced", experts=8) < static


@given(st.integers(3, 7), demands(8, 3, 30))
@settings(deadline=None)
def test_more_slots_never_cost_lru_a_hit(slots, rows):
    assert hits(rows, slots + 1, "lru", experts=8) >= hits(rows, slots, "lru", experts=8)


@given(demands(6, 6, 12), st.sampled_from(caches.names()))
@settings(deadline=None)
def test_with_a_slot_for_everything_an_expert_is_loaded_once(rows, cache):
    assume(cache != "none")
    running = driver(rows, 6, cache, experts=6, popularity=[[1] * 6])

    answers = running.run(events(rows))

    loaded = [load.key for a in answers for wave in a.waves for load in wave.loads]
    assert len(loaded) == len(set(loaded))
    assert not any(load.evicts for a in answers for wave in a.waves for load in wave.loads)


# --- real routing -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_routing() -> tuple[np.ndarray, np.ndarray]:
    if not REAL.is_file():
        pytest.skip(f"{REAL} is not on this machine")
    with np.load(REAL) as stored:
        return stored["expert_ids"], stored["seq_bounds"]


def layer_events(ids: np.ndarray) -> Iterator[tuple[int, int, list[int]]]:
    for step, layers in enumerate(np.sort(ids, axis=2).tolist()):
        for layer, experts in enumerate(layers):
            yield step, layer, experts


def test_real_routing_reuses_experts_of_the_token_before(real_routing):
    ids, bounds = real_routing
    is_inside = np.ones(len(ids) - 1, dtype=bool)
    is_inside[bounds[1:-1] - 1] = False

    kept = [(ids[1:, ..., [k]] == ids[:-1]).any(axis=-1).mean(axis=1) for k in range(4)]

    # Chance would be 4 of 32.
    assert np.mean(kept, axis=0)[is_inside].mean() == pytest.approx(0.44, abs=0.01)


def test_caches_rank_on_real_routing_as_theory_says(real_routing):
    ids = real_routing[0][:1500]
    demanded = list(layer_events(ids))
    keys = [tuple(ExpertKey(layer, e) for e in experts) for _, layer, experts in demanded]
    rates: dict[str, float] = {}
    for name in ("none", "lru", "lfu", "belady"):
        spec = make_spec(slots=24 * 8, cache=name)
        future = Future(keys) if name == "belady" else None
        core: Residency = spec.build(tiny_shape(24, 32, 4), future=future)
        core.warm()
        found = 0
        for step, layer, experts in demanded:
            found += core.demand(step, layer, experts).hits
            core.release(step, layer)
        rates[name] = found / ids.size

    assert rates["none"] == 0.0
    assert rates["belady"] > rates["lru"] + 0.05
    assert rates["belady"] > rates["lfu"] + 0.05
    # Eight slots hold all that the token before used, so LRU finds more than adjacent reuse.
    assert 0.45 < rates["lru"] < 0.75


def test_lru_on_real_routing_agrees_with_the_simplest_program_for_it(real_routing):
    ids = real_routing[0][:1500]
    rows = np.sort(ids[:, 11], axis=1).tolist()
    core = make_spec(slots=8, cache="lru").build(tiny_shape(1, 32, 4))

    found: list[int] = []
    for step, experts in enumerate(rows):
        found.append(core.demand(step, 0, experts).hits)
        core.release(step, 0)

    assert found == [present for present, _ in lru_in_ten_lines(rows, 8)]

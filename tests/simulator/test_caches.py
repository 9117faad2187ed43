"""The caches that learn: small cases by hand, and long ones against the plainest code for the same rule."""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from itertools import count, pairwise
from typing import ClassVar

import pytest
from expertflow.simulator.policy.base import NO_FACTS, BaseCache, Cache, Facts
from expertflow.simulator.policy.caches.arc import ARC
from expertflow.simulator.policy.caches.slru import SLRU
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.policy.ranks import lfru_rank, multi_factor_rank, nearness
from expertflow.simulator.policy.registry import caches, misses, predictors
from expertflow.simulator.policy.residency import Pool, Residency
from expertflow.simulator.policy.spec import make_spec
from expertflow.tracer.errors import UsageError
from expertflow.tracer.types import ExpertKey
from hypothesis import given, settings
from hypothesis import strategies as st


def core_of(cache: str, slots: int, **params) -> Residency:
    """One pool for three layers of eight experts."""
    spec = make_spec(slots=slots, cache=cache, allocation="global", cache_params=params)
    return spec.build(tiny_shape(3, 8))


def event(
    core: Residency, experts: Iterable[int], layer: int = 0, facts: Facts = NO_FACTS
) -> list[ExpertKey]:
    """Run one event; returns who was evicted."""
    answer = core.demand(0, layer, sorted(experts), facts)
    core.release(0, layer)
    return [load.evicts for wave in answer.waves for load in wave.loads if load.evicts]


def prefetch(core: Residency, layer: int, expert: int) -> None:
    """Bring an expert in, and have it arrive."""
    key = ExpertKey(layer, expert)
    assert [load.key for load in core.prefetch(0, [key])] == [key]
    core.loaded(0, key)


def evictions(cache: str, slots: int, rows: Sequence[Sequence[int]], **params) -> list[list[int]]:
    """Experts of layer 0 evicted by each event."""
    core = core_of(cache, slots, **params)
    return [[expert for _, expert in event(core, row)] for row in rows]


# --- FIFO --------------------------------------------------------------------------------------


def test_fifo_evicts_what_came_first_however_much_it_is_demanded():
    assert evictions("fifo", 2, [(0,), (1,), (0,), (0,), (2,), (3,)])[4:] == [[0], [1]]


# --- LFRU --------------------------------------------------------------------------------------


def test_lfru_evicts_the_rare_before_the_old():
    # At event 5, 0 is worth 3 / (1 + 2) = 1 and 1 is worth 1 / (1 + 1).
    assert evictions("lfru", 2, [(0,), (0,), (0,), (1,), (2,)])[-1] == [1]


def test_lfru_evicts_the_often_used_once_it_is_old():
    # At event 11: 0 is worth 3 / 9, 1 is worth 2 / 2 and 2 is worth 5 / 4. LFU would evict 1.
    rows = [(0,)] * 3 + [(2,)] * 5 + [(1,)] * 2 + [(3,)]

    assert evictions("lfru", 3, rows)[-1] == [0]
    assert evictions("lfu", 3, rows)[-1] == [1]


def test_lfru_breaks_ties_by_age():
    # At event 5: 5 is worth 2 / 4 and 1 is worth 1 / 2; 2 is worth 2 / 2.
    assert evictions("lfru", 3, [(5,), (5,), (2,), (1, 2), (3,)])[-1] == [5]


def test_lfru_ranks_anew_what_is_demanded_after_a_victim_was_named():
    cache: Cache = caches.build("lfru", {})
    older, newer = ExpertKey(0, 1), ExpertKey(0, 2)
    cache.size(2)
    for key in (older, newer):
        cache.begin([key], NO_FACTS)
        cache.admit(key)
    cache.begin([older], NO_FACTS)

    assert cache.victim(()) == older
    cache.touch(older)
    assert cache.victim(()) == newer


# --- SLRU --------------------------------------------------------------------------------------


def test_slru_evicts_what_was_demanded_once_before_what_was_demanded_again():
    rows = [(0,), (0,), (1,), (2,), (3,)]

    assert evictions("slru", 2, rows, protected=0.5)[3:] == [[1], [2]]
    assert evictions("lru", 2, rows)[3:] == [[0], [1]]


def test_slru_demotes_the_least_recent_when_too_many_are_protected():
    assert evictions("slru", 2, [(0,), (0,), (1,), (1,), (2,)], protected=0.5)[-1] == [0]


def test_slru_promotes_the_experts_of_an_event_by_number():
    # Three hits for two places: 0 is promoted first and so demoted, to the recent end of probation.
    rows = [(3,), (0, 1, 2), (0, 1, 2), (4,), (5,), (6,), (7,)]

    assert evictions("slru", 4, rows, protected=0.5)[3:] == [[3], [0], [4], [5]]


def test_slru_of_one_slot_protects_nothing():
    assert evictions("slru", 1, [(0,), (0,), (1,)]) == [[], [], [0]]


@pytest.mark.parametrize("protected", [-0.1, 1.1])
def test_slru_refuses_a_share_that_is_none(protected):
    with pytest.raises(UsageError, match="0 <= protected <= 1"):
        SLRU(protected)


# --- ARC ---------------------------------------------------------------------------------------


def test_arc_learns_from_the_ghosts_which_list_to_shrink():
    # c = 2. 0 is in T2, 1 and 2 pass through T1. At event 5, 1 comes back from B1: p rises to 1, so T1 = {2}
    # is not too large and T2 gives up 0. At event 6, 0 comes back from B2: p falls to 0, and T1 gives up 2.
    rows = [(0,), (0,), (1,), (2,), (1,), (0,)]

    assert evictions("arc", 2, rows) == [[], [], [], [1], [0], [2]]
    assert evictions("lru", 2, rows) == [[], [], [], [0], [], [2]]


def test_arc_takes_the_other_list_if_all_of_one_are_in_the_event():
    # T1 = {1}, T2 = {0}, p = 0: T1 should give up 1, but the event needs it.
    assert evictions("arc", 2, [(0,), (0,), (1,), (1, 2)])[-1] == [0]


def test_arc_remembers_a_ghost_that_the_same_event_pushes_out():
    # c = 3, T1 = {5, 6}, T2 = {0}, B1 = {4}: loading 1 first sends 5 to B1, which has room for one.
    core = core_of("arc", 3)
    for row in [(0,), (0,), (4,), (5,), (6,)]:
        event(core, row)
    cache = core.pools[0].cache
    assert isinstance(cache, ARC)
    assert list(cache._once_ghosts) == [(0, 4)]

    event(core, (1, 4))

    assert (0, 4) in cache._again


class TextbookARC:
    """Figure 4 of Megiddo & Modha, one expert at a time; without the tie rule of REPLACE for B2."""

    def __init__(self, slots: int) -> None:
        self.c, self.p = slots, 0.0
        self.t1, self.t2, self.b1, self.b2 = (OrderedDict() for _ in range(4))

    def demand(self, key: int) -> None:
        if key in self.t1 or key in self.t2:
            self.t1.pop(key, None)
            self.t2.pop(key, None)
            self.t2[key] = None
        elif key in self.b1:
            self.p = min(self.c, self.p + max(1, len(self.b2) / len(self.b1)))
            self._replace()
            del self.b1[key]
            self.t2[key] = None
        elif key in self.b2:
            self.p = max(0, self.p - max(1, len(self.b1) / len(self.b2)))
            self._replace()
            del self.b2[key]
            self.t2[key] = None
        else:
            total = sum(map(len, (self.t1, self.t2, self.b1, self.b2)))
            if len(self.t1) + len(self.b1) == self.c:
                if len(self.t1) < self.c:
                    self.b1.popitem(last=False)
                    self._replace()
                else:
                    self.t1.popitem(last=False)
            elif total >= self.c:
                if total == 2 * self.c:
                    self.b2.popitem(last=False)
                self._replace()
            self.t1[key] = None

    def _replace(self) -> None:
        if len(self.t1) + len(self.t2) < self.c:
            return
        if self.t1 and len(self.t1) > self.p:
            self.b1[self.t1.popitem(last=False)[0]] = None
        else:
            self.b2[self.t2.popitem(last=False)[0]] = None


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), max_size=60), st.integers(1, 5))
def test_arc_is_the_textbooks_when_events_are_single(demands, slots):
    core, textbook = core_of("arc", slots), TextbookARC(slots)
    cache = core.pools[0].cache
    assert isinstance(cache, ARC)
    for expert in demands:
        event(core, [expert])
        textbook.demand(expert)

        ours = (cache._once, cache._again, cache._once_ghosts, cache._again_ghosts)
        theirs = (textbook.t1, textbook.t2, textbook.b1, textbook.b2)
        assert [[key.expert for key in found] for found in ours] == [list(t) for t in theirs]
        assert cache._target == textbook.p


# --- SIEVE -------------------------------------------------------------------------------------


def test_sieve_spares_what_was_demanded_since_the_hand_came_by():
    # The hand passes 0 and takes its bit, evicts 1, then 2, then what is new: 0 is still behind it.
    rows = [(0,), (1,), (2,), (0,), (3,), (4,), (5,)]

    assert evictions("sieve", 3, rows)[4:] == [[1], [2], [3]]


def test_sieve_comes_round_once_if_all_were_demanded():
    # Coming round for 0 took the bit of 1, which goes next.
    assert evictions("sieve", 2, [(0,), (1,), (0, 1), (2,), (3,)])[3:] == [[0], [1]]


class TextbookSieve:
    """The algorithm of the paper, one expert at a time; the first is the newest."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.queue: list[int] = []
        self.visited: set[int] = set()
        self.hand: int | None = None

    def demand(self, key: int) -> int | None:
        if key in self.queue:
            self.visited.add(key)
            return None
        gone = self._evict() if len(self.queue) == self.slots else None
        self.queue.insert(0, key)
        return gone

    def _evict(self) -> int:
        place = self.queue.index(self.hand) if self.hand is not None else len(self.queue) - 1
        while self.queue[place] in self.visited:
            self.visited.remove(self.queue[place])
            place = place - 1 if place > 0 else len(self.queue) - 1
        self.hand = self.queue[place - 1] if place > 0 else None
        return self.queue.pop(place)


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), max_size=60), st.integers(1, 5))
def test_sieve_is_the_papers_when_events_are_single(demands, slots):
    core, textbook = core_of("sieve", slots), TextbookSieve(slots)

    for expert in demands:
        gone = textbook.demand(expert)

        assert event(core, [expert]) == ([] if gone is None else [(0, gone)])


# --- least stale -------------------------------------------------------------------------------


def test_least_stale_evicts_the_layers_behind_before_those_to_come():
    # (0, 0) was demanded last, but layer 1 is next.
    for cache, gone in (("least_stale", (0, 0)), ("lru", (1, 0))):
        core = core_of(cache, 2)
        event(core, [0], layer=0)
        event(core, [0], layer=1)
        event(core, [0], layer=0)

        assert event(core, [1], layer=0) == [gone]


def test_least_stale_takes_the_older_of_two_layers_behind():
    core = core_of("least_stale", 2)
    event(core, [7], layer=1)
    event(core, [0], layer=0)

    assert event(core, [1], layer=2) == [(1, 7)]


# --- two-level LRU -----------------------------------------------------------------------------


def test_two_level_lru_evicts_what_was_prefetched_in_vain_before_the_recently_demanded():
    for cache, gone in (("two_level_lru", (1, 1)), ("lru", (0, 0))):
        core = core_of(cache, 3)
        event(core, [0])
        prefetch(core, 1, 1)
        event(core, [2], layer=1)

        assert event(core, [3]) == [gone]


def test_two_level_lru_keeps_a_prefetch_that_was_used():
    core = core_of("two_level_lru", 2)
    event(core, [0])
    prefetch(core, 1, 1)
    event(core, [1], layer=1)

    assert event(core, [2]) == [(0, 0)]


def test_two_level_lru_evicts_what_left_the_window_before_a_younger_prefetch():
    for window, gone in ((3, (0, 0)), (4, (1, 1))):
        core = core_of("two_level_lru", 4, window=window)
        event(core, [0])
        event(core, [2])
        prefetch(core, 1, 1)
        event(core, [5], layer=1)

        assert event(core, [3]) == [gone]


def test_two_level_lru_counts_a_late_prefetch_as_demanded():
    core = core_of("two_level_lru", 2)
    event(core, [0])
    core.prefetch(0, [ExpertKey(0, 1)])
    event(core, [1])

    assert event(core, [2]) == [(0, 0)]


def test_two_level_lru_takes_no_prefetch_after_an_event_for_its_demand():
    # The event's second expert was computed on the CPU and is prefetched when the event is over.
    cache: Cache = caches.build("two_level_lru", {})
    demanded, prefetched = ExpertKey(0, 0), ExpertKey(0, 7)
    cache.size(2)
    cache.begin([demanded, prefetched], NO_FACTS)
    cache.admit(demanded)
    cache.released([demanded, prefetched])
    cache.admit(prefetched)

    assert cache.victim(()) == prefetched


def test_two_level_lru_refuses_an_empty_window():
    with pytest.raises(UsageError, match="window >= 1"):
        core_of("two_level_lru", 2, window=0)


# --- score -------------------------------------------------------------------------------------


def weighing(*weights: float) -> Facts:
    return Facts(weights=weights)


def test_score_evicts_the_lowest_average_weight():
    core = core_of("score", 2, alpha=0.5)

    assert event(core, [0], facts=weighing(0.9)) == []
    assert event(core, [1], facts=weighing(0.2)) == []
    # 0: 0.9 / 8, 1: 0.2 / 4.
    assert event(core, [2], facts=weighing(0.5)) == [(0, 1)]
    # 0: 0.9 / 16, 2: 0.5 / 4.
    assert event(core, [3], facts=weighing(0.1)) == [(0, 0)]


def test_score_outlives_eviction():
    core = core_of("score", 2, alpha=0.5)
    for expert, weight in ((0, 8.0), (1, 9.0), (2, 1.0), (0, 2.0)):
        event(core, [expert], facts=weighing(weight))

    # 2 evicted 0, and 0 evicted 2. Now 0: 8 / 32 + 2 / 4 = 0.75 and 1: 9 / 16; without its past 0 would go.
    assert event(core, [3], facts=weighing(1.0)) == [(0, 1)]


def test_score_fades_with_the_events_of_its_own_layer_alone():
    core = core_of("score", 2, alpha=0.5)
    event(core, [0], layer=1, facts=weighing(0.4))
    event(core, [0], layer=0, facts=weighing(0.6))
    event(core, [0], layer=0, facts=weighing(0.0))

    # (1, 0): 0.2 as before; (0, 0): 0.3, faded to 0.15, to 0.075 by the running event.
    assert event(core, [1], layer=0, facts=weighing(0.1)) == [(0, 0)]


def test_score_counts_demands_where_weights_are_not_known():
    # 0 was demanded twice, 1 later: 0.75 / 4 and 0.5 / 2, or 0.19 × 0.81 and 0.1 × 0.9.
    assert evictions("score", 2, [(0,), (0,), (1,), (2,)], alpha=0.5)[-1] == [0]
    assert evictions("score", 2, [(0,), (0,), (1,), (2,)], alpha=0.1)[-1] == [1]


@pytest.mark.parametrize("alpha", [0, 1.5])
def test_score_refuses_an_average_that_is_none(alpha):
    with pytest.raises(UsageError, match="0 < alpha <= 1"):
        core_of("score", 2, alpha=alpha)


# --- multi-factor ------------------------------------------------------------------------------

DISTANCE = {"w_recency": 0.0, "w_frequency": 0.0, "w_distance": 1.0}
FREQUENCY = {"w_recency": 0.0, "w_frequency": 1.0, "w_distance": 0.0}


def test_multi_factor_is_the_weighted_sum():
    # Event 4; demanded by 3 of them, the second last; layer 2 of 4 as seen from layer 1.
    rank = multi_factor_rank(2, 3, 4, 0.5, 0.25, 0.125 * nearness(2, 1, 4))

    assert rank == (0.5 * 2 + 0.25 * 3) / 4 + 0.125 * 0.75


def test_layers_are_nearest_before_their_turn_and_farthest_after_it():
    assert [nearness(layer, 1, 4) for layer in (2, 3, 0, 1)] == [0.75, 0.5, 0.25, 0.0]


def test_multi_factor_by_distance_evicts_the_layer_just_passed():
    core = core_of("multi_factor", 3, **DISTANCE)
    for layer in (0, 1, 2):
        event(core, [0], layer=layer)

    assert event(core, [1], layer=1) == [(1, 0)]
    # From layer 2, layer 0 is next and layer 1 last but one.
    assert event(core, [1], layer=2) == [(2, 0)]
    assert event(core, [2], layer=2) == [(2, 1)]
    assert event(core, [3], layer=0) == [(0, 0)]


def test_multi_factor_counts_demands_before_admission_too():
    # 2 was demanded twice, evicted, and is back: 3 demands, as many as 1 has, so the lower number goes.
    rows = [(2,), (2,), (1,), (1,), (1,), (0,), (2,), (0,)]

    assert evictions("multi_factor", 2, rows, **FREQUENCY)[5:] == [[2], [0], [1]]


def test_multi_factor_forgets_when_a_pass_over_prompts_starts():
    prompts = Facts(is_prefill=True)
    for facts, layer, gone in (
        (prompts, 0, (0, 0)),
        (NO_FACTS, 0, (0, 1)),
        (prompts, 1, (1, 1)),  # layer 1 follows layer 0 in the same pass
    ):
        core = core_of("multi_factor", 2, **FREQUENCY)
        for _ in range(3):
            event(core, [0])
        event(core, [1], layer=layer, facts=facts)

        assert event(core, [2], layer=layer) == [gone]


# --- against the plainest code -----------------------------------------------------------------


class Shadowed(BaseCache):
    """Passes everything on to a cache; keeps history, and checks each victim against a scan by `worth`."""

    name: ClassVar[str] = "shadowed"
    needs: ClassVar[frozenset[str]] = frozenset({"gate_weights"})
    is_lossless: ClassVar[bool] = True

    def __init__(self, inner: Cache, worth: Callable[["Shadowed", ExpertKey], tuple]) -> None:
        self.inner, self.worth = inner, worth
        self.events: list[tuple[tuple[ExpertKey, ...], Facts]] = []
        self.last: dict[ExpertKey, int] = {}
        self.count: dict[ExpertKey, int] = {}
        self.unused: set[ExpertKey] = set()
        self.running: Sequence[ExpertKey] = ()

    @property
    def now(self) -> int:
        return len(self.events)

    def size(self, slots: int) -> None:
        self.slots = slots
        self.inner.size(slots)

    def begin(self, keys: Sequence[ExpertKey], facts: Facts) -> None:
        self.events.append((tuple(keys), facts))
        self.running = keys
        self.inner.begin(keys, facts)

    def admit(self, key: ExpertKey) -> None:
        self.last[key], self.count[key] = self.now, 1
        if key not in self.running:
            self.unused.add(key)
        self.inner.admit(key)
        self.check()

    def touch(self, key: ExpertKey) -> None:
        self.last[key] = self.now
        self.count[key] += 1
        self.unused.discard(key)
        self.inner.touch(key)

    def remove(self, key: ExpertKey) -> None:
        del self.last[key], self.count[key]
        self.unused.discard(key)
        self.inner.remove(key)
        self.check()

    def released(self, keys: Sequence[ExpertKey]) -> Iterable[ExpertKey]:
        self.running = ()
        dropped = self.inner.released(keys)
        self.check()
        return dropped

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        found = self.inner.victim(protected)
        left = [key for key in self.last if key not in protected]
        if self.worth is not anything:
            assert found == min(left, key=lambda key: (self.worth(self, key), key), default=None)
        return found

    def check(self) -> None:
        """What always holds of the inner cache."""
        cache = self.inner
        if isinstance(cache, ARC):
            once, again = set(cache._once), set(cache._again)
            recent, frequent = set(cache._once_ghosts), set(cache._again_ghosts)
            assert once | again == set(self.last)
            assert len(once) + len(again) + len(recent) + len(frequent) == len(
                once | again | recent | frequent
            )
            assert len(once) + len(recent) <= self.slots
            assert len(once | again | recent | frequent) <= 2 * self.slots
            assert 0 <= cache._target <= self.slots
        if isinstance(cache, SLRU):
            assert len(cache._protected) <= 0.8 * self.slots
            assert {*cache._protected, *cache._probation} == set(self.last)


def anything(_shadow: Shadowed, _key: ExpertKey) -> tuple:
    return ()


def lfru(shadow: Shadowed, key: ExpertKey) -> tuple:
    return lfru_rank(shadow.count[key], shadow.now - shadow.last[key]), shadow.last[key]


def least_stale(shadow: Shadowed, key: ExpertKey) -> tuple:
    current = shadow.events[-1][0][0].layer if shadow.events else -1
    return key.layer > current, shadow.last[key]


def two_level_lru(shadow: Shadowed, key: ExpertKey) -> tuple:
    return key not in shadow.unused and shadow.now - shadow.last[key] < 5, shadow.last[key]


def score(shadow: Shadowed, key: ExpertKey) -> tuple:
    found = 0.0
    for keys, facts in shadow.events:
        if keys[0].layer == key.layer:
            found = (1 - 0.3) * found
            if key in keys:
                found += 0.3 * (facts.weights[keys.index(key)] if facts.weights else 1.0)
    return found, shadow.last[key]


def multi_factor(shadow: Shadowed, key: ExpertKey) -> tuple:
    layers = [keys[0].layer for keys, _ in shadow.events]
    starts = [
        number
        for number, (before, layer) in enumerate(pairwise(layers), 1)
        if layer <= before and shadow.events[number][1].is_prefill
    ]
    sequence = shadow.events[starts[-1] if starts else 0 :]
    uses = [number for number, (keys, _) in zip(count(1), sequence, strict=False) if key in keys]
    near = nearness(key.layer, layers[-1] if layers else -1, len(set(layers)) or 1)
    third, now = 1 / 3, len(sequence) or 1
    return (multi_factor_rank(max(uses, default=0), len(uses), now, third, third, third * near),)


WORTHS = {
    "lfru": lfru,
    "least_stale": least_stale,
    "two_level_lru": two_level_lru,
    "score": score,
    "multi_factor": multi_factor,
    "arc": anything,
    "slru": anything,
}


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[int, list[int], Facts, list[ExpertKey], list[ExpertKey]]]:
    """Events of any size, with facts; what is predicted in them, and what arrives before them."""
    rows = []
    key = st.builds(ExpertKey, st.integers(0, 2), st.integers(0, 7))
    for _ in range(draw(st.integers(1, 25))):
        experts = sorted(draw(st.sets(st.integers(0, 7), min_size=1, max_size=5)))
        weights = draw(
            st.one_of(
                st.just(()),
                st.lists(
                    st.sampled_from([0.0, 0.1, 0.25, 1.0]),
                    min_size=len(experts),
                    max_size=len(experts),
                ),
            )
        )
        facts = Facts(is_prefill=draw(st.booleans()), weights=tuple(weights))
        asked, arrived = draw(st.lists(key, max_size=4)), draw(st.lists(key, max_size=4))
        rows.append((draw(st.integers(0, 2)), experts, facts, asked, arrived))
    return rows


@pytest.mark.parametrize("name", sorted(WORTHS))
@settings(deadline=None, max_examples=60)
@given(lives(), st.integers(1, 10))
def test_victims_are_those_of_a_scan_in_any_life(name, rows, slots):
    params = {"window": 5} if name == "two_level_lru" else {}
    cache = Shadowed(caches.build(name, params), WORTHS[name])
    cache.size(slots)
    core = Residency(
        [Pool((0, 1, 2), range(slots), cache)],
        predictors.build("none", {}),
        misses.build("load", {}),
        num_experts=8,
    )
    for layer, experts, facts, asked, arrived in rows:
        for key in arrived:
            core.loaded(0, key)
        core.demand(0, layer, experts, facts)
        core.prefetch(0, asked)
        core.release(0, layer)


@pytest.mark.parametrize("name", ["least_stale", "two_level_lru"])
@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=3)), st.integers(3, 8))
def test_on_one_layer_without_prefetch_it_is_lru(name, rows, slots):
    assert evictions(name, slots, rows) == evictions("lru", slots, rows)

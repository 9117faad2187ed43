"""Hit counts of the compiled engine are those of others: libCacheSim's, a few lines by hand, a table on paper.

libCacheSim is GPL-3.0 and in none of our lists of dependencies: `pip install libcachesim`, and the tests that compare
with it run, each in a child process.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")
sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

import oracle
from bench_common import GPT_OSS, TRACES, accesses_of, events_of
from expertflow.simulator.curves import global_curve
from expertflow.simulator.policy.registry import caches

ACCESSES = 200_000

needs_libcachesim = pytest.mark.skipif(
    find_spec("libcachesim") is None, reason="libcachesim is not installed (GPL-3.0, by hand)"
)


def prefix(source, accesses: int = ACCESSES) -> np.ndarray:
    if not source.path.exists():
        pytest.skip(f"{source.path} is absent")
    return oracle.prefix(source.ids(), accesses)


@needs_libcachesim
@pytest.mark.parametrize("source", TRACES, ids=lambda source: source.name)
def test_single_accesses_hit_as_often_as_in_libcachesim(source):
    cells = oracle.compare(source, prefix(source))

    assert [cell for cell in cells if not cell.is_equal] == []
    assert len(cells) == 2 * 4 * 6  # pools, policies, sizes
    assert all(0 < cell.ours < cell.accesses for cell in cells)


@needs_libcachesim
@pytest.mark.parametrize("source", TRACES, ids=lambda source: source.name)
def test_whole_events_hit_as_often_as_in_libcachesim(source):
    cells = oracle.compare_events(source, prefix(source))

    assert [cell for cell in cells if not cell.is_equal] == []


@needs_libcachesim
def test_the_comparison_tells_policies_apart():
    """An oracle that could not fail would show nothing."""
    ids = prefix(GPT_OSS)
    keys = accesses_of(ids, GPT_OSS.num_experts).keys()

    counts = oracle.libcachesim_hits([keys], [(policy, 192) for policy in oracle.POLICIES])

    assert len(set(counts)) == len(counts)


@pytest.mark.parametrize("source", TRACES, ids=lambda source: source.name)
def test_whole_events_hit_as_often_as_by_hand(source):
    ids = prefix(source, 30_000)
    workload = events_of(ids, source.num_experts)
    events = np.split(workload.keys(), workload.ptr[1:-1])
    plain = [event.tolist() for event in events]

    for share in (0.125, 0.5):
        slots = round(share * workload.num_layers * workload.num_experts)
        expected = oracle.direct_lru(plain, slots)
        assert oracle.our_hits(workload, "lru", slots, "global") == expected
        assert global_curve(workload)[slots] == expected


def test_an_event_is_judged_by_what_was_there_when_it_began():
    # One layer, three slots, LRU. In slots before each event, least recent first:
    #   -        asks 0 1: two misses
    #   0 1      asks 1 2: one hit; 2 takes the free slot
    #   0 1 2    asks 0 3: one hit. In order of number the hit comes first; 3 takes the place of 1
    #   2 0 3    asks 1 2: one hit. One by one, 1 would have pushed out 2 before it was asked for
    #   3 1 2    asks 1 2: two hits
    events = [[0, 1], [1, 2], [0, 3], [1, 2], [1, 2]]
    ids = np.asarray(events, dtype=np.uint8)[:, None, :]

    assert oracle.direct_lru(events, 3) == 5
    assert oracle.our_hits(events_of(ids, 4), "lru", 3, "global") == 5
    assert oracle.our_hits(accesses_of(ids, 4), "lru", 3, "global") == 4


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_a_clairvoyant_cache_that_starts_empty_misses_what_it_would_have_held(slots):
    """Belady by trying all: the fewest misses of any choice of victims."""
    dice = np.random.default_rng(slots)
    ids = dice.integers(0, 6, size=(14, 1, 1)).astype(np.uint8)
    keys = ids.ravel().tolist()

    hits = oracle.our_hits(accesses_of(ids, 6), "belady_forced", slots, "global")

    assert hits == most_hits(keys, slots)


def most_hits(keys: list[int], slots: int) -> int:
    """Hits of the best of all caches that start empty and admit every miss."""
    found = {frozenset(): 0}
    for key in keys:
        after: dict[frozenset[int], int] = {}
        for held, hits in found.items():
            if key in held:
                choices = {held: hits + 1}
            elif len(held) < slots:
                choices = {held | {key}: hits}
            else:
                choices = {(held - {gone}) | {key}: hits for gone in held}
            for choice, count in choices.items():
                after[choice] = max(count, after.get(choice, 0))
        found = after
    return max(found.values())


def test_every_policy_compared_is_one_of_ours():
    assert set(oracle.POLICIES) <= set(caches.names())

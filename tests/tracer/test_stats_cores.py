"""Each statistic against the obvious loops, on drawn routing."""

import math
from itertools import pairwise

import numpy as np
import pytest
from expertflow.tracer.stats import describe_routing
from expertflow.tracer.stats.across_layers import coactivation, lookahead_stats, transition_stats
from expertflow.tracer.stats.batching import batch_stats, even_union
from expertflow.tracer.stats.popularity import layer_stats
from expertflow.tracer.stats.prefixes import MIN_PREFIX_TOKENS, prefix_stats, shared_prefixes
from expertflow.tracer.stats.reuse import stack_distances
from expertflow.tracer.stats.sample import Events, TokenGrid
from expertflow.tracer.stats.segments import AHEAD_TOKENS, cache_coverage, segment_stats
from expertflow.tracer.store import RoutingArrays
from expertflow.tracer.synthetic import synthetic_trace
from hypothesis import given, settings
from hypothesis import strategies as st


def grid_of(ids, sequence=None, *, is_decode=True, lookahead=None) -> TokenGrid:
    """A grid of [tokens, layers, k] ids; positions count on within each sequence."""
    ids = np.asarray(ids, dtype=np.uint16)
    sequence = np.zeros(len(ids), int) if sequence is None else np.asarray(sequence)
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    position = np.arange(len(ids)) - np.repeat(starts, np.diff(np.append(starts, len(ids))))
    return TokenGrid(
        sequence=sequence,
        position=position,
        is_decode=np.full(len(ids), is_decode),
        experts=ids,
        lookahead=lookahead or {},
        follows=position > 0,
    )


def drawn_ids(seed: int, tokens: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    score = rng.gumbel(size=(tokens, layers, experts)) + np.linspace(0, 2, experts)
    return np.argsort(-score, axis=2)[..., :top_k].astype(np.uint16)


SIZES = st.tuples(st.integers(0, 99), st.integers(1, 60), st.integers(1, 3), st.integers(4, 9))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), steps=st.integers(1, 60), experts=st.integers(2, 9))
def test_lru_hits_equal_a_list_in_order_of_recency(seed, steps, experts):
    rng = np.random.default_rng(seed)
    used = rng.random((steps, 2, experts)) < 0.4
    is_decode = rng.random(steps) < 0.7

    found = stack_distances(Events(used, is_decode), is_decode=True)

    for slots in range(1, experts + 1):
        hits = demands = 0
        for layer in range(2):
            order: list[int] = []
            for step in range(steps):
                event = np.flatnonzero(used[step, layer]).tolist()
                if is_decode[step]:
                    demands += len(event)
                    hits += sum(expert in order[-slots:] for expert in event)
                order = [expert for expert in order if expert not in event] + event
        assert found.demands == demands
        assert found.hits(slots) == pytest.approx(hits / max(1, demands))


def test_lru_hits_are_those_of_the_simulator(tmp_path):
    curves = pytest.importorskip("expertflow.simulator.curves")
    workload = pytest.importorskip("expertflow.simulator.workload")
    trace = synthetic_trace(tmp_path / "t", sequences=6, new_tokens=20, batch_size=1)

    theirs = curves.layer_curves(workload.workload_of(trace), decode_only=True)
    routing = trace.routing_arrays()
    events = Events.of(routing, 4, 16, np.arange(len(routing.step)))
    ours = stack_distances(events, is_decode=True)

    largest = int(events.used.sum(axis=2).max())
    assert largest < 16
    for slots in range(largest, 17):
        total = sum(layer[slots] for layer in theirs)
        assert ours.hits(slots) * ours.demands == pytest.approx(total)


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES)
def test_srp_is_the_best_f1_of_any_threshold(sizes):
    seed, tokens, layers, experts = sizes
    ids = drawn_ids(seed, tokens, layers, experts, 2)
    sequence = np.sort(np.arange(tokens) % 3)

    for found in segment_stats(grid_of(ids, sequence), experts):
        best = 0.0
        windows = [
            ids[first : first + found.tokens, layer]
            for first in range(tokens - found.tokens + 1)
            if sequence[first] == sequence[first + found.tokens - 1]
            for layer in range(layers)
        ]
        for threshold in range(found.tokens + 1):
            matches = size = chosen = 0
            for window in windows:
                counts = np.bincount(window.reshape(-1), minlength=experts)
                fixed = counts >= threshold
                matches += int(counts[fixed].sum())
                size += int(fixed.sum()) * found.tokens
                chosen += int(counts.sum())
            best = max(best, 2 * matches / (size + chosen))
        assert found.srp == pytest.approx(best)


def slow_segment_cache(ids: np.ndarray, slots: int) -> float:
    """One layer of one sequence, expert by expert."""
    resident: dict[int, int] = {}
    evicted = 0
    for now, event in enumerate(ids.tolist()):
        ahead = ids[now + 1 : now + AHEAD_TOKENS].reshape(-1).tolist()
        for expert in event:
            resident[expert] = now
        others = [expert for expert in resident if expert not in event]
        others.sort(key=lambda expert: (ahead.count(expert), resident[expert]))
        surplus = max(0, len(resident) - slots)
        # Ties of both are between experts of one earlier event; which goes changes later counts.
        for expert in others[:surplus]:
            del resident[expert]
        evicted += surplus
    return 1 - evicted / ids.size


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), tokens=st.integers(1, 80), experts=st.integers(5, 9))
def test_sch_with_one_expert_per_token_equals_the_slow_cache(seed, tokens, experts):
    ids = drawn_ids(seed, tokens, 1, experts, 1)

    for found in cache_coverage(grid_of(ids), experts):
        assert found.hits == pytest.approx(slow_segment_cache(ids[:, 0], found.slots_per_layer))


def test_sch_grows_with_slots_and_is_whole_once_nothing_must_go():
    ids = drawn_ids(3, 300, 2, 12, 2)

    hits = [found.hits for found in cache_coverage(grid_of(ids, np.arange(300) // 100), 12)]

    assert hits == sorted(hits)
    steady = grid_of(np.tile([[[0, 1]]], (50, 1, 1)))
    assert [found.hits for found in cache_coverage(steady, 12)] == [1.0, 1.0, 1.0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), sequences=st.integers(2, 12), length=st.integers(8, 20))
def test_distinct_by_batch_size_equals_sets_merged_by_hand(seed, sequences, length):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length // 2, length + 1, sequences)
    sequence = np.repeat(np.arange(sequences), lengths)
    ids = drawn_ids(seed, len(sequence), 2, 8, 2)
    start = np.cumsum(lengths) - lengths

    for found in batch_stats(grid_of(ids, sequence), np.full((2, 8), 1 / 8)):
        sizes = []
        for index in range(length):
            alive = [n for n in range(sequences) if lengths[n] > index]
            whole = len(alive) // found.sequences * found.sequences
            for first in range(0, whole, found.sequences):
                rows = [start[n] + index for n in alive[first : first + found.sequences]]
                sizes += [len(set(ids[rows, layer].reshape(-1).tolist())) for layer in range(2)]
        assert found.groups == len(sizes) // 2
        assert found.distinct == pytest.approx(np.mean(sizes))
        assert found.by_popularity == pytest.approx(found.even)


def test_even_union_is_the_expectation_of_even_draws():
    rng = np.random.default_rng(0)
    drawn = [
        len(set(np.concatenate([rng.choice(16, 4, replace=False) for _ in range(5)]).tolist()))
        for _ in range(3000)
    ]

    assert even_union(16, 4, 5) == pytest.approx(np.mean(drawn), rel=0.02)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12))
def test_shared_prefixes_equal_comparing_every_two(prompts):
    def common(first, second):
        same = [a == b for a, b in zip(first, second, strict=False)]
        return same.index(False) if False in same else len(same)

    slow = [
        max((common(prompt, other) for other in prompts[:number]), default=0)
        for number, prompt in enumerate(prompts)
    ]

    assert shared_prefixes([np.array(prompt, np.int32) for prompt in prompts]) == slow


def prompts_as_rows(prompts, *, redacted=False) -> RoutingArrays:
    rows = [(s, p, token) for s, ids in enumerate(prompts) for p, token in enumerate(ids)]
    table = np.array(rows)
    count = len(table)
    return RoutingArrays(
        step=table[:, 0],
        layer=np.zeros(count, np.int16),
        sequence=table[:, 0],
        position=table[:, 1],
        phase_is_decode=np.zeros(count, bool),
        token_id=np.full(count, -1) if redacted else table[:, 2],
        is_pad=np.zeros(count, bool),
        experts=np.zeros((count, 1), np.uint16),
    )


def test_a_template_is_found_and_a_start_token_is_not():
    template = list(range(100, 100 + MIN_PREFIX_TOKENS))

    templated = prefix_stats(prompts_as_rows([[*template, 1, 2], [*template, 3, 4]]), ("a", "b"))
    started = prefix_stats(prompts_as_rows([[7, *range(20)], [7, *range(20, 40)]]), ("a", "b"))

    assert templated.shared == pytest.approx(MIN_PREFIX_TOKENS / (2 * (MIN_PREFIX_TOKENS + 2)))
    assert templated.longest_tokens == MIN_PREFIX_TOKENS
    assert started.shared == 0


def test_without_token_ids_only_repeats_are_known():
    found = prefix_stats(prompts_as_rows([[1, 2], [1, 2], [3]], redacted=True), ("a", "a", "b"))

    assert (found.shared, found.repeated_prompts, found.prompts) == (None, 1, 3)


def test_gini_and_entropy_of_known_demand():
    even, one, halves = layer_stats(np.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]]))

    assert (even.gini, even.entropy) == pytest.approx((0, 1))
    assert (one.gini, one.entropy) == pytest.approx((0.75, 0))
    assert (halves.gini, halves.entropy) == pytest.approx((0.5, math.log(2) / math.log(4)))


def test_transitions_beat_popularity_where_layers_tell_of_each_other():
    first = np.random.default_rng(0).integers(0, 8, 4000)
    told = grid_of(np.stack([first, (first + 3) % 8], 1)[..., None], np.arange(4000) // 50)
    free = grid_of(drawn_ids(1, 4000, 2, 8, 1), np.arange(4000) // 50)

    certain, nothing = transition_stats(told, 8), transition_stats(free, 8)

    assert certain.accuracy == 1.0
    assert certain.popular < 0.2
    assert nothing.accuracy == pytest.approx(nothing.popular, abs=0.03)
    assert transition_stats(grid_of(first[:, None, None]), 8) is None


def test_lookahead_is_judged_where_it_was_recorded():
    ids = np.array([[[0, 1], [2, 3], [4, 5]]], np.uint16)
    said = np.array([[[2, 9], [4, 5], [65535, 65535]]], np.uint16)

    (found,) = lookahead_stats(grid_of(ids, lookahead={1: said}))

    assert (found.depth, found.accuracy) == (1, 0.75)


def test_experts_that_go_together_have_the_greatest_lift():
    rng = np.random.default_rng(0)
    pairs = np.array([[0, 2], [1, 3], [0, 3], [1, 2]])
    ids = np.where(rng.random(2000)[:, None] < 0.3, [4, 5], pairs[rng.integers(0, 4, 2000)])

    best, *_ = coactivation(grid_of(ids[:, None]), 8)

    assert (best.layer, best.first, best.second) == (0, 4, 5)
    apart = np.mean((ids == 4).any(1)) * np.mean((ids == 5).any(1))
    assert best.lift == pytest.approx(best.share / apart)


def test_padding_and_torn_tokens_are_left_out_of_the_grid():
    rows = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, -1, 0), (0, -1, 1), (1, 0, 0), (1, 0, 0)]
    table = np.array(rows)
    routing = RoutingArrays(
        step=np.zeros(7, np.int32),
        layer=table[:, 2],
        sequence=table[:, 0],
        position=table[:, 1],
        phase_is_decode=np.zeros(7, bool),
        token_id=np.zeros(7, np.int32),
        is_pad=table[:, 1] < 0,
        experts=np.arange(7, dtype=np.uint16)[:, None],
    )

    grid = TokenGrid.of(routing, 2, np.arange(7))

    assert grid.experts.tolist() == [[[0], [1]]]
    assert grid.follows.tolist() == [False]


def test_findings_name_their_figures_and_follow_them(tmp_path):
    def said(**how) -> dict[str, list[str]]:
        trace = synthetic_trace(tmp_path / str(len(how)) / "-".join(how), sequences=8, **how)
        routing = trace.routing_arrays()
        stats = describe_routing(routing, 4, 16)
        texts: dict[str, list[str]] = {}
        for finding in stats.findings:
            texts.setdefault(finding.about, []).append(finding.text)
        assert f"{stats.decode.reuse:.0%}" in texts["caching"][1]
        return texts

    sticky, loose = said(stickiness=0.8), said(stickiness=0.0, skew=0.0)

    assert "recency helps beyond popularity" in sticky["caching"][1]
    assert "frequency is as good a guide" in loose["caching"][1]
    assert "static placement is worth comparing" in sticky["placement"][0]
    assert "no placement is much better" in loose["placement"][0]


def test_stack_distance_quantiles_climb(tmp_path):
    stats = describe_routing(synthetic_trace(tmp_path / "t").routing_arrays(), 4, 16)

    assert len(stats.stack_distances) == 4
    assert all(low <= high for low, high in pairwise(stats.stack_distances))

"""The numbers `info` shows, against small cases worked out by hand and slow reference code."""

import numpy as np
import pytest
from expertflow.tracer.stats import describe_routing, routing_stats, sample
from expertflow.tracer.store import RoutingArrays, Trace
from expertflow.tracer.synthetic import synthetic_trace


def arrays(rows, experts) -> RoutingArrays:
    """Rows of (step, layer, sequence, position, is_decode)."""
    table = np.array(rows)
    return RoutingArrays(
        step=table[:, 0],
        layer=table[:, 1],
        sequence=table[:, 2],
        position=table[:, 3],
        phase_is_decode=table[:, 4].astype(bool),
        token_id=np.zeros(len(table), np.int32),
        is_pad=table[:, 3] < 0,
        experts=np.array(experts, dtype=np.uint16),
    )


def test_reuse_counts_only_neighbours_of_one_sequence():
    routing = arrays(
        [(0, 0, 0, 0, 0), (0, 0, 0, 1, 0), (0, 0, 1, 5, 0), (0, 0, 1, -1, 0), (1, 0, 0, 2, 1)],
        [[0, 1], [1, 2], [1, 2], [1, 2], [2, 1]],
    )

    stats = describe_routing(routing, layers=1, experts=8)

    assert stats.prefill.reuse == 0.5
    assert stats.decode.reuse == 1.0
    assert stats.reuse_chance == 0.25
    assert stats.prefill.tokens == 3


def test_distinct_counts_padding_and_each_expert_once_per_event():
    routing = arrays(
        [(0, 0, 0, 0, 0), (0, 0, 1, -1, 0), (1, 0, 0, 1, 1), (1, 0, 1, 0, 1)],
        [[0, 1], [1, 2], [4, 5], [4, 5]],
    )

    stats = describe_routing(routing, layers=1, experts=8)

    assert stats.prefill.mean_distinct == 3
    assert stats.decode.mean_distinct == 2


def test_even_popularity_has_entropy_one_and_no_skew():
    routing = arrays([(0, 0, 0, i, 0) for i in range(10)], [[i] for i in range(10)])

    stats = describe_routing(routing, layers=1, experts=10)

    assert stats.entropy == pytest.approx(1.0)
    assert stats.top_share == pytest.approx(stats.top_share_even) == pytest.approx(0.1)


def test_reuse_distance_is_in_events_of_the_layer():
    ids = [[0], [1], [0], [1], [0]]
    routing = arrays([(step, 0, 0, step, 1) for step in range(5)], ids)

    assert describe_routing(routing, layers=1, experts=4).reuse_distance == 2


def test_disjoint_domains_are_one_apart():
    routing = arrays([(0, 0, s, p, 0) for s in (0, 1) for p in (0, 1)], [[0], [1], [2], [3]])

    stats = describe_routing(routing, 1, 4, {0: "code", 1: "prose"})

    assert [(d.first, d.second, d.distance) for d in stats.domains] == [("code", "prose", 1.0)]
    assert stats.within_domain is None


def test_readings_say_when_a_cache_cannot_hit():
    many = [list(range(start, start + 4)) for start in (0, 4)]
    routing = arrays([(0, 0, 0, 0, 1), (0, 0, 1, 0, 1)], many)

    quarter, half, most = describe_routing(routing, layers=1, experts=16).ratios

    assert (quarter.slots_per_layer, quarter.ratio) == (4, 2.0)
    assert "cannot hit" in quarter.reading
    assert "hits will be few" in half.reading
    assert "so a cache can hit" in most.reading
    assert "at 75% of experts resident (12 slots per layer)" in most.reading


def test_nothing_recorded_gives_numbers_and_not_a_crash():
    empty = arrays(np.empty((0, 5), int), np.empty((0, 2)))

    stats = describe_routing(empty, layers=2, experts=8)

    assert stats.decode.reuse is None
    assert stats.reuse_distance is None
    assert stats.decode.mean_distinct == 0


def slow_reuse(trace: Trace, phase: str) -> float:
    rows = trace.table("routing").to_pylist()
    seen = {(r["sequence"], r["layer"], r["position"]): set(r["experts"]) for r in rows}
    shares = [
        len(set(r["experts"]) & seen[key]) / len(r["experts"])
        for r in rows
        if r["position"] > 0
        and r["phase"] == phase
        and (key := (r["sequence"], r["layer"], r["position"] - 1)) in seen
    ]
    return sum(shares) / len(shares)


def slow_distance(trace: Trace) -> float:
    rows = trace.table("routing", filters=[("phase", "=", "decode")]).to_pylist()
    steps = {step: n for n, step in enumerate(sorted({r["step"] for r in rows}))}
    last: dict[tuple[int, int], int] = {}
    gaps = []
    for row in rows:
        now = steps[row["step"]]
        for expert in row["experts"]:
            before = last.get((row["layer"], expert))
            if before is not None and before != now:
                gaps.append(now - before)
            last[row["layer"], expert] = now
    return float(np.median(gaps))


def test_vectorised_numbers_equal_the_obvious_loops(tmp_path):
    trace = synthetic_trace(tmp_path / "t", layers=3, sequences=5, new_tokens=9, batch_size=2)

    stats = routing_stats(trace)

    assert stats.prefill.reuse == pytest.approx(slow_reuse(trace, "prefill"))
    assert stats.decode.reuse == pytest.approx(slow_reuse(trace, "decode"))
    assert stats.reuse_distance == slow_distance(trace)
    rows = trace.table("steps", filters=[("layer", ">=", 0)]).to_pandas()
    for phase in (stats.prefill, stats.decode):
        told = rows[rows.phase == phase.phase].distinct.mean()
        assert phase.mean_distinct == pytest.approx(told)
    assert sum(r for r in stats.decode.reuse_by_layer) / 3 == pytest.approx(stats.decode.reuse)


def random_routing(rows: int, *, batch: int, layers: int, experts: int, top_k: int):
    """One decode step per `batch` tokens, by layer."""
    rng = np.random.default_rng(0)
    event, member = np.divmod(np.arange(rows), batch)
    step, layer = np.divmod(event, layers)
    return RoutingArrays(
        step=step.astype(np.int32),
        layer=layer.astype(np.int16),
        sequence=member.astype(np.int32),
        position=step.astype(np.int32),
        phase_is_decode=step > 0,
        token_id=np.zeros(rows, np.int32),
        is_pad=np.zeros(rows, bool),
        experts=(rng.integers(0, experts, (rows, 1)) + np.arange(top_k)).astype(np.uint16)
        % experts,
    )


def test_a_trace_beyond_the_limit_is_sampled_and_says_so(monkeypatch):
    routing = random_routing(24_000, batch=4, layers=3, experts=16, top_k=2)
    whole = describe_routing(routing, 3, 16)
    monkeypatch.setattr(sample, "SAMPLE_ROWS", 6000)

    part = describe_routing(routing, 3, 16)

    assert whole.sampled_tokens == whole.tokens == part.tokens == 8000
    assert 1000 <= part.sampled_tokens <= 4000
    assert (part.top_share, part.gini, part.entropy) == (whole.top_share, whole.gini, whole.entropy)
    assert part.decode.reuse == pytest.approx(whole.decode.reuse, abs=0.03)
    assert part.ratios[1].lru_hits == pytest.approx(whole.ratios[1].lru_hits, abs=0.03)


def test_one_long_sequence_is_cut_to_the_limit(monkeypatch):
    routing = random_routing(12_000, batch=1, layers=3, experts=16, top_k=2)
    monkeypatch.setattr(sample, "SAMPLE_ROWS", 3000)

    assert describe_routing(routing, 3, 16).sampled_tokens == 1000

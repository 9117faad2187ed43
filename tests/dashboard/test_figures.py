"""Figures by their data: what is drawn, in which unit, under which finding."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from expertflow.dashboard import timeline as lanes
from expertflow.dashboard import words
from expertflow.dashboard.figures import (
    candidates,
    capacity,
    compare,
    memory,
    names,
    patterns,
    policy,
    routing,
    sweep,
    time_split,
    timeline,
    verify,
    what_if,
)
from expertflow.simulator.result import Check, Sensitivity
from expertflow.simulator.sweep_row import table_of

from .conftest import AHEAD, make_curve, make_result, make_rows, make_tuning, make_verdict

COUNTS = np.array([[90, 10, 0, 0], [25, 25, 25, 25]])


@lru_cache(maxsize=1)
def every_figure() -> dict[str, go.Figure]:
    tuning, verdict = make_tuning("t"), make_verdict("t", validated=False)
    return {
        "heatmap": routing.heatmap(COUNTS, "decode"),
        "skew": routing.skew({"decode": COUNTS}),
        "capacity": capacity.capacity(tuning.curve, floor=0.2, budget=0.5),
        "speed": candidates.speed(
            tuning.candidates, chosen=AHEAD, bounds={"belady": 29}, measured={AHEAD: 26}
        ),
        "outcomes": candidates.outcomes(tuning.candidates, chosen=AHEAD),
        "checks": verify.checks(verdict.runs),
        "time split": time_split.time_split(verdict.runs),
        **pattern_figures(),
        **prediction_figures(),
    }


def pattern_figures() -> dict[str, go.Figure]:
    pairs = np.array([[40, 10, 5], [10, 40, 15], [5, 15, 40]])
    return {
        "reuse": patterns.reuse({"decode": np.array([5, 3, 1, 0, 0, 0, 0, 2])}),
        "reuse by layer": patterns.layers({"decode": (0.2, 0.4)}, 0.1),
        "transitions": patterns.transitions(pairs, 0, (0.5, 0.2), similar=True),
        "company": patterns.company(pairs, 0),
        "drift": patterns.drift(np.array([[5, 5], [9, 1], [5, 5], [1, 9]]), 0),
        "domains": patterns.domains({"a": COUNTS, "b": COUNTS[:, ::-1]}, 0.1),
    }


def prediction_figures() -> dict[str, go.Figure]:
    tuning = make_tuning("t")
    points = [("lru", make_result("lru", slots=n, tokens_per_s=n)) for n in (16, 32, 64)]
    points += [("belady", make_result("belady", slots=n, tokens_per_s=n + 5)) for n in (16, 32, 64)]
    frame = memory.memory_frame(points, 4 << 20)
    marks = memory.Marks(
        expert_bytes=4 << 20,
        floor=16,
        tight=13.6,
        resident_tokens_per_s=80,
        wanted_tokens_per_s=40,
        answer=40,
    )
    one = points[1][1]
    passes = pd.DataFrame(
        {
            "step": [0],
            "phase": ["decode"],
            "tokens": [1],
            "start_s": [0.0],
            "total_s": [1.0],
            "stall_s": [0.5],
        }
    )
    bar = (lanes.COMPUTE, "experts", 0.0, 1.0, 0, 0, -1, 0)
    window = lanes.Timeline(
        bars=pd.DataFrame([bar], columns=list(lanes.COLUMNS)), passes=passes, is_recorded=False
    )
    return {
        "speed over memory": memory.speed(frame, ["lru"], marks),
        "hits over memory": memory.hits(frame, ["lru"], marks),
        "split": what_if.split([one]),
        "over memory": what_if.over_memory([(0.25, one), (1.0, one)], one, 0.5),
        "over link": what_if.over_link([(1.0, one), (10.0, one)], one, 4.0),
        "slots": policy.slots([((0,), 4), ((1,), 6)], 16),
        "sensitivity": policy.sensitivity(
            [
                Sensitivity(
                    change="link 10 % slower",
                    chosen_tokens_per_s=9,
                    best="lfu",
                    best_tokens_per_s=10,
                    loss=0.1,
                )
            ]
        ),
        "compare": compare.compare({"a": one, "b": tuning.candidates[0]}),
        "lanes": timeline.lanes(window, 0, 0),
        "passes": timeline.passes(passes, 0, 0, is_recorded=True),
        "importance": sweep.importance(table_of(make_rows()[:-1]).to_pandas(), "tokens_per_s"),
        "pareto": sweep.pareto(table_of(make_rows()[:-1]).to_pandas(), "slots", "tokens_per_s"),
    }


@pytest.mark.parametrize("name", sorted(every_figure()))
def test_every_figure_is_titled_labelled_and_small(name: str) -> None:
    fig = every_figure()[name]
    assert fig.layout.title.text
    axes = [axis for axis in fig.select_xaxes() if axis.title.text]
    assert axes, "an axis without its unit says nothing"
    for trace in fig.data:
        template = trace.hovertemplate
        assert trace.hoverinfo == "skip" or template.endswith("<extra></extra>")
    assert len(json.dumps(fig.to_plotly_json(), default=str)) < 2_000_000


def test_memory_figures_mark_the_floor_the_bound_and_the_answer() -> None:
    figs = prediction_figures()
    fig = figs["speed over memory"]
    assert [trace.name for trace in fig.data] == [
        "lru",
        "belady (bound: knows the future)",
        "everything resident (bound)",
        "what you asked for",
    ]
    assert list(fig.data[0].x) == [64, 128, 256]
    assert fig.data[3].x[0] == 160
    notes = " ".join(note.text for note in fig.layout.annotations)
    assert "floor: 16 slots" in notes
    assert "95 % of the best predicted speed takes 256 MiB" in fig.layout.title.text


def test_choice_is_firm_only_where_nothing_is_lost() -> None:
    assert "At worst it loses 10.0 %" in prediction_figures()["sensitivity"].layout.title.text
    firm = Sensitivity(change="x", chosen_tokens_per_s=10, best="lru", best_tokens_per_s=10, loss=0)
    assert policy.sensitivity_finding([firm])[0].startswith("The choice holds")
    assert "4 to 6 slots" in policy.slots_finding([((0,), 4), ((1,), 6)], 16)[0]
    assert "share 8 slots" in policy.slots_finding([((0, 1), 8)], 16)[0]


def test_heatmap_shows_shares_of_each_layer() -> None:
    fig = routing.heatmap(COUNTS, "decode")
    np.testing.assert_allclose(fig.data[0].z, [[90, 10, 0, 0], [25, 25, 25, 25]])
    assert "layer 0, expert 0 with 90.0 %" in fig.layout.title.text
    assert "2 of 8 experts are never chosen" in fig.layout.title.text


def test_heatmap_busiest_first_keeps_the_ids() -> None:
    counts = np.array([[1, 5, 3]])
    fig = routing.heatmap(counts, "decode", "share")
    assert list(fig.data[0].customdata[0]) == [1, 2, 0]
    assert np.all(np.diff(fig.data[0].z[0]) <= 0)


def test_heatmap_of_nothing_says_so() -> None:
    assert "no choices" in routing.heatmap(np.zeros((2, 4), int), "prefill").layout.title.text


def test_skew_of_even_routing_is_the_diagonal() -> None:
    even = np.full((2, 8), 5)
    assert routing.share_of_busiest(even, 0.25) == pytest.approx(0.25)
    assert routing.share_of_busiest(COUNTS, 1 / 8) == pytest.approx(90 / 200)


def test_domains_apart_are_named() -> None:
    apart = routing.domain_distance(
        {"a": np.array([[1, 0]]), "b": np.array([[0, 1]]), "c": np.array([[1, 1]])}
    )
    assert apart == ("a", "b", 1.0)
    assert routing.domain_distance({"a": COUNTS}) is None


def test_capacity_draws_bounds_last_and_marks_floor_and_budget() -> None:
    fig = capacity.capacity(make_curve(), floor=0.2, budget=0.5)
    assert [trace.name for trace in fig.data][-1] == "belady (bound: knows the future)"
    assert fig.data[-1].line.dash == "dash"
    assert "lfu hits 66 %; perfect foresight 83 %" in fig.layout.title.text
    notes = " ".join(note.text for note in fig.layout.annotations)
    assert "r ≥ 1 below 20 %" in notes
    assert "budget: 50 %" in notes


def test_floor_is_where_one_step_fills_a_layer() -> None:
    result = make_result("lru", slots=32)
    assert capacity.floor_share(result) == pytest.approx(3.4 / 16)


def test_predicted_is_hollow_and_measured_solid() -> None:
    fig = verify.checks(make_verdict("t", validated=True).runs)
    symbols = {trace.name: trace.marker.symbol for trace in fig.data if trace.name != "tolerance"}
    assert symbols == {"measured": "circle", "predicted": "circle-open"}


def test_bands_span_the_tolerance() -> None:
    check = Check(
        quantity="tokens_per_s",
        unit="tokens/s",
        predicted=22,
        measured=20,
        gap=0.1,
        tolerance=0.05,
        noise=0.01,
        passed=False,
    )
    assert verify.band_half_width(check) == pytest.approx(1.0)
    assert words.gap(check, check.gap) == "+10.0 %"


def test_rates_are_compared_in_points() -> None:
    check = Check(
        quantity="hit_rate",
        unit="share",
        predicted=0.71,
        measured=0.70,
        gap=0.01,
        tolerance=0.01,
        noise=0.0,
        passed=True,
    )
    assert words.is_absolute(check)
    assert words.gap(check, check.gap) == "+1.0 points"
    assert words.amount(check, check.measured) == "70.0 %"


def test_failed_checks_are_counted_and_marked() -> None:
    fig = verify.checks(make_verdict("t", validated=False).runs)
    assert "16 of 18 checks" in fig.layout.title.text
    marks = [mark for trace in fig.data if trace.text for mark in trace.text]
    assert marks.count("✗") == 2


def test_what_is_not_judged_is_drawn_and_not_counted() -> None:
    (run, *_) = make_verdict("t", validated=True).runs
    late = replace(run.checks[-1], quantity="ttft_p99_s", gap=0.9, passed=False, is_judged=False)
    runs = [replace(run, checks=(*run.checks, late))]
    fig = verify.checks(runs)
    assert "6 of 6 checks" in fig.layout.title.text
    assert "time to first token p99" in [note.text for note in fig.layout.annotations]
    assert not any("✗" in mark for trace in fig.data if trace.text for mark in trace.text)
    assert verify.checks_frame(runs)["judged"].tolist() == [True] * 6 + [False]


def test_time_parts_add_up_to_the_total() -> None:
    (run, *_) = make_verdict("t", validated=True).runs
    frame = time_split.time_split_frame([run])
    predicted = frame[frame["source"] == "predicted"]["seconds"].sum()
    assert predicted == pytest.approx(run.predicted.time.total_s)


def test_shortlist_keeps_the_chosen_and_the_slowest() -> None:
    many = [make_result(f"p{i}", tokens_per_s=50 - i) for i in range(30)]
    shown = [r.label for r in candidates.shortlist(many, "p20")]
    assert len(shown) <= candidates.MAX_BARS + 1
    assert {"p0", "p20", "p29"} <= set(shown)


def test_names_cannot_smuggle_markup_into_charts() -> None:
    evil = make_result("<a href='x'>y</a>")
    text = candidates.speed([evil]).to_json() + candidates.outcomes([evil]).to_json()
    assert "<a href" not in text
    assert words.plain("[x](http://y) $z$ :red[q]") == r"\[x\]\(http\://y\) \$z\$ \:red\[q\]"


def test_long_names_that_start_alike_stay_apart() -> None:
    long = [f"lfu(half_life=64) + marginal + gate-lookahead(depth={i}) @ 800 slots" for i in (1, 2)]
    shown = names.short_names(long, 30)
    assert len(set(shown)) == 2
    assert all(len(name) <= 30 + len(" (2)") for name in shown)
    assert names.short_names(["a", "a"]) == ["a", "a (2)"]
    runs = make_verdict("t", validated=True).runs[:2]
    alike = [replace(run, label=label) for run, label in zip(runs, long, strict=True)]
    rows = {name for trace in verify.checks(alike).data for name in trace.y if name}
    assert len(rows) == 2

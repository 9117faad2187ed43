"""Results by name, and nothing but what differs between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from expertflow.dashboard import data, results
from expertflow.dashboard.figures import compare
from expertflow.dashboard.views import compare as view

from .conftest import make_result


def test_every_result_of_a_folder_has_a_name_of_its_own(demo: Path) -> None:
    found = results.named_results(data.discover(demo))
    assert len(found) == 2 * 6 + 1 + 6
    assert view.suggested(found) == [
        "lfu + gate-ahead, predicted (demo-verdict.json)",
        "lfu + gate-ahead, measured (demo-verdict.json)",
        "none, predicted (other-verdict.json)",
        "none, measured (other-verdict.json)",
    ]


def test_the_repeat_in_the_middle_stands_for_all() -> None:
    repeats = [make_result("lru", tokens_per_s=speed) for speed in (9.0, 7.0, 8.0, 10.0)]
    assert results.median(repeats).tokens_per_s == 8.0


def test_only_settings_that_differ_are_named() -> None:
    one, other = make_result("lru"), replace(make_result("lfu", slots=48), link="pcie4-x16")
    rows = results.differing({"a": one, "b": other})
    assert set(rows) == {"policy.cache", "policy_hash", "slots", "link"}
    assert rows["slots"] == {"a": "32", "b": "48"}
    assert not results.differing({"a": one, "b": replace(one, tokens_per_s=1.0)})


def test_unlike_runs_are_said_to_be_unlike() -> None:
    one = make_result("lru")
    assert results.unlike({"a": one, "b": one}) == []
    other = replace(one, trace_id="else", batch_size=9)
    assert results.unlike({"a": one, "b": other}) == [
        "of different traces",
        "with different batches",
    ]


def test_a_forecast_and_its_measurement_share_a_colour() -> None:
    one = make_result("lru")
    fig = compare.compare({"p": one, "m": replace(one, source="measured"), "x": make_result("lfu")})
    first, second, third = fig.data[0].marker.line.color
    assert first == second != third
    predicted, measured, _ = fig.data[0].marker.color
    assert measured == first
    assert predicted.startswith("rgba")
    assert len(fig.data) == len(compare.QUANTITIES)


def test_long_values_are_cut() -> None:
    assert results.flatten({"a": {"b": "x" * 500}, "c": [1]}, limit=10) == [
        ("a.b", "x" * 9 + "…"),
        ("c", "[1]"),
    ]

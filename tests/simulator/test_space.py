"""What a sweep may try: from the trace, from a TOML, and in points that each stand for one configuration."""

from dataclasses import replace
from typing import ClassVar

import pytest
from expertflow.simulator.feasible import BUDGETS, builtin_space, feasible, lacking
from expertflow.simulator.forecast import forecaster
from expertflow.simulator.policy.base import BaseCache
from expertflow.simulator.policy.registry import FAMILIES, caches
from expertflow.simulator.policy.spec import Member
from expertflow.simulator.space import Budget, Option, Point, Range, Space, bound_points, grid
from expertflow.simulator.space_file import parse_budgets, read_space
from expertflow.simulator.sweep import plan_of
from expertflow.tracer.errors import InputError, UsageError

EXAMPLE = """
[space]
budgets = [0.25, 0.5, "200MiB"]
caches = ["lru", "lfu", {name = "slru", protected = [0.5, 0.8]}]
allocations = ["equal", "global"]
predictors = ["none", {name = "gate_lookahead", depth = [1, 2]}]
misses = ["load"]
links = ["pcie4x16", "12GB/s+10us"]
[search]
method = "auto"
trials = 300
objectives = ["tokens_per_s", "peak_device_bytes"]
"""


@pytest.fixture(scope="module")
def ready(trace):
    return forecaster(trace)


@pytest.fixture(scope="module")
def builtin(ready):
    return builtin_space(ready.workload, ready.costs, parse_budgets(BUDGETS, ready.shape))


@pytest.fixture
def read(tmp_path, ready, builtin):
    def parse(text):
        path = tmp_path / "space.toml"
        path.write_text(text)
        return read_space(path, ready.shape, builtin)

    return parse


def names(space: Space, kind: str) -> set[str]:
    return {option.name for option in space.members[kind]}


def tiny_space(**changes) -> Space:
    space = Space(
        budgets=(Budget("0.25", 16), Budget("0.5", 32)),
        members={
            "cache": (Option("lru"), Option("slru", {"protected": (0.5, 0.8)})),
            "allocation": (Option("equal"), Option("global")),
            "predictor": (Option("none"),),
            "scheduler": (Option("fcfs"),),
            "misses": (Option("load"),),
        },
    )
    return replace(space, **changes)


# --- the built-in space ------------------------------------------------------------------------


def test_builtin_space_holds_what_the_trace_can_feed_and_the_runtime_can_deploy(builtin, ready):
    for family in FAMILIES:
        if family.kind == "scheduler":
            continue  # a recorded trace has its batches already
        for name in family.names():
            member = family.get(name)
            is_wanted = (
                member.is_lossless
                and "future" not in member.needs
                and feasible(member.needs, ready.workload, ready.costs)
                # Nothing to choose a depth from, and nobody knows what a second wave costs (test_adaptive.py).
                and not hasattr(member, "depth_param")
                and not getattr(member, "is_baseline", False)
                and not getattr(member, "residents_first", False)
            )
            rivals = {option.name for option in builtin.rivals}
            found = names(builtin, family.kind) | (rivals if family.kind == "predictor" else set())
            assert (name in found) == is_wanted


def test_members_that_need_what_the_trace_lacks_are_left_out(ready, builtin):
    bare = replace(ready.workload, lookahead=0, weights=None)

    space = builtin_space(bare, ready.costs, builtin.budgets)

    assert "score" in names(builtin, "cache")
    assert "score" not in names(space, "cache")
    assert names(builtin, "predictor") == {"none", "gate_lookahead"}
    assert names(space, "predictor") == {"none"}


def test_each_recorded_depth_of_look_ahead_is_tried(ready, builtin):
    deep = replace(ready.workload, lookahead=3)

    (ahead,) = [
        option
        for option in builtin_space(deep, ready.costs, builtin.budgets).members["predictor"]
        if option.name == "gate_lookahead"
    ]

    assert ahead.params == {"depth": (1, 2, 3)}


def test_feasibility_is_asked_of_needs_not_of_names(ready, builtin):
    class Leaves(BaseCache):
        """Reads tea leaves."""

        name: ClassVar[str] = "leaves"
        needs: ClassVar[frozenset[str]] = frozenset({"tea"})
        is_lossless: ClassVar[bool] = True

    caches.register("leaves", Leaves)
    try:
        space = builtin_space(ready.workload, ready.costs, builtin.budgets)
    finally:
        caches.unregister("leaves")

    assert "leaves" not in names(space, "cache")
    assert "tea" in lacking(Leaves.needs, ready.workload, ready.costs)
    assert feasible({"popularity", "curves", "routing", "future"}, ready.workload, ready.costs)


def test_bounds_stand_beside_the_grid_and_never_in_it(builtin):
    bounds = bound_points(builtin)

    assert all(point.is_bound for point in bounds)
    assert not any(point.is_bound for point in grid(builtin))
    assert {"belady", "oracle"} <= {m.name for p in bounds for m in p.members.values()}
    assert {p.slots for p in bounds} == {b.slots for b in builtin.budgets}
    assert bound_points(replace(builtin, bounds=False)) == []


# --- points ------------------------------------------------------------------------------------


def test_grid_holds_every_combination_once():
    space = tiny_space(links=(None, "pcie4x16"))
    points = grid(space)

    assert len(points) == space.size() == 2 * 2 * 3 * 2
    assert len({point.key for point in points}) == len(points)


def test_budgets_that_pay_for_the_same_slots_are_one_point():
    space = tiny_space(budgets=(Budget("0.5", 32), Budget("32slots", 32)))

    assert {point.budget for point in grid(space)} == {"0.5"}
    assert len(grid(space)) == 6


def test_key_changes_with_all_that_makes_a_configuration():
    point = grid(tiny_space())[0]
    others = (
        replace(point, slots=point.slots + 1),
        replace(point, link="pcie4x16"),
        replace(point, members={**point.members, "cache": Member(name="lfu")}),
        replace(point, members={**point.members, "cache": Member(name="lru", params={"x": 1})}),
    )

    assert len({point.key, *(other.key for other in others)}) == 5
    assert replace(point, budget="another word").key == point.key


def test_whole_numbers_from_low_to_high_can_be_listed_and_shares_cannot():
    whole = tiny_space(budgets=Range(5, 8))
    shares = tiny_space(
        members={**whole.members, "cache": (Option("slru", {"protected": Range(0.1, 0.9)}),)}
    )

    assert {point.slots for point in grid(whole)} == {5, 6, 7, 8}
    assert whole.size() == len(grid(whole))
    assert shares.size() is None


# --- how it is walked --------------------------------------------------------------------------


def test_small_grids_are_walked_in_full_and_others_searched(read):
    small = tiny_space()
    endless, wanted = read(
        "[space]\ncaches = [{name = 'slru', protected = {low = 0.1, high = 0.9}}]"
    )
    large = tiny_space(bounds=False, budgets=tuple(Budget(f"{n}slots", n) for n in range(1, 400)))

    assert plan_of(small, wanted).method == "grid"
    assert {p.key for p in plan_of(small, wanted).points} >= {p.key for p in grid(small)}
    assert plan_of(endless, wanted).method == "optuna"
    assert plan_of(large, wanted).method == "optuna"
    assert plan_of(large, replace(wanted, method="grid")).method == "grid"
    assert plan_of(small, replace(wanted, method="optuna")).method == "optuna"


def test_trials_ask_for_a_search_where_there_are_more_points(read):
    _, wanted = read("")

    assert plan_of(tiny_space(), wanted, trials=5).method == "optuna"
    assert plan_of(tiny_space(), wanted, trials=12).method == "grid"
    with pytest.raises(UsageError, match="--trials"):
        plan_of(tiny_space(), replace(wanted, method="grid"), trials=5)


# --- the file ----------------------------------------------------------------------------------


def test_a_file_says_budgets_members_parameters_links_and_search(read):
    space, wanted = read(EXAMPLE)

    assert [budget.text for budget in space.all_budgets()] == ["0.25", "0.5", "200MiB"]
    assert [budget.slots for budget in space.all_budgets()] == [16, 32, 50]
    assert space.members["cache"][2] == Option("slru", {"protected": (0.5, 0.8)})
    assert space.members["predictor"][1] == Option("gate_lookahead", {"depth": (1, 2)})
    assert space.links == ("pcie4x16", "12GB/s+10us")
    assert wanted.trials == 300
    assert space.size() == 3 * 4 * 2 * 3 * 2


def test_what_a_file_leaves_out_is_as_in_the_built_in_space(read, builtin):
    space, wanted = read('[space]\ncaches = ["lru"]')

    assert names(space, "cache") == {"lru"}
    assert replace(space, members=builtin.members) == builtin
    assert wanted.method == "auto"
    assert read("")[0] == builtin


def test_ranges_of_budgets_are_whole_slots(read):
    shares, _ = read("[space]\nbudgets = {low = 0.25, high = 0.5}")
    sizes, _ = read('[space]\nbudgets = {low = "100MiB", high = "200MiB"}')

    assert shares.budgets == Range(16, 32)
    assert sizes.budgets == Range(25, 50)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[spaces]", ("'spaces'", "allowed: space, search", "'space'?")),
        ("[space]\ncashes = ['lru']", ("[space]", "'cashes'", "'caches'?")),
        ("[space]\ncaches = ['lruu']", ("caches", "'lruu'", "'lru'?", "sieve")),
        ("[space]\npredictors = ['gate']", ("predictors", "gate_lookahead", "none")),
        ("[space]\nallocations = ['globl']", ("allocations", "'global'?")),
        ("[space]\nschedulers = ['fifo']", ("schedulers", "fcfs")),
        ("[space]\nmisses = ['laod']", ("misses", "'load'?")),
        ("[space]\ncaches = []", ("caches", "empty")),
        ("[space]\ncaches = 'lru'", ("caches", "list")),
        ("[space]\ncaches = [3]", ("caches", "name", "3")),
        ("[space]\ncaches = [{protected = 0.5}]", ("caches", "no name")),
        ("[space]\ncaches = [{name = 'slru', protectd = 0.5}]", ("slru", "'protected'?")),
        ("[space]\ncaches = [{name = 'lru', size = 2}]", ("lru", "'size'", "takes none")),
        ("[space]\ncaches = [{name = 'static', popularity = [1]}]", ("static", "'popularity'")),
        ("[space]\ncaches = [{name = 'slru', protected = []}]", ("protected", "empty")),
        ("[space]\ncaches = [{name = 'slru', protected = nan}]", ("protected", "number")),
        ("[space]\ncaches = [{name = 'slru', protected = {low = 0.1}}]", ("low and high",)),
        (
            "[space]\ncaches = [{name = 'slru', protected = {low = 0.9, high = 0.1}}]",
            ("rises", "0.9"),
        ),
        (
            "[space]\ncaches = [{name = 'slru', protected = {low = 0.1, hihg = 0.9}}]",
            ("'hihg'", "'high'?"),
        ),
        ("[space]\nbudgets = [1.5]", ("budgets", "'1.5'", "128slots")),
        ("[space]\nbudgets = ['6Gib']", ("budgets", "'6Gib'", "6GiB")),
        ("[space]\nbudgets = [true]", ("budgets", "true", "text")),
        ("[space]\nbudgets = {low = 0.9, high = 0.1}", ("budgets", "rises")),
        ("[space]\nlinks = ['pcie4x61']", ("links", "'pcie4x16'?")),
        ("[space]\nbounds = 1", ("bounds", "true or false")),
        ("[search]\nmethod = 'gird'", ("method", "'grid'?")),
        ("[search]\ntrials = 0", ("trials", "at least 1")),
        ("[search]\ntrials = 2.5", ("trials", "whole number")),
        ("[search]\nobjectives = ['token_per_s']", ("objectives", "'tokens_per_s'?")),
        ("[search]\nobjectives = ['slots', 'slots']", ("objectives", "twice")),
        (
            "[search]\nmethod = 'grid'\n[space]\n"
            "caches = [{name = 'slru', protected = {low = 0.1, high = 0.9}}]",
            ("grid", "continuous", "optuna"),
        ),
        ("search = 3", ("[search]", "table")),
        ("[space", ("not readable TOML",)),
    ],
)  # fmt: skip
def test_whatever_is_wrong_in_a_file_is_named_with_what_is_allowed(read, text, words):
    with pytest.raises(InputError) as failure:
        read(text)

    message = str(failure.value)
    assert "space.toml" in message
    for word in words:
        assert word.lower() in message.lower()


def test_a_missing_file_is_named(tmp_path, ready, builtin):
    with pytest.raises(InputError, match=r"nowhere\.toml does not exist"):
        read_space(tmp_path / "nowhere.toml", ready.shape, builtin)


def test_a_point_knows_what_its_members_need():
    point = Point(
        budget="0.5",
        slots=32,
        link=None,
        members={
            kind: Member(name=name)
            for kind, name in (
                ("cache", "belady"),
                ("allocation", "marginal_gain"),
                ("predictor", "gate_lookahead"),
                ("scheduler", "fcfs"),
                ("misses", "load"),
            )
        },
    )

    assert point.needs == {"future", "curves", "lookahead"}
    assert point.is_bound

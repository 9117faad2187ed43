"""Every built-in member keeps its family's contract; so does one from outside."""

from collections.abc import Iterator
from types import MappingProxyType

import pytest
from expertflow.simulator.policy.caches.lru import LRU
from expertflow.simulator.policy.checked import (
    random_script,
    require_replay,
    tiny_lessons,
    tiny_shape,
)
from expertflow.simulator.policy.registry import (
    FAMILIES,
    Registry,
    allocations,
    caches,
    misses,
    predictors,
    routings,
    schedulers,
)
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.policy.testing import (
    AllocationContract,
    CacheContract,
    MissesContract,
    PredictorContract,
    RoutingContract,
    SchedulerContract,
)
from expertflow.tracer.errors import UsageError

SUITES = (
    (caches, CacheContract),
    (predictors, PredictorContract),
    (allocations, AllocationContract),
    (schedulers, SchedulerContract),
    (misses, MissesContract),
    (routings, RoutingContract),
)

# A file added to a family's folder is tested without a line here.
for registry, suite in SUITES:
    for member in registry.names():
        title = f"Test{suite.__name__.removesuffix('Contract')}_{member}"
        globals()[title] = type(title, (suite,), {"name": member})


class TestDeepLookahead(PredictorContract):
    name = "gate_lookahead"
    params = MappingProxyType({"depth": 2, "width": 1})


class TestFarOracle(PredictorContract):
    name = "oracle"
    params = MappingProxyType({"horizon": 3})


class MRU(LRU):
    """Most recently used goes first: a third party's cache."""

    name = "mru"

    def victim(self, protected):
        return next((key for key in reversed(self._order) if key not in protected), None)


class TestThirdParty(CacheContract):
    name = "mru"

    @pytest.fixture(autouse=True)
    def _registered(self) -> Iterator[None]:
        caches.register("mru", MRU)
        yield
        caches.unregister("mru")

    def test_is_found_by_name_like_a_built_in(self):
        assert "mru" in caches.names()
        assert make_spec(slots=2, cache="mru").cache.name == "mru"

    def test_cannot_take_a_name_that_is_in_use(self):
        with pytest.raises(UsageError, match="choose another name"):
            caches.register("mru", MRU)
        with pytest.raises(UsageError, match="'lru' exists already"):
            caches.register("lru", MRU)


class Broken(LRU):
    """Forgets protection."""

    name = "broken"

    def victim(self, protected):
        return next(iter(self._order), None)


def test_the_contract_fails_a_cache_that_evicts_what_is_protected():
    caches.register("broken", Broken)
    try:
        suite = type("Suite", (CacheContract,), {"name": "broken"})()
        with pytest.raises(AssertionError):
            suite.test_victim_is_resident_unprotected_and_none_only_if_all_are_protected()
        with pytest.raises(AssertionError):
            suite.test_log_of_any_policy_with_it_replays_exactly()
    finally:
        caches.unregister("broken")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
def test_unknown_names_are_refused_with_the_nearest(family: Registry):
    name = family.names()[0]

    with pytest.raises(UsageError, match=f"Did you mean '{name}'") as caught:
        family.get(name + "x")

    for known in family.names():
        assert known in str(caught.value)


def test_wrong_parameters_are_named():
    with pytest.raises(UsageError, match=r"cache 'lru' cannot take \['size'\]"):
        caches.build("lru", {"size": 3})


@pytest.mark.parametrize("cache", caches.names())
@pytest.mark.parametrize("allocation", allocations.names())
@pytest.mark.parametrize("predictor", predictors.names())
def test_log_of_every_combination_replays_exactly(cache, allocation, predictor):
    shape = tiny_shape()
    for slots, answer in ((1, "load"), (5, "sooner"), (24, "cpu")):
        spec = make_spec(
            slots=slots,
            cache=cache,
            allocation=allocation,
            predictor=predictor,
            misses=answer,
            **tiny_lessons(shape),
        )

        log = require_replay(spec, shape, random_script(shape, slots))

        assert {entry.kind for entry in log} >= {"event", "release"}

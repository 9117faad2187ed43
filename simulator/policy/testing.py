"""Contract suites for members of the families, for pytest.

Subclass the suite of a family, name a registered member, and every promise the decision core relies on
is tested:

    from expertflow.simulator.policy.testing import CacheContract

    class TestMyCache(CacheContract):
        name = "my_cache"

Members are given what they declare in `needs`: popularity, curves, CPU times, the future.
"""

# ruff: noqa: D102 - the name of a test says what it tests

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from ...tracer.types import ExpertKey, ModelShape
from .base import (
    NEEDS,
    NO_FACTS,
    Allocation,
    Cache,
    GateScores,
    Misses,
    Predictor,
    Route,
    Routed,
    Routing,
    Scheduler,
    Signals,
    Waiting,
)
from .checked import (
    Dice,
    ScriptedEvent,
    random_script,
    require_replay,
    tiny_lessons,
    tiny_shape,
)
from .future import Future
from .registry import Registry, allocations, caches, misses, predictors, routings, schedulers
from .spec import Member, PolicySpec
from .units import ask, regrouping_of


class _MemberContract:
    """What every member of every family promises. Subclasses set `name`, and `params` if it takes any."""

    registry: ClassVar[Registry]
    name: ClassVar[str]
    params: ClassVar[Mapping[str, Any]] = {}
    shape: ClassVar[ModelShape] = tiny_shape()

    @property
    def member(self) -> type[Any]:
        """The class under test."""
        return self.registry.get(self.name)

    def make_params(self) -> dict[str, Any]:
        """Parameters that go into policy.json, with what the member asks to be taught."""
        params: dict[str, Any] = {}
        taught = tiny_lessons(self.shape)
        tables = taught.pop("lessons")
        for need, lesson in {**taught, **tables}.items():
            if need in self.member.needs:
                params |= lesson if need == "cpu_times" else {need: lesson}
        return params | dict(self.params)

    def make(self, future: Future | None = None) -> Any:
        """A fresh member, knowing `future` if it needs to."""
        params = self.make_params()
        if "future" in self.member.needs:
            params["future"] = future or Future([])
        return self.registry.build(self.name, params)

    def spec(self, slots: int, **members: Member) -> PolicySpec:
        """A whole policy around the member, of the plainest others unless given."""
        chosen = {
            "cache": Member(name="lru"),
            "predictor": Member(name="none"),
            "allocation": Member(name="global"),
            "scheduler": Member(name="fcfs"),
            "misses": Member(name="load"),
            "routing": Member(name="as_routed"),
            self.registry.kind: Member(name=self.name, params=self.make_params()),
            **members,
        }
        return PolicySpec(slots=slots, **chosen)

    def sizes(self) -> Iterator[int]:
        """Slots worth trying: one, too few, some, all."""
        total = self.shape.total_experts
        yield from (1, 2, self.shape.num_experts, total // 2 + 1, total)

    def test_says_what_it_is(self) -> None:
        member = self.member

        assert member.name == self.name
        assert set(member.needs) <= set(NEEDS)
        assert isinstance(member.is_lossless, bool)
        assert (member.__doc__ or "").strip(), "`expertflow-trace list` shows the docstring"

    def test_log_of_any_policy_with_it_replays_exactly(self) -> None:
        for seed, slots in enumerate(self.sizes()):
            for allocation in ("global", "equal"):
                extra = {} if self.registry.kind == "allocation" else {"allocation": allocation}
                spec = self.spec(slots, **{k: Member(name=v) for k, v in extra.items()})

                require_replay(spec, self.shape, random_script(self.shape, seed))


class CacheContract(_MemberContract):
    """Promises of a cache. See the module docstring."""

    registry = caches

    def _life(self, seed: int, seen: Callable[[Cache, set[ExpertKey], Dice], None]) -> None:
        """Let a cache of five places live through random events; call `seen` after each."""
        dice = Dice(seed)
        script = random_script(self.shape, seed, prefetches=False)
        future = Future([event.keys for event in script])
        cache: Cache = self.make(future)
        cache.size(5)
        residents: set[ExpertKey] = set()
        for event in script:
            future.advance()
            cache.begin(event.keys, NO_FACTS)
            for key in event.keys:
                if key in residents:
                    cache.touch(key)
                    continue
                if len(residents) >= 5:
                    gone = cache.victim(())
                    assert gone is not None, "a full cache has a victim"
                    cache.remove(gone)
                    residents.remove(gone)
                cache.admit(key)
                residents.add(key)
            seen(cache, residents, dice)

    def test_victim_is_resident_unprotected_and_none_only_if_all_are_protected(self) -> None:
        def seen(cache: Cache, residents: set[ExpertKey], dice: Dice) -> None:
            ordered = sorted(residents)
            for count in (0, 1, dice.below(len(ordered) + 1), len(ordered)):
                protected = frozenset(dice.some(ordered, count))

                found = cache.victim(protected)

                if protected >= residents:
                    assert found is None
                else:
                    assert found in residents
                    assert found not in protected

        for seed in range(3):
            self._life(seed, seen)

    def test_asking_for_a_victim_changes_nothing(self) -> None:
        def seen(cache: Cache, residents: set[ExpertKey], dice: Dice) -> None:
            protected = frozenset(dice.some(sorted(residents), 2))
            before = cache.victim(protected)
            cache.victim(residents)

            assert cache.victim(protected) == before

        self._life(4, seen)

    def test_same_calls_give_the_same_victims(self) -> None:
        lives: list[list[ExpertKey | None]] = [[], []]
        for life in lives:
            self._life(5, lambda cache, _residents, _dice, life=life: life.append(cache.victim(())))

        assert lives[0] == lives[1]

    def test_draining_names_every_resident_once_and_leaves_it_usable(self) -> None:
        cache: Cache = self.make()
        cache.size(self.shape.num_experts)
        keys = [ExpertKey(0, expert) for expert in range(self.shape.num_experts)]
        for _ in range(2):
            for key in keys:
                cache.admit(key)
            gone: list[ExpertKey] = []
            while (key := cache.victim(())) is not None:
                cache.remove(key)
                gone.append(key)

            assert sorted(gone) == keys

    def test_releases_only_residents(self) -> None:
        cache: Cache = self.make()
        cache.size(self.shape.num_experts)
        keys = [ExpertKey(0, expert) for expert in range(4)]
        for key in keys:
            cache.admit(key)

        assert set(cache.released(keys[:2])) <= set(keys)

    def test_warms_with_distinct_experts_that_fit(self) -> None:
        keys = [ExpertKey(1, expert) for expert in range(self.shape.num_experts)]
        for slots in (1, 3, len(keys)):
            cache: Cache = self.make(Future([keys[:2], keys[2:5]]))
            cache.size(slots)

            found = list(cache.warm(keys, slots))

            assert len(found) == len(set(found)) <= slots
            assert set(found) <= set(keys)


class PredictorContract(_MemberContract):
    """Promises of a predictor. See the module docstring."""

    registry = predictors

    def _asked(self) -> list[list[ExpertKey]]:
        """What a fresh predictor says over some steps."""
        script = self._with_signals()
        future = Future([event.keys for event in script])
        predictor: Predictor = self.make(future)
        said: list[list[ExpertKey]] = []
        for event in script:
            future.advance()
            said.append(list(predictor.predict(event.layer, event.signals)))
        return said

    def _with_signals(self, seed: int = 6) -> list[ScriptedEvent]:
        dice, layers = Dice(seed), self.shape.num_moe_layers
        script: list[ScriptedEvent] = []
        for event in random_script(self.shape, seed):
            ahead = range(1, layers - event.layer)
            groups = {
                depth: [
                    dice.some(range(self.shape.num_experts), self.shape.top_k) for _ in range(2)
                ]
                for depth in ahead
            }
            script.append(
                ScriptedEvent(
                    event.step,
                    event.layer,
                    event.experts,
                    None,
                    event.ends,
                    self._signals(event, groups, dice),
                    event.facts,
                )
            )
        return script

    def _signals(
        self, event: ScriptedEvent, groups: Mapping[int, Sequence[Sequence[int]]], dice: Dice
    ) -> Signals:
        """Sequences come and go, some tokens are not known, and a sequence may have several."""
        top_k = self.shape.top_k
        rows = [
            event.experts[place : place + top_k] for place in range(0, len(event.experts), top_k)
        ]
        return Signals(
            groups,
            rows,
            [event.step // 3 + dice.below(3) for _ in rows],
            [dice.below(30) - 1 for _ in rows],
        )

    def test_names_only_experts_of_the_model(self) -> None:
        for said in self._asked():
            for key in said:
                assert isinstance(key, ExpertKey)
                assert 0 <= key.layer < self.shape.num_moe_layers
                assert 0 <= key.expert < self.shape.num_experts

    def test_same_calls_give_the_same_predictions(self) -> None:
        assert self._asked() == self._asked()

    def test_bears_missing_signals(self) -> None:
        predictor: Predictor = self.make(Future([]))

        for layer in range(self.shape.num_moe_layers):
            assert len(predictor.predict(layer, Signals({}))) >= 0

    def test_log_replays_when_it_is_asked(self) -> None:
        for slots in self.sizes():
            require_replay(self.spec(slots), self.shape, self._with_signals(slots))


class AllocationContract(_MemberContract):
    """Promises of an allocation. See the module docstring."""

    registry = allocations

    def test_shares_cover_every_layer_once_within_the_slots(self) -> None:
        for layers, experts in ((1, 1), (1, 8), (3, 4), (5, 2), (16, 64)):
            total = layers * experts
            for slots in sorted({1, 2, layers, layers + 1, total // 2 + 1, total, total + 3}):
                member: Allocation = self.make()

                shares = member.divide(layers, experts, slots)

                covered = sorted(layer for share in shares for layer in share.layers)
                assert covered == list(range(layers)), (layers, experts, slots)
                assert all(share.slots >= 1 for share in shares), (layers, experts, slots)
                assert sum(share.slots for share in shares) <= slots, (layers, experts, slots)

    def test_same_question_has_the_same_answer(self) -> None:
        first: Allocation = self.make()
        second: Allocation = self.make()

        assert first.divide(5, 8, 13) == second.divide(5, 8, 13) == first.divide(5, 8, 13)


class SchedulerContract(_MemberContract):
    """Promises of a scheduler. See the module docstring."""

    registry = schedulers

    def _waiting(self, count: int) -> list[Waiting]:
        return [Waiting(number, 1 + (number * 7) % 5) for number in range(count)]

    def test_picks_distinct_positions_within_the_limit_and_at_least_one(self) -> None:
        for count in (1, 2, 9):
            for limit in (1, 2, 9, 20):
                member: Scheduler = self.make()
                waiting = self._waiting(count)

                picked = list(member.pick(waiting, limit))

                assert 1 <= len(picked) <= limit
                assert len(set(picked)) == len(picked)
                assert all(0 <= place < count for place in picked)
                assert waiting == self._waiting(count), "the queue belongs to the caller"

    def test_same_queue_gives_the_same_batches(self) -> None:
        assert self._batches() == self._batches()

    def test_everyone_gets_a_turn(self) -> None:
        served = [sequence for batch in self._batches() for sequence in batch]

        assert sorted(served) == list(range(9))

    def _regrouped(
        self, routes: Sequence[Route], groups: Sequence[Sequence[int]], limit: int
    ) -> list[list[int]]:
        """The answer of a fresh member; the batches as they are if it does not regroup."""
        member = regrouping_of(self.make())
        return [list(g) for g in groups] if member is None else ask(member, routes, groups, limit)

    def _units(self) -> Iterator[tuple[list[Route], list[list[int]], int]]:
        """Routes, batches and limits: full batches, some that have shrunk, tokens of which nothing is known."""
        dice = Dice(11)
        for batches, limit in ((1, 1), (1, 4), (2, 1), (2, 4), (3, 5), (4, 2)):
            for left_out in (0, limit * batches // 3):
                count = batches * limit - left_out
                routes = [dice.below(2**31) for _ in range(count)]
                if left_out:
                    routes[0] = routes[-1] = 0
                groups = [list(range(count))[batch::batches] for batch in range(batches)]
                yield routes, [group for group in groups if group], limit

    def test_regroups_every_sequence_into_exactly_one_batch(self) -> None:
        for routes, groups, limit in self._units():
            before = [list(group) for group in groups]

            found = self._regrouped(routes, groups, limit)

            assert sorted(place for group in found for place in group) == list(range(len(routes)))
            assert all(1 <= len(group) <= limit for group in found)
            assert len(found) <= len(groups)
            assert groups == before, "the batches belong to the caller"

    def test_regrouped_batches_are_equal_but_for_the_remainder_or_as_they_were(self) -> None:
        for routes, groups, limit in self._units():
            found = self._regrouped(routes, groups, limit)

            sizes = [len(group) for group in found]
            as_before = sorted(map(sorted, found)) == sorted(map(sorted, groups))
            assert as_before or max(sizes) - min(sizes) <= 1

    def test_same_routes_give_the_same_batches(self) -> None:
        for routes, groups, limit in self._units():
            assert self._regrouped(routes, groups, limit) == self._regrouped(routes, groups, limit)

    def _batches(self) -> list[list[int]]:
        member: Scheduler = self.make()
        waiting, batches = self._waiting(9), []
        while waiting:
            picked = set(member.pick(waiting, 2))
            batches.append([w.sequence for place, w in enumerate(waiting) if place in picked])
            waiting = [w for place, w in enumerate(waiting) if place not in picked]
        return batches


class MissesContract(_MemberContract):
    """Promises of an answer to misses. See the module docstring."""

    registry = misses

    def test_names_distinct_positions(self) -> None:
        for tokens in ([1], [1, 1, 1], [7, 1, 30], list(range(1, 20))):
            member: Misses = self.make()

            places = list(member.on_cpu(tokens))

            assert len(set(places)) == len(places)
            assert all(0 <= place < len(tokens) for place in places)

    def test_same_question_has_the_same_answer(self) -> None:
        member: Misses = self.make()

        assert list(member.on_cpu([3, 1, 2])) == list(member.on_cpu([3, 1, 2]))


class RoutingContract(_MemberContract):
    """Promises of a routing. See the module docstring."""

    registry = routings

    def said(self, seed: int, tokens: int, *, known: int | None = None) -> GateScores:
        """What a router of the tests' shape may say: scores with ties, of all experts or the `known` likeliest."""
        dice, top_k = Dice(seed), self.shape.top_k
        ids: list[list[int]] = []
        scores: list[list[float]] = []
        weights: list[list[float]] = []
        for _ in range(tokens):
            given = [dice.below(6) / 2 for _ in range(self.shape.num_experts)]
            order = sorted(range(len(given)), key=lambda expert: (-given[expert], expert))
            ids.append(order[:known])
            scores.append([given[expert] for expert in order[:known]])
            shares = [math.exp(score) for score in scores[-1][:top_k]]
            total = 1.0 + dice.below(3) / 2
            weights.append([total * share / sum(shares) for share in shares])
        return GateScores(ids, scores, weights, self.shape.num_experts)

    def asked(self) -> Iterator[tuple[GateScores, Routed]]:
        """Passes of several sizes, fully and partly known, and what becomes of them."""
        for seed in range(12):
            for tokens in (1, 2, 7):
                for known in (None, self.shape.top_k):
                    said = self.said(seed, tokens, known=known)
                    yield said, self.make().route(said)

    def test_every_token_gets_distinct_known_experts_and_no_more_than_it_had(self) -> None:
        for said, routed in self.asked():
            assert len(routed.ids) == len(routed.weights) == len(said)
            for token, ids in enumerate(routed.ids):
                assert len(set(ids)) == len(ids) <= len(said.weights[token])
                assert len(ids) == len(routed.weights[token])
                assert set(ids) <= set(said.ids[token])

    def test_a_token_keeps_its_likeliest_experts_among_those_in_use(self) -> None:
        for said, routed in self.asked():
            used = {expert for ids in routed.ids for expert in ids}
            for token, ids in enumerate(routed.ids):
                usable = [expert for expert in said.ids[token] if expert in used]
                assert list(ids) == usable[: len(ids)]

    def test_weights_are_positive_and_keep_their_sum(self) -> None:
        for said, routed in self.asked():
            for before, after in zip(said.weights, routed.weights, strict=True):
                assert all(weight > 0 for weight in after)
                assert not after or math.isclose(sum(before), sum(after), rel_tol=1e-9)

    def test_a_token_whose_experts_stay_is_left_as_it_was(self) -> None:
        for said, routed in self.asked():
            for token, ids in enumerate(routed.ids):
                if set(ids) == set(said.chosen(token)):
                    assert list(ids) == list(said.chosen(token))
                    assert list(routed.weights[token]) == list(said.weights[token])

    def test_a_lossless_one_changes_nothing(self) -> None:
        for said, routed in self.asked():
            if self.member.is_lossless:
                assert [list(ids) for ids in routed.ids] == [
                    list(said.chosen(token)) for token in range(len(said))
                ]

    def test_same_scores_give_the_same_routing_whatever_came_before(self) -> None:
        one: Routing = self.make()
        said = self.said(1, 5)
        first = one.route(said)
        one.route(self.said(2, 9))

        assert one.route(said) == first == self.make().route(said)

    def test_bears_a_pass_without_tokens(self) -> None:
        assert self.make().route(GateScores([], [], [], self.shape.num_experts)) == Routed([], [])

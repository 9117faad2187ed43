"""Contract suites for members of the four families, for pytest.

Subclass the suite of a family, name a registered member, and every promise the decision core relies on
is tested:

    from expertflow.simulator.policy.testing import CacheContract

    class TestMyCache(CacheContract):
        name = "my_cache"

Members that declare `popularity` or `future` in `needs` are given both. `CheckedDriver` is the driver
behind the suites: it carries a core's commands out on a pretended device and fails on the first that
a real one could not obey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...tracer.types import ExpertKey, ModelShape
from .base import NEEDS, Allocation, Cache, Demand, Load, Predictor, Scheduler, Signals, Waiting
from .future import Future
from .log import Entry
from .registry import Registry, allocations, caches, predictors, schedulers
from .replay import replay
from .residency import Residency
from .spec import Member, PolicySpec


def tiny_shape(num_layers: int = 3, num_experts: int = 8, top_k: int = 2) -> ModelShape:
    """A shape for tests: only its counts matter to the decision core."""
    return ModelShape(
        model_id="contract",
        revision=None,
        architecture="Contract",
        dtype="bfloat16",
        num_layers=num_layers,
        moe_layers=tuple(range(num_layers)),
        num_experts=num_experts,
        top_k=top_k,
        expert_bytes=1 << 20,
        non_expert_bytes=1 << 20,
        kv_bytes_per_token=1 << 10,
        hidden_size=64,
        vocab_size=1000,
    )


class Dice:
    """Reproducible numbers without a global generator (Knuth's MMIX constants)."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, limit: int) -> int:
        """A number from 0 to limit − 1."""
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self._state >> 33) % limit

    def some(self, items: Sequence[Any], count: int) -> list[Any]:
        """`count` different items in random order (all, if there are fewer)."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(min(count, len(left)))]


@dataclass(frozen=True, slots=True)
class ScriptedEvent:
    """One layer event of a script.

    `predicted` goes to `prefetch`, or the predictor is asked if it is None. Before the event, flying
    prefetches end: each number of `ends` picks one, in that order.
    """

    step: int
    layer: int
    experts: tuple[int, ...]
    predicted: tuple[ExpertKey, ...] | None = ()
    ends: tuple[int, ...] = ()
    signals: Signals = field(default_factory=lambda: Signals({}))

    @property
    def keys(self) -> tuple[ExpertKey, ...]:
        """The event's experts as keys."""
        return tuple(ExpertKey(self.layer, expert) for expert in self.experts)


def random_script(
    shape: ModelShape, seed: int, *, steps: int = 12, prefetches: bool = True
) -> list[ScriptedEvent]:
    """Events of all sizes, up to every expert of a layer, with random prefetches and endings."""
    dice = Dice(seed)
    everything = [
        ExpertKey(layer, expert)
        for layer in range(shape.num_moe_layers)
        for expert in range(shape.num_experts)
    ]
    script: list[ScriptedEvent] = []
    for step in range(steps):
        for layer in range(shape.num_moe_layers):
            count = 1 + dice.below(shape.num_experts if dice.below(4) == 0 else shape.top_k)
            experts = tuple(sorted(dice.some(range(shape.num_experts), count)))
            predicted = tuple(dice.some(everything, dice.below(5))) if prefetches else ()
            ends = tuple(dice.below(8) for _ in range(dice.below(4)))
            script.append(ScriptedEvent(step, layer, experts, predicted, ends))
    return script


class CheckedDriver:
    """Carries out a core's commands on a pretended device; fails on what a real one could not obey.

    `contents` is what each slot holds. A slot being filled by a prefetch holds nothing.
    """

    def __init__(self, core: Residency) -> None:
        self.core = core
        self.contents: dict[int, ExpertKey] = {}
        self.flying: dict[ExpertKey, int] = {}
        for load in core.warm():
            assert load.evicts is None, f"{load}: nothing can be evicted before the first step"
            assert load.slot not in self.contents, f"{load}: the slot was given twice"
            self.contents[load.slot] = load.key
        self._check_places()

    def run(self, script: Sequence[ScriptedEvent]) -> list[Demand]:
        """Drive a whole script; returns the core's answers."""
        return [self.event(event) for event in script]

    def event(self, event: ScriptedEvent) -> Demand:
        """Drive one event, in the order of the real drivers."""
        for number in event.ends:
            if self.flying:
                self._end(event.step, list(self.flying)[number % len(self.flying)])
        present, flying = set(self.contents.values()), set(self.flying)
        answer = self.core.demand(event.step, event.layer, event.experts)
        self._check_counts(answer, event, present, flying)
        for key in answer.cancels:
            assert key in self.flying, f"{key} was cancelled but is not on its way"
            del self.flying[key]
        seen: list[int] = []
        for number, wave in enumerate(answer.waves):
            members = {ExpertKey(event.layer, expert) for expert in wave.experts}
            for key in wave.late:
                self.contents[self.flying.pop(key)] = key
            for load in wave.loads:
                assert load.why == "demand", f"{load} is no demand load"
                self._take(load, members)
                self.contents[load.slot] = load.key
            if number == len(answer.waves) - 1:
                self._prefetch(event, members)
            self._check_wave(event.layer, wave.experts, wave.slots)
            seen += wave.experts
        assert sorted(seen) == list(event.experts), "an expert must run in exactly one wave"
        self.core.release(event.step, event.layer)
        self._drop_released(event)
        self._check_places()
        return answer

    def _end(self, step: int, key: ExpertKey) -> None:
        self.contents[self.flying.pop(key)] = key
        self.core.loaded(step, key)

    def _prefetch(self, event: ScriptedEvent, members: set[ExpertKey]) -> None:
        if event.predicted is None:
            loads = self.core.predict(event.step, event.layer, event.signals)
        else:
            loads = self.core.prefetch(event.step, event.predicted)
        for load in loads:
            assert load.why == "prefetch", f"{load} is no prefetch"
            self._take(load, members)
            self.flying[load.key] = load.slot

    def _take(self, load: Load, members: set[ExpertKey]) -> None:
        """Empty a slot for a load."""
        assert load.key not in self.contents.values(), f"{load}: it is resident already"
        assert load.key not in self.flying, f"{load}: it is on its way already"
        assert load.slot not in self.flying.values(), f"{load}: the slot is being filled"
        assert load.slot in self.core.pools[self._pool(load.key)].slots, f"{load}: a foreign slot"
        gone = self.contents.pop(load.slot, None)
        assert gone == load.evicts, f"{load}: the slot holds {gone}"
        assert gone not in members, f"{load}: evicts an expert of the running wave"

    def _check_counts(
        self,
        answer: Demand,
        event: ScriptedEvent,
        present: set[ExpertKey],
        flying: set[ExpertKey],
    ) -> None:
        hits, lates = len(present & set(event.keys)), len(flying & set(event.keys))
        found = (answer.hits, answer.lates, answer.misses)
        expected = (hits, lates, len(event.experts) - hits - lates)
        assert found == expected, f"(hits, lates, misses) are {found}, not {expected}"

    def _check_wave(self, layer: int, experts: Sequence[int], slots: Sequence[int]) -> None:
        assert len(set(slots)) == len(slots) == len(experts), "slots are shared in a wave"
        for expert, slot in zip(experts, slots, strict=True):
            held = self.contents.get(slot)
            assert held == ExpertKey(layer, expert), f"slot {slot} holds {held}, not {expert}"

    def _drop_released(self, event: ScriptedEvent) -> None:
        for slot, key in list(self.contents.items()):
            if self.core.slot_of(key) is None:
                assert key in event.keys, f"{key} was dropped by an event it has no part in"
                del self.contents[slot]

    def _check_places(self) -> None:
        """The core believes what is true, and no pool holds more than its slots."""
        for slot, key in self.contents.items():
            assert self.core.slot_of(key) == slot, f"{key} lives in {slot}"
        for key in self.flying:
            assert self.core.is_loading(key), f"{key} is on its way, and the core forgot"
            assert self.core.slot_of(key) is None, f"{key} is on its way but counts as resident"
        taken = [*self.contents, *self.flying.values()]
        assert len(set(taken)) == len(taken), "a slot is used twice"
        for pool in self.core.pools:
            used = sum(slot in pool.slots for slot in taken)
            assert used + len(pool.free) == len(pool.slots), "a slot was lost or invented"

    def _pool(self, key: ExpertKey) -> int:
        return next(n for n, pool in enumerate(self.core.pools) if key.layer in pool.layers)


def require_replay(
    spec: PolicySpec, shape: ModelShape, script: Sequence[ScriptedEvent]
) -> list[Entry]:
    """Drive `script` under `spec`, replay the decision log, and fail unless every row comes out again.

    Returns the log.
    """
    log: list[Entry] = []
    future = Future([event.keys for event in script]) if "future" in spec.needs() else None
    CheckedDriver(spec.build(shape, future=future, log=log)).run(script)
    report = replay(log, spec, shape)
    assert report.is_exact, report.first_difference
    return log


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
        """Parameters that go into policy.json; adds the popularity a member asks for."""
        params = dict(self.params)
        if "popularity" in self.member.needs and "popularity" not in params:
            rows, width = self.shape.num_moe_layers, self.shape.num_experts
            params["popularity"] = [
                [(expert * 5 + layer) % width for expert in range(width)] for layer in range(rows)
            ]
        return params

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
        residents: set[ExpertKey] = set()
        for event in script:
            future.advance()
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
        keys = [ExpertKey(0, expert) for expert in range(self.shape.num_experts)]
        for _ in range(2):
            for key in keys:
                cache.admit(key)
            gone: list[ExpertKey] = []
            while (key := cache.victim(())) is not None:
                cache.remove(key)
                gone.append(key)

            assert sorted(gone) == keys

    def test_releases_only_experts_of_the_event(self) -> None:
        cache: Cache = self.make()
        keys = [ExpertKey(0, expert) for expert in range(4)]
        for key in keys:
            cache.admit(key)

        assert set(cache.released(keys[:2])) <= set(keys[:2])

    def test_warms_with_distinct_experts_that_fit(self) -> None:
        keys = [ExpertKey(1, expert) for expert in range(self.shape.num_experts)]
        for slots in (1, 3, len(keys)):
            cache: Cache = self.make(Future([keys[:2], keys[2:5]]))

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
                    event.step, event.layer, event.experts, None, event.ends, Signals(groups)
                )
            )
        return script

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

    def _batches(self) -> list[list[int]]:
        member: Scheduler = self.make()
        waiting, batches = self._waiting(9), []
        while waiting:
            picked = set(member.pick(waiting, 2))
            batches.append([w.sequence for place, w in enumerate(waiting) if place in picked])
            waiting = [w for place, w in enumerate(waiting) if place not in picked]
        return batches

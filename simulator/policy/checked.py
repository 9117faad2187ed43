"""A driver that checks a decision core: it carries out commands on a pretended device.

The contract suites (testing.py) are built on it; tests of whole policies can use it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...tracer.types import ExpertKey, ModelShape
from .base import NO_FACTS, Demand, Facts, Load, Signals
from .clues import FEATURES
from .forest import FOREST_FORMAT
from .future import Future
from .log import Entry
from .replay import replay
from .residency import Residency
from .spec import PolicySpec
from .tables import packed


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


def tiny_lessons(shape: ModelShape) -> dict[str, Any]:
    """What members of a policy may ask to be taught, as `make_spec` takes it; round numbers for tests."""
    layers, experts = range(shape.num_moe_layers), shape.num_experts
    return {
        "popularity": [[(e * 5 + layer) % experts for e in range(experts)] for layer in layers],
        "curves": [[min(s, 2 + layer) * s for s in range(experts + 1)] for layer in layers],
        "cpu_times": {"copy_s": 2.0, "expert_s": 0.5, "token_s": 0.25},
        "layer_times": {"copy_s": 1.5, "layer_s": 1.0, "token_s": 0.25},
        "lessons": _tiny_tables(len(layers), experts),
    }


def _tiny_tables(layers: int, experts: int) -> dict[str, Any]:
    """Tables that predictors learn (policy.base.LESSONS): everything goes on to its neighbours."""

    def path(start: int) -> list[list[int]]:
        return [
            sorted({(start + layer) % experts, (start + 2 * layer + 1) % experts})
            for layer in range(layers)
        ]

    follows = packed([(e + 1) % experts, 600, (e + 3) % experts, 400] for e in range(experts))
    return {
        "transitions": [follows] * layers,
        "token_table": {str(token): packed(path(token + 1)) for token in range(-1, 20)},
        "activations": [
            packed([n for e in row for n in (e, 100 * (e + 1))] for row in path(start))
            for start in range(4)
        ],
        "maps": [packed(path(start)) for start in range(experts)],
        "forest": _tiny_forest(),
    }


def _tiny_forest() -> dict[str, Any]:
    """Two stumps: what few gates name is believed less, what the last token used a little more."""

    def stump(feature: str, low: float, high: float) -> dict[str, str]:
        return {
            "feature": f"{FEATURES.index(feature)} -1 -1",
            "threshold": "499 -2 -2",
            "left": "1 -1 -1",
            "right": "2 -1 -1",
            "value": f"0.0 {low} {high}",
        }

    trees = [stump("votes", 0.25, -0.25), stump("previous", -0.25, 0.125)]
    return {"format": FOREST_FORMAT, "features": list(FEATURES), "trees": trees}


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
    prefetches end: each number of `ends` picks one, in that order; then each of `losses` picks one that fails. `facts`
    are told with the demand.
    """

    step: int
    layer: int
    experts: tuple[int, ...]
    predicted: tuple[ExpertKey, ...] | None = ()
    ends: tuple[int, ...] = ()
    signals: Signals = field(default_factory=lambda: Signals({}))
    facts: Facts = NO_FACTS
    losses: tuple[int, ...] = ()

    @property
    def keys(self) -> tuple[ExpertKey, ...]:
        """The event's experts as keys."""
        return tuple(ExpertKey(self.layer, expert) for expert in self.experts)


def random_script(
    shape: ModelShape,
    seed: int,
    *,
    steps: int = 12,
    prefetches: bool = True,
    failures: bool = False,
) -> list[ScriptedEvent]:
    """Events of all sizes, up to every expert of a layer, with random prefetches, endings and failures.

    Odd seeds tell facts: tokens and gate weights by expert, and that the first two steps are prefill.
    """
    dice, luck, fate = Dice(seed), Dice(~seed), Dice(seed + 1)
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
            facts = _facts(luck, step, experts) if seed % 2 else NO_FACTS
            losses = tuple(fate.below(8) for _ in range(fate.below(3))) if failures else ()
            script.append(
                ScriptedEvent(step, layer, experts, predicted, ends, facts=facts, losses=losses)
            )
    return script


def _facts(dice: Dice, step: int, experts: Sequence[int]) -> Facts:
    tokens = tuple(1 + dice.below(9) for _ in experts)
    return Facts(step < 2, tokens, tuple(count * dice.below(100) / 100 for count in tokens))


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
        for number in event.losses:
            if self.flying:
                lost = list(self.flying)[number % len(self.flying)]
                del self.flying[lost]
                self.core.lost(event.step, lost)
        present, flying = set(self.contents.values()), set(self.flying)
        answer = self.core.demand(event.step, event.layer, event.experts, event.facts)
        self._check_counts(answer, event, present, flying)
        for key in answer.cancels:
            assert key in self.flying, f"{key} was cancelled but is not on its way"
            del self.flying[key]
        seen: list[int] = []
        for number, wave in enumerate(answer.waves):
            members = {ExpertKey(event.layer, expert) for expert in wave.experts}
            if not wave.waits:
                awaited = {*wave.late, *(load.key for load in wave.loads)}
                assert number < len(answer.waves) - 1, "nobody waits for what was asked for"
                assert not awaited & members, "a wave that does not wait runs what is not there"
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
        known = {key.expert for key in present | flying if key.layer == event.layer}
        assert not known & set(answer.on_cpu), "only misses are computed on the CPU"
        seen += answer.on_cpu
        assert sorted(seen) == list(event.experts), "an expert must run in exactly one place"
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
                assert key in event.keys or self.core.pools[self._pool(key)].staging, (
                    f"{key} was dropped by an event it has no part in"
                )
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

"""Who lives where: the decision core that simulator and runtime both drive.

Residency receives events (experts demanded, predictions made, load finished, experts released) and
answers with commands (load this expert into that slot, evicting that one; cancel). It never moves a byte
and never reads a clock. One event is all the distinct experts a layer needs in one step: they are
demanded together, and none may evict another. An event larger than its pool runs in waves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...tracer.types import ExpertKey
from .base import (
    NO_FACTS,
    NO_SIGNALS,
    Cache,
    Demand,
    Facts,
    Load,
    Misses,
    Outcome,
    Predictor,
    Signals,
    Wave,
)
from .future import Future
from .log import Entry


@dataclass(slots=True)
class Pool:
    """A set of slots shared by some layers, and the cache that orders their residents.

    The last `staging` slots hold experts of a running event only; bounds have such slots, nobody else.
    """

    layers: tuple[int, ...]
    slots: range
    cache: Cache
    staging: int = 0
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.free = list(reversed(self.slots))

    @property
    def size(self) -> int:
        """Slots that experts may keep."""
        return len(self.slots) - self.staging


class Residency:
    """The decision core. `pools` must cover every layer once.

    Driving it: `warm` once; then per event deliver finished prefetches (`loaded`), call `demand`, carry
    out its cancels and waves in order, call `predict` once the last wave's loads are asked for, and
    `release` when the event has been computed.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        predictor: Predictor,
        misses: Misses,
        *,
        num_experts: int,
        future: Future | None = None,
        log: list[Entry] | None = None,
    ) -> None:
        self.pools = pools
        self.log = log
        self._predictor = predictor
        self._hear: Callable[[int, Outcome], None] | None = getattr(predictor, "hear", None)
        self._fetched: list[ExpertKey] = []
        self._misses = misses
        self._residents_first = bool(getattr(misses, "residents_first", False))
        self._num_experts = num_experts
        self._future = future
        self._reads_weights = any("gate_weights" in pool.cache.needs for pool in pools)
        self._pool_of = {layer: pool for pool in pools for layer in pool.layers}
        self._resident: dict[ExpertKey, int] = {}
        self._loading: dict[ExpertKey, int] = {}
        self._pinned: frozenset[ExpertKey] = frozenset()
        self._event: tuple[ExpertKey, ...] = ()

    @property
    def num_slots(self) -> int:
        """Slots over all pools."""
        return sum(pool.size for pool in self.pools)

    @property
    def num_resident(self) -> int:
        """Experts that are in a slot."""
        return len(self._resident)

    def pool_slots(self, layer: int) -> int:
        """Slots of the pool a layer uses."""
        return self._pool_of[layer].size

    def slot_of(self, key: ExpertKey) -> int | None:
        """The slot of a resident expert."""
        return self._resident.get(key)

    def is_loading(self, key: ExpertKey) -> bool:
        """Whether a prefetch of this expert is on its way."""
        return key in self._loading

    def warm(self) -> list[Load]:
        """Loads to carry out before the first step."""
        loads: list[Load] = []
        for pool in self.pools:
            keys = [ExpertKey(la, e) for la in pool.layers for e in range(self._num_experts)]
            for key in pool.cache.warm(keys, pool.size):
                load = Load(key, pool.free.pop(), None, "warm")
                self._settle(pool, key, load.slot)
                loads.append(load)
                self._log_load(-1, load)
        return loads

    def demand(
        self, step: int, layer: int, experts: Sequence[int], facts: Facts = NO_FACTS
    ) -> Demand:
        """Answer one event: `experts` are the distinct ids the layer needs, in ascending order."""
        if self._future is not None:
            self._future.advance()
        if facts.weights and not self._reads_weights:
            # Simulator and runtime know them to different precision, and log them only where they decide.
            facts = Facts(facts.is_prefill, facts.tokens)
        pool = self._pool_of[layer]
        keys = tuple(ExpertKey(layer, expert) for expert in experts)
        self._event, self._pinned = keys, frozenset(keys)
        if keys:  # an event without experts leaves no rows in the log, so it must change nothing
            pool.cache.begin(keys, facts)
        hits = [key for key in keys if key in self._resident]
        late = [key for key in keys if key in self._loading]
        misses = [key for key in keys if key not in self._resident and key not in self._loading]
        for key in hits:
            pool.cache.touch(key)
        for key in late:
            self._settle(pool, key, self._loading.pop(key))
        rows = None if self.log is None else _EventRows(self.log, step, keys, facts)
        on_cpu = self._compute_on_cpu(keys, misses, facts, rows)
        to_load = [key for key in misses if key.expert not in on_cpu] if on_cpu else misses
        waves, cancels = self._waves(step, pool, hits, late, to_load, rows)
        if self._hear is not None:
            told = Outcome(tuple(hits), tuple(late), tuple(misses), tuple(self._fetched))
            self._fetched.clear()
            self._hear(layer, told)
        return Demand(
            tuple(waves), tuple(cancels), len(hits), len(late), len(misses), tuple(on_cpu)
        )

    def predict(self, step: int, layer: int, signals: Signals = NO_SIGNALS) -> list[Load]:
        """Ask the predictor what comes next; answer with the prefetches worth asking for."""
        return self.prefetch(step, self._predictor.predict(layer, signals))

    def prefetch(self, step: int, keys: Sequence[ExpertKey]) -> list[Load]:
        """Load predicted experts where slots can be had without hurting this event or what is needed sooner.

        A pool holds no more than its size: what is predicted beyond that is left for later, and may be evicted for
        what comes before it.
        """
        wanted = [key for key in keys if key.layer in self._pool_of]
        if self.log is not None:
            self.log.extend(Entry("predict", step, *key) for key in wanted)
        fitting = self._fitting(wanted)
        protected = self._pinned.union(fitting)
        loads: list[Load] = []
        for key in fitting:
            if key in self._resident or key in self._loading:
                continue
            pool = self._pool_of[key.layer]
            has_room = len(pool.free) > pool.staging
            evicts = None if has_room else pool.cache.victim(protected)
            if not has_room and evicts is None:
                continue
            slot = pool.free.pop() if evicts is None else self._evict(pool, evicts)
            self._loading[key] = slot
            load = Load(key, slot, evicts, "prefetch")
            loads.append(load)
            self._log_load(step, load)
        if self._hear is not None:
            self._fetched += [load.key for load in loads]
        return loads

    def _fitting(self, wanted: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Tell the caches what is wanted; returns what their pools have room for beside the running event."""
        by_pool: dict[int, list[ExpertKey]] = {}
        for key in wanted:
            by_pool.setdefault(self._pool_of[key.layer].slots.start, []).append(key)
        room: dict[int, int] = {}
        for start, keys in by_pool.items():
            pool = self._pool_of[keys[0].layer]
            pool.cache.expect(keys)
            is_running = bool(self._event) and self._event[0].layer in pool.layers
            taken = len(self._event) if is_running else 0
            room[start] = min(pool.size, len(pool.slots) - taken)
        seen = set(self._pinned)
        fitting: list[ExpertKey] = []
        for key in wanted:
            start = self._pool_of[key.layer].slots.start
            if key not in seen:
                if room[start] <= 0:
                    continue
                room[start] -= 1
                seen.add(key)
            fitting.append(key)
        return fitting

    def loaded(self, step: int, key: ExpertKey) -> None:
        """A prefetch has ended. Ignored if it was cancelled or demanded meanwhile."""
        slot = self._loading.pop(key, None)
        if slot is None:
            return
        self._settle(self._pool_of[key.layer], key, slot)
        if self.log is not None:
            self.log.append(Entry("loaded", step, *key))

    def lost(self, step: int, key: ExpertKey) -> None:
        """A load has failed: its slot is free again. Ignored if it was cancelled or evicted meanwhile."""
        pool = self._pool_of[key.layer]
        slot = self._loading.pop(key, None)
        if slot is None:
            if key not in self._resident:
                return
            slot = self._evict(pool, key)
        pool.free.append(slot)
        if self.log is not None:
            self.log.append(Entry("lost", step, *key))

    def release(self, step: int, layer: int) -> None:
        """The event has been computed; its experts may be evicted."""
        pool = self._pool_of[layer]
        if self.log is not None:
            self.log.append(Entry("release", step, layer, -1))
        for key in pool.cache.released(self._event):
            if key in self._resident:
                pool.free.append(self._evict(pool, key))
        while len(pool.free) < pool.staging:
            # Staging is for running events only: what ran there stays if it is worth more than another.
            gone = pool.cache.victim(())
            if gone is None:
                break
            pool.free.append(self._evict(pool, gone))
        self._pinned, self._event = frozenset(), ()

    def _compute_on_cpu(
        self,
        keys: Sequence[ExpertKey],
        misses: Sequence[ExpertKey],
        facts: Facts,
        rows: _EventRows | None,
    ) -> list[int]:
        if not misses:
            return []
        tokens = dict(zip(keys, facts.tokens, strict=True)) if facts.tokens else {}
        places = self._misses.on_cpu([tokens.get(key, 1) for key in misses])
        chosen = sorted(misses[place] for place in places)
        if rows is not None:
            rows.add(-1, chosen, [-1] * len(chosen), "cpu")
        return [key.expert for key in chosen]

    def _waves(
        self,
        step: int,
        pool: Pool,
        hits: list[ExpertKey],
        late: list[ExpertKey],
        misses: list[ExpertKey],
        rows: _EventRows | None,
    ) -> tuple[list[Wave], list[ExpertKey]]:
        capacity = len(pool.slots)
        cancels: list[ExpertKey] = []
        waves: list[Wave] = []
        present = [*hits, *late]
        todo = misses
        if rows is not None:
            rows.outcomes = dict.fromkeys(hits, "hit") | dict.fromkeys(late, "late")
        while present or todo or not waves:
            room = capacity - len(present)
            fetched, todo = todo[:room], todo[room:]
            members = sorted([*present, *fetched])
            protected = frozenset(members)
            loads = [self._load(step, pool, key, protected, cancels) for key in fetched]
            awaited = sorted([*late, *fetched])
            if self._residents_first and awaited and len(awaited) < len(members):
                # Only the first round holds residents.
                divided = (hits, awaited)
                waves += (self._wave(hits, loads, late, waits=False), self._wave(awaited))
            else:
                divided = (members,)
                waves.append(self._wave(members, loads, late))
            if rows is not None:
                first = len(waves) - len(divided)
                for number, part in enumerate(divided, start=first):
                    rows.add(number, part, waves[number].slots)
            for load in loads:
                self._log_load(step, load)
            present, late = [], []
        return waves, cancels

    def _wave(
        self,
        members: Sequence[ExpertKey],
        loads: Sequence[Load] = (),
        late: Sequence[ExpertKey] = (),
        *,
        waits: bool = True,
    ) -> Wave:
        slots = tuple(self._resident[key] for key in members)
        return Wave(tuple(k.expert for k in members), slots, tuple(loads), tuple(late), waits)

    def _load(
        self,
        step: int,
        pool: Pool,
        key: ExpertKey,
        protected: frozenset[ExpertKey],
        cancels: list[ExpertKey],
    ) -> Load:
        evicts: ExpertKey | None = None
        if pool.free:
            slot = pool.free.pop()
        else:
            evicts = pool.cache.victim(protected)
            slot = (
                self._cancel(step, pool, cancels) if evicts is None else self._evict(pool, evicts)
            )
        self._settle(pool, key, slot)
        return Load(key, slot, evicts, "demand")

    def _cancel(self, step: int, pool: Pool, cancels: list[ExpertKey]) -> int:
        # Every slot outside the event is being filled by a prefetch: give up the last one asked for.
        key = next(k for k in reversed(self._loading) if self._pool_of[k.layer] is pool)
        cancels.append(key)
        if self.log is not None:
            self.log.append(Entry("cancel", step, *key))
        return self._loading.pop(key)

    def _settle(self, pool: Pool, key: ExpertKey, slot: int) -> None:
        self._resident[key] = slot
        pool.cache.admit(key)

    def _evict(self, pool: Pool, key: ExpertKey) -> int:
        pool.cache.remove(key)
        return self._resident.pop(key)

    def _log_load(self, step: int, load: Load) -> None:
        if self.log is None:
            return
        gone = load.evicts or (-1, -1)
        self.log.append(Entry("load", step, *load.key, load.slot, *gone, detail=load.why))


class _EventRows:
    """Writes one event's rows with its facts, so that the log alone can be replayed. Of no outcome is a miss."""

    __slots__ = ("_facts", "_is_prefill", "_log", "_step", "outcomes")

    def __init__(
        self, log: list[Entry], step: int, keys: Sequence[ExpertKey], facts: Facts
    ) -> None:
        self._log, self._step = log, step
        self._is_prefill = facts.is_prefill
        tokens = facts.tokens or (1,) * len(keys)
        weights = facts.weights or (-1.0,) * len(keys)
        self._facts = dict(zip(keys, zip(tokens, weights, strict=True), strict=True))
        self.outcomes: Mapping[ExpertKey, str] = {}

    def add(
        self,
        wave: int,
        members: Sequence[ExpertKey],
        slots: Sequence[int],
        outcome: str | None = None,
    ) -> None:
        """Experts of one wave and their slots; `outcome` if it is one for all."""
        for key, slot in zip(members, slots, strict=True):
            tokens, weight = self._facts[key]
            detail = outcome or self.outcomes.get(key, "miss")
            self._log.append(
                Entry(
                    "event",
                    self._step,
                    key.layer,
                    key.expert,
                    slot,
                    -1,
                    -1,
                    wave,
                    detail,
                    tokens,
                    weight,
                    self._is_prefill,
                )
            )

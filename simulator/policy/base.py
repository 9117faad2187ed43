"""What a policy is made of: six families of small objects, and the words they exchange.

Members order things; they never move bytes, read a clock or draw random numbers. `Residency` owns slots and pins and
asks them. A member's `needs` names what must be there before it can run: `lookahead` (gates applied early), `routing`
(what single tokens chose, which the core does not look at), `popularity` (counts from a trace), `curves` (hits by
layer and slots, from a trace), `gate_weights` (the router's weights of the chosen experts), `paths` (experts of later
layers named by a path predictor before the first layer ran), `cpu_times` (measured or declared seconds of a copy and
of an expert on the CPU), `layer_times` (measured or declared seconds of a copy and of one layer's computation), the
tables of LESSONS, `future` (the events to come; such a member is a bound, refused by
the runtime).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Protocol

from ...tracer.types import ExpertKey, Why

LESSONS = ("transitions", "token_table", "activations", "maps", "forest")
"""Tables that predictors learn from a trace (simulator.lessons); JSON, kept in policy.json."""
NEEDS = (
    "lookahead",
    "routing",
    "popularity",
    "curves",
    "gate_weights",
    "cpu_times",
    "layer_times",
    *LESSONS,
    "paths",
    "future",
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an event beyond its experts; `tokens` and `weights` are by expert, ascending ids.

    `tokens` counts the tokens that chose an expert (empty: one each), `weights` sums their gate weights (empty:
    not known). `is_prefill` tells a pass over prompts.
    """

    is_prefill: bool = False
    tokens: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


NO_FACTS = Facts()


class Cache(Protocol):
    """Orders the experts resident in one pool of slots. O(log n) per call unless its docstring says more.

    A cache is told its `size` first, then sees `begin` when a layer is asked for, `admit` when an expert becomes
    resident, `touch` when a resident one is demanded, `remove` when one is evicted, `released` when the event
    is over, `expect` when something is predicted, and says who should go. `needs` as in the module docstring. Derive
    from BaseCache.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    is_lossless: ClassVar[bool]

    def size(self, slots: int) -> None:
        """The pool has so many slots. Called once, before anything else."""
        ...

    def staging(self, largest_event: int) -> int:
        """Slots beyond the pool's that only a running event may use. More than 0 for bounds only."""
        ...

    def begin(self, keys: Sequence[ExpertKey], facts: Facts) -> None:
        """An event asks for `keys`: one or more of one layer, ascending, nothing touched or admitted for it yet."""
        ...

    def admit(self, key: ExpertKey) -> None:
        """An expert became resident."""
        ...

    def touch(self, key: ExpertKey) -> None:
        """A resident expert was demanded."""
        ...

    def remove(self, key: ExpertKey) -> None:
        """An expert was evicted."""
        ...

    def victim(self, protected: Container[ExpertKey]) -> ExpertKey | None:
        """The resident expert to evict first, outside `protected`; None if there is none."""
        ...

    def released(self, keys: Sequence[ExpertKey]) -> Iterable[ExpertKey]:
        """Residents to drop now that the event that used `keys` is over."""
        ...

    def expect(self, keys: Sequence[ExpertKey]) -> None:
        """What the predictor has just said of this pool's layers, in order of need, before any of it is loaded.

        Not called where it said nothing.
        """
        ...

    def warm(self, keys: Iterable[ExpertKey], slots: int) -> Sequence[ExpertKey]:
        """Experts to load before the first step, best first; empty for caches that learn."""
        ...


class BaseCache:
    """The methods most caches leave as they are."""

    slots: int = 0

    def size(self, slots: int) -> None:
        """Remember the number of slots."""
        self.slots = slots

    def staging(self, largest_event: int) -> int:
        """No slots beyond the pool's."""
        return 0

    def begin(self, keys: Sequence[ExpertKey], facts: Facts) -> None:
        """Nothing to learn from an event as a whole."""

    def touch(self, key: ExpertKey) -> None:
        """A demand changes nothing."""

    def released(self, keys: Sequence[ExpertKey]) -> Iterable[ExpertKey]:
        """Keep everything."""
        return ()

    def expect(self, keys: Sequence[ExpertKey]) -> None:
        """A prediction changes nothing."""

    def warm(self, keys: Iterable[ExpertKey], slots: int) -> Sequence[ExpertKey]:
        """Start empty."""
        return ()


NO_PATH: Mapping[int, Sequence[Sequence[int]]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known at one layer when it has been routed.

    `lookahead[d]` holds the experts that the gate of layer + d picked from this layer's hidden state,
    one group of top-k per token. `routed` are the experts each token chose at this layer, one group per
    token, `sequences` the sequence each of these tokens belongs to, and `tokens` their ids (-1: not recorded); empty
    where nobody asked for them. `path[d]` holds the experts that a path predictor named for layer + d of this pass, one
    group per token that it knows, likeliest first.
    """

    lookahead: Mapping[int, Sequence[Sequence[int]]]
    routed: Sequence[Sequence[int]] = ()
    sequences: Sequence[int] = ()
    tokens: Sequence[int] = ()
    path: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=lambda: NO_PATH)


NO_SIGNALS = Signals({})


class Predictor(Protocol):
    """Says which experts will be demanded soon, likeliest and soonest first."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    is_lossless: ClassVar[bool]

    def predict(self, layer: int, signals: Signals) -> Sequence[ExpertKey]:
        """Experts worth fetching now that `layer` has been asked for, in order of need."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an event was answered: its experts by what they were, ascending.

    `fetched` are the prefetches asked for since the event before, by the predictor that is told of them.
    """

    hits: tuple[ExpertKey, ...]
    lates: tuple[ExpertKey, ...]
    misses: tuple[ExpertKey, ...]
    fetched: tuple[ExpertKey, ...]


class Listener(Protocol):
    """A predictor that is told how its words turned out. It cannot be taped, so it runs on the reference engine."""

    def hear(self, layer: int, outcome: Outcome) -> None:
        """An event of `layer` has been answered; `predict` is asked next."""
        ...


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sequence that has not started."""

    sequence: int
    prompt_tokens: int


Route = int
"""The experts that one token takes in all layers: bit layer × num_experts + expert is set. 0: nothing is known."""


class Scheduler(Protocol):
    """Picks which waiting sequences run together. One that also regroups them is a Regrouping."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    is_lossless: ClassVar[bool]

    def pick(self, waiting: Sequence[Waiting], limit: int) -> Sequence[int]:
        """Positions in `waiting` of the next batch, at most `limit`, at least one."""
        ...


class Regrouping(Scheduler, Protocol):
    """A scheduler that moves sequences between batches while they are decoded.

    Of the recorded (or given) batches, `batches` adjacent ones are a unit: their prompts are read one batch after the
    other, then they are decoded in turns. Before every `every`-th decode step of the unit, the first included,
    `regroup` is asked; never, if it is 0. With `batches` 1, as in members that can only pick, batches run one after
    another.

    What it is told of a sequence is the route of the token that is fed next, where `needs` has `future`; what a path
    predictor says of that token, where it has `paths`; else the route of the token before it.
    """

    batches: int
    every: int

    def regroup(
        self, routes: Sequence[Route], groups: Sequence[Sequence[int]], limit: int
    ) -> Sequence[Sequence[int]]:
        """The batches to come: positions in `routes`, each in one batch, at most `limit` in a batch.

        `groups` are the batches as they are; there may be fewer, never more.
        """
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """A pool to be: the layers that use it and its number of slots."""

    layers: tuple[int, ...]
    slots: int


class Allocation(Protocol):
    """Divides slots over layers. The shares cover every layer once and never exceed `slots`."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    is_lossless: ClassVar[bool]

    def divide(self, num_layers: int, num_experts: int, slots: int) -> list[Share]:
        """Pools for `slots` slots."""
        ...


class Misses(Protocol):
    """Says what is done about experts that are not resident when demanded.

    Two attributes may be left out, which is to say false: `loads_all` (it never names a position: the runtime keeps no
    thread for the CPU) and `residents_first` (what is resident is computed while the rest of the event is loaded).
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    is_lossless: ClassVar[bool]

    def on_cpu(self, tokens: Sequence[int]) -> Sequence[int]:
        """Positions, in the list of missing experts, of those to compute on the CPU; the rest is loaded.

        `tokens[i]` counts the tokens that chose missing expert i.
        """
        ...


@dataclass(frozen=True, slots=True)
class GateScores:
    """What one layer's router said of the tokens of one pass, one entry per token.

    `ids` are experts, likeliest first: those the router chose, ties by id, then others, as many as are known. `scores`,
    aligned, are natural logs of what it gives each, up to a constant per token: its weights are in proportion to
    exp(score). `weights` are the router's own, for the experts it chose.
    """

    ids: Sequence[Sequence[int]]
    scores: Sequence[Sequence[float]]
    weights: Sequence[Sequence[float]]
    num_experts: int

    def __len__(self) -> int:
        return len(self.ids)

    def chosen(self, token: int) -> Sequence[int]:
        """The experts the router chose for a token, likeliest first."""
        return self.ids[token][: len(self.weights[token])]


@dataclass(frozen=True, slots=True)
class Routed:
    """Which experts compute each token, likeliest first, and their weights."""

    ids: Sequence[Sequence[int]]
    weights: Sequence[Sequence[float]]


class Routing(Protocol):
    """Says which experts compute the tokens of a pass. A pure function: nothing is remembered between calls.

    A token gets distinct experts, no more than its router gave it, with weights of the same sum. Not lossless unless
    that is always the router's own choice.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    is_lossless: ClassVar[bool]

    def route(self, said: GateScores) -> Routed:
        """Experts and weights of every token of one layer in one pass."""
        ...


class FutureView(Protocol):
    """The events to come, for members that are bounds."""

    def next_use(self, key: ExpertKey) -> int:
        """Number of the next event after the current one that demands `key`; large if none."""
        ...

    def upcoming(self, count: int) -> Sequence[Sequence[ExpertKey]]:
        """The next `count` events after the current one."""
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """Bring `key` into `slot`, in place of `evicts` if the slot was taken."""

    key: ExpertKey
    slot: int
    evicts: ExpertKey | None
    why: Why


@dataclass(frozen=True, slots=True)
class Wave:
    """Experts of one event that run together, and what must have arrived before they do.

    `slots` are aligned with `experts`. `late` are prefetches of these experts still on their way. Where `waits` is
    false the wave runs what is there already: its loads and late ones are asked for at its start, but it is the next
    wave that needs them and waits for them.
    """

    experts: tuple[int, ...]
    slots: tuple[int, ...]
    loads: tuple[Load, ...]
    late: tuple[ExpertKey, ...]
    waits: bool = True


@dataclass(frozen=True, slots=True)
class Demand:
    """The answer to one event: cancels first, then waves in order, `on_cpu` beside them.

    There is at least one wave, if an empty one. `on_cpu` are experts computed where they are, in host memory.
    Rates of an event are counted over its distinct experts: hits + lates + misses, those on the CPU included.
    """

    waves: tuple[Wave, ...]
    cancels: tuple[ExpertKey, ...]
    hits: int
    lates: int
    misses: int
    on_cpu: tuple[int, ...] = ()

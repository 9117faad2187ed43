"""The statistics of a trace as plain records. Shares lie between 0 and 1; None: not to be had from this trace."""

from __future__ import annotations

from dataclasses import dataclass

from ..types import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStats:
    """Demand of one MoE layer, both phases, padding left out.

    `top_share` is what the most popular tenth of its experts takes, `gini` the Gini coefficient of demand over
    its experts (0: all alike), `entropy` the entropy of demand over that of even demand.
    """

    layer: int
    top_share: float
    gini: float
    entropy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStats:
    """Prefill or decode alone.

    `mean_distinct` counts experts per layer event, padding included, as the link sees it. `reuse`
    is the share of a token's experts that the token before it in the same sequence had too, in
    the same layer; None if no two such tokens were recorded.
    """

    phase: Phase
    steps: int
    tokens: int
    mean_distinct: float
    reuse: float | None
    reuse_by_layer: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioStats:
    """One share of experts resident, the same number of slots in every layer.

    `ratio` is r: mean distinct experts per event over slots. `lru_hits` is the hit rate of an event-atomic LRU
    per layer without prefetch, over the distinct experts of events; None if an event does not fit the slots.
    """

    share: float
    slots_per_layer: int
    ratio: float
    lru_hits: float | None
    reading: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainDistance:
    """Total variation between the popularity of experts in two domains, mean over layers."""

    first: str
    second: str
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionStats:
    """How well the experts of one layer tell those of the next, for the same token.

    `accuracy` is the share of the next layer's experts among the top-k that a table of transitions names, `popular`
    the share among its top-k most popular ones. Both learn on one half of the sequences and are judged on the other.
    """

    accuracy: float
    popular: float
    even: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LookaheadStats:
    """The share of a layer's experts that the recorded look-ahead, `depth` layers earlier, had named."""

    depth: int
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Coactivation:
    """Two experts of a layer that tokens choose together `lift` times as often as by their popularity alone.

    `share` is the share of tokens that choose both.
    """

    layer: int
    first: int
    second: int
    lift: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentStats:
    """Segment routing best performance (arXiv 2505.16056) at one segment length.

    `srp` is the best F1 that any one number of experts, fixed over a segment of `tokens` tokens, reaches against
    what its tokens choose. `experts` is the mean size of that set.
    """

    tokens: int
    srp: float
    experts: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCoverage:
    """Segment cache best hit rate (arXiv 2505.16056): slots per layer as a multiple of top-k, and the hit rate.

    The cache knows what the segment that begins now demands; filling empty slots counts as hits, as there.
    """

    multiple: int
    slots_per_layer: int
    hits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStats:
    """Distinct experts per layer event if `sequences` of the trace decoded together.

    Sequences are merged at the same decode index (at the same position if only prefill was recorded), in recorded
    order. `even` is E(1 - (1 - k/E)^n); `by_popularity` the same for draws by each expert's popularity.
    """

    sequences: int
    distinct: float
    even: float
    by_popularity: float
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixStats:
    """What prompts repeat of earlier prompts.

    `shared` is the share of prompt tokens that belong to a prefix, of `MIN_PREFIX_TOKENS` or more, of an earlier
    prompt; None if token ids were not recorded. `repeated_prompts` are those with the text of an earlier one.
    """

    prompts: int
    repeated_prompts: int
    shared: float | None
    longest_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PaceStats:
    """Seconds of one layer's computation in decode beside those of its copies.

    `copy_s` loads one expert on the idle link. `needed_hits` is the hit rate from which copies take no longer than
    computation: below it the link sets the pace, however well they overlap. `origin` says where the times come from.
    """

    layer_s: float
    copy_s: float
    distinct: float
    needed_hits: float
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One figure in plain words: what it says in advance about caching, prefetch, batching, placement or the trace."""

    about: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingStats:
    """What `info` shows of the routing. Shares and distances lie between 0 and 1.

    `top_share`, `gini` and `entropy` are means over `layers`, `top_share_even` what the first would be if all
    experts were equally popular. `reuse_chance` is `reuse` under independent, even routing, `reuse_popular` under
    independent routing with the popularity seen. `reuse_distance` is the median number of events of a layer from one
    use of an expert to the next (1: the next event), `stack_distances` quartiles and ninth decile of the slots an
    LRU needs to hit (25, 50, 75, 90 %, of uses that are not the first). `within_domain` is the distance between two
    halves of one domain: what sampling alone gives. `sampled_tokens` tells how many tokens the figures beyond
    popularity rest on.
    """

    tokens: int
    sampled_tokens: int
    top_share: float
    top_share_even: float
    gini: float
    entropy: float
    layers: tuple[LayerStats, ...]
    reuse_chance: float
    reuse_popular: float
    prefill: PhaseStats
    decode: PhaseStats
    reuse_distance: float | None
    stack_distances: tuple[float, ...]
    domains: tuple[DomainDistance, ...]
    within_domain: float | None
    ratios: tuple[RatioStats, ...]
    transitions: TransitionStats | None
    lookahead: tuple[LookaheadStats, ...]
    coactive: tuple[Coactivation, ...]
    segments: tuple[SegmentStats, ...]
    coverage: tuple[CacheCoverage, ...]
    batches: tuple[BatchStats, ...]
    prefixes: PrefixStats | None
    pace: PaceStats | None
    findings: tuple[Finding, ...]

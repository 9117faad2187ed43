"""The figures in plain words: what they say in advance about whether offloading, caching, prefetch or batching pays.

A forecast of speed is what `simulate` and `tune` are for; these sentences tell where to look. Thresholds without a
paper beside them are this toolkit's own rules of thumb and say so.
"""

from __future__ import annotations

from collections.abc import Iterator

from .records import Finding, RoutingStats

TIGHT_RATIO = 0.8
"""From this r on, nearly all slots turn over in every event and few hits are left (own rule; arXiv 2608.07911 finds
that no eviction policy matters from r near 1 on)."""
MATTERING_POINTS = 0.05
"""Differences of rates below this are called none (own rule: about the spread between two samples of prompts)."""
SKEWED = 1.5
"""A top tenth that takes this many times its even share makes a static placement worth a look (own rule)."""
NEAR_OPTIMAL_MULTIPLE = 2
"""Slots per top-k at which caches reach 90.55 % of the clairvoyant result on average (arXiv 2505.16056)."""
LOCAL = 0.8
"""Segment cache hits that count as locally consistent (own rule)."""
SURE_GUESS = 0.8
"""Below this share of right guesses, one prefetch in five or more is a wasted copy (own rule)."""
DOMAINS_DIFFER = 2.0
"""Domains this many times farther apart than two halves of one domain have experts of their own (own rule)."""
TEMPLATED = 0.1
"""From this share of repeated prompt tokens on, locality is partly the template's (own rule; arXiv 2608.07911 saw
templated prompts move results by 19 to 32 points)."""
SPOKEN_BATCH = 8
"""The batch size that the sentence on batching is about, or the largest the trace has."""
EARLY_SATURATION = 0.8
"""Distinct experts over those of independent draws below which sequences share experts (own rule)."""


def ratio_reading(share: float, slots: int, distinct: float, ratio: float) -> str:
    """What r says at one share of experts resident."""
    if ratio > 1:
        verdict = "so one event overflows the slots and a cache cannot hit by recency"
    elif ratio >= TIGHT_RATIO:
        verdict = "so nearly every slot turns over per event and hits will be few"
    else:
        verdict = "so a cache can hit"
    return (
        f"at {share:.0%} of experts resident ({slots} slots per layer) an event needs "
        f"{distinct:.1f} experts: r = {ratio:.2f}, {verdict}"
    )


def findings_of(stats: RoutingStats, experts: int, top_k: int) -> tuple[Finding, ...]:
    """Say what the figures mean, one sentence or two for each question they can answer."""
    if not stats.tokens:
        return ()
    topics = {
        "caching": (*_caching(stats), *_recency(stats), *_size(stats, experts)),
        "prefetch": tuple(_prefetch(stats)),
        "batching": tuple(_batching(stats, top_k)),
        "placement": (*_static(stats), *_domains(stats)),
        "link": tuple(_link(stats)),
        "prompts": tuple(_prompts(stats)),
    }
    return tuple(
        Finding(about=about, text=text) for about, texts in topics.items() for text in texts
    )


def _caching(stats: RoutingStats) -> Iterator[str]:
    half = next((ratio for ratio in stats.ratios if ratio.share == 0.5), None)
    if half is None:
        return
    if half.lru_hits is None:
        yield (
            f"With half the experts resident some events overflow the {half.slots_per_layer} slots of a layer "
            f"(r = {half.ratio:.2f}); look at smaller batches before other policies."
        )
    else:
        gain = half.lru_hits - half.share
        if gain < MATTERING_POINTS:
            word = "no more than the share itself, so recency is worth nothing"
        else:
            word = f"{gain * 100:.0f} points above the share itself, so caching can pay"
        yield f"With half the experts resident LRU alone would hit {half.lru_hits:.0%}: {word}."


def _recency(stats: RoutingStats) -> Iterator[str]:
    phase = stats.decode if stats.decode.reuse is not None else stats.prefill
    if phase.reuse is None:
        return
    gain = phase.reuse - stats.reuse_popular
    has = "" if gain >= MATTERING_POINTS else "hardly "
    better = (
        "recency helps beyond popularity" if not has else "frequency is as good a guide as recency"
    )
    yield (
        f"Neighbouring tokens share {phase.reuse:.0%} of their experts against {stats.reuse_popular:.0%} by "
        f"popularity alone: they {has}depend on each other, and {better}."
    )


def _size(stats: RoutingStats, experts: int) -> Iterator[str]:
    found = next((c for c in stats.coverage if c.multiple == NEAR_OPTIMAL_MULTIPLE), None)
    if found is None:
        return
    word = (
        "is a good size to start from"
        if found.hits >= LOCAL
        else "is too small: expect to need more"
    )
    yield (
        f"A cache of twice top-k ({found.slots_per_layer} of {experts} slots per layer) that knew the next 16 "
        f"tokens would hit {found.hits:.0%}, so that {word}."
    )


def _prefetch(stats: RoutingStats) -> Iterator[str]:
    first = next((ahead for ahead in stats.lookahead if ahead.depth == 1), None)
    if first is not None:
        word = "prefetch can pay" if first.accuracy >= SURE_GUESS else "count the wasted copies"
        yield f"The gate's look-ahead names {first.accuracy:.0%} of the next layer's experts: {word}."
    table = stats.transitions
    if table is not None:
        gain = table.accuracy - table.popular
        word = (
            "layers tell of each other, so a learnt predictor has something to learn"
            if gain >= MATTERING_POINTS
            else "a learnt table of transitions adds nothing to popularity"
        )
        yield (
            f"One layer's experts name {table.accuracy:.0%} of the next one's, popularity alone "
            f"{table.popular:.0%}: {word}."
        )


def _batching(stats: RoutingStats, top_k: int) -> Iterator[str]:
    sizes = [batch for batch in stats.batches if batch.sequences <= SPOKEN_BATCH]
    if not sizes:
        return
    batch = sizes[-1]
    shared = batch.distinct / batch.by_popularity
    word = (
        "sequences share experts beyond their popularity"
        if shared < EARLY_SATURATION
        else "about what popularity alone would give, so grouping by order of arrival gains nothing more"
    )
    yield (
        f"{batch.sequences} sequences together need {batch.distinct:.1f} experts per event, "
        f"{batch.distinct / batch.sequences:.1f} per token instead of {top_k} "
        f"({batch.even:.1f} if routing were even): {word}."
    )


def _static(stats: RoutingStats) -> Iterator[str]:
    times = stats.top_share / stats.top_share_even
    word = (
        "a static placement is worth comparing"
        if times >= SKEWED
        else "no placement is much better than another"
    )
    yield f"The top tenth of experts takes {times:.1f} times its even share: {word}."


def _domains(stats: RoutingStats) -> Iterator[str]:
    if not stats.domains or not stats.within_domain:
        return
    far = max(stats.domains, key=lambda pair: pair.distance)
    times = far.distance / stats.within_domain
    word = (
        "choose a placement on the traffic it will serve"
        if times >= DOMAINS_DIFFER
        else "one placement serves all of them"
    )
    yield (
        f"{far.first} and {far.second} are {far.distance:.2f} apart, {times:.1f} times what halves of one domain "
        f"are: {word}."
    )


def _link(stats: RoutingStats) -> Iterator[str]:
    pace = stats.pace
    if pace is None:
        return
    if not pace.needed_hits:
        yield (
            f"A decode layer works {pace.layer_s * 1e3:.3g} ms, and loading all its {pace.distinct:.1f} experts "
            f"takes no longer ({pace.origin}): offloading can be hidden even without a cache."
        )
        return
    within = [ratio for ratio in stats.ratios if (ratio.lru_hits or 0.0) >= pace.needed_hits]
    word = (
        f"LRU alone gets there with {within[0].share:.0%} of experts resident"
        if within
        else "LRU alone gets there at none of the sizes above, so the link sets the pace"
    )
    yield (
        f"A decode layer works {pace.layer_s * 1e3:.3g} ms and one load takes {pace.copy_s * 1e3:.3g} ms "
        f"({pace.origin}): the link keeps up from {pace.needed_hits:.0%} hits on; {word}."
    )


def _prompts(stats: RoutingStats) -> Iterator[str]:
    prefixes = stats.prefixes
    if prefixes is None:
        return
    if prefixes.shared is not None and prefixes.shared >= TEMPLATED:
        yield (
            f"{prefixes.shared:.0%} of prompt tokens repeat the beginning of an earlier prompt, so part of the "
            "locality above is the template's: prompts without it will hit less."
        )
    elif prefixes.repeated_prompts:
        yield (
            f"{prefixes.repeated_prompts} prompts are repeats of earlier ones; they make the figures above look better "
            "than new prompts will."
        )

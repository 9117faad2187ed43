"""The statistics of a trace as `info` prints them: a few sections of a few lines each."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from ..stats import PhaseStats, RoutingStats

Row = tuple[str, str]
SHOWN_PAIRS = 3
SHOWN_BATCHES = (2, 8, 32)


def statistics_sections(stats: RoutingStats) -> Iterator[tuple[str, list[Row]]]:
    """Titles and their rows, leaving out sections that this trace has nothing for."""
    sections = {
        "Routing": _routing(stats),
        "Caching": _caching(stats),
        "Prediction": _prediction(stats),
        "Batching": _batching(stats),
        "Domains and prompts": [*_domains(stats), *_prompts(stats)],
        "In words": [(finding.about, finding.text) for finding in stats.findings],
    }
    for title, rows in sections.items():
        if rows:
            yield title, rows


def _routing(stats: RoutingStats) -> list[Row]:
    ginis = [layer.gini for layer in stats.layers]
    rows = [
        (
            "popularity",
            f"the top tenth of experts takes {stats.top_share:.0%} of demand ({stats.top_share_even:.0%} if even)",
        ),
        (
            "skew",
            f"Gini {stats.gini:.2f}, from {min(ginis):.2f} (layer {ginis.index(min(ginis))}) to "
            f"{max(ginis):.2f} (layer {ginis.index(max(ginis))}); entropy {stats.entropy:.2f} of 1",
        ),
    ]
    rows += [(phase.phase, _phase(phase, stats)) for phase in (stats.prefill, stats.decode)]
    if stats.sampled_tokens < stats.tokens:
        rows.append(
            (
                "sample",
                f"figures beyond popularity rest on {stats.sampled_tokens:,} of {stats.tokens:,} tokens",
            )
        )
    return rows


def _phase(phase: PhaseStats, stats: RoutingStats) -> str:
    text = f"{phase.tokens:,} tokens in {phase.steps:,} steps"
    if phase.steps:
        text += f"; {phase.mean_distinct:.1f} distinct experts per layer and step"
    if phase.reuse is not None:
        text += (
            f"; the next token keeps {phase.reuse:.0%} of its experts (by chance {stats.reuse_chance:.0%}, "
            f"by popularity {stats.reuse_popular:.0%})"
        )
    return text


def _caching(stats: RoutingStats) -> list[Row]:
    rows = [
        ("slots", ratio.reading + (f"; LRU hits {ratio.lru_hits:.0%}" if ratio.lru_hits else ""))
        for ratio in stats.ratios
    ]
    if stats.reuse_distance is not None:
        rows.append(
            ("reuse", f"an expert comes back after {stats.reuse_distance:.0f} steps (median)")
        )
    if stats.stack_distances:
        low, middle, high, most = stats.stack_distances
        rows.append(
            (
                "LRU distance",
                f"{middle:.0f} slots per layer hit half of all reuses ({low:.0f} a quarter, {high:.0f} three quarters, "
                f"{most:.0f} nine tenths)",
            )
        )
    if stats.segments:
        text = ", ".join(f"{s.srp:.0%} over {s.tokens} tokens" for s in stats.segments)
        rows.append(("SRP", f"one fixed set of experts serves a segment with F1 {text}"))
    if stats.coverage:
        text = ", ".join(f"{c.hits:.0%} with {c.slots_per_layer} slots" for c in stats.coverage)
        rows.append(("SCH", f"a cache that knows its segment hits {text} per layer"))
    return rows


def _prediction(stats: RoutingStats) -> list[Row]:
    rows: list[Row] = []
    if stats.lookahead:
        text = ", ".join(
            f"{ahead.accuracy:.0%} at depth {ahead.depth}" for ahead in stats.lookahead
        )
        rows.append(("look-ahead", f"the gate names {text} of a later layer's experts"))
    if stats.transitions is not None:
        table = stats.transitions
        rows.append(
            (
                "next layer",
                f"a table of transitions names {table.accuracy:.0%}, popularity {table.popular:.0%}, chance "
                f"{table.even:.0%} (learnt on half of the sequences, judged on the others)",
            )
        )
    if stats.coactive:
        text = ", ".join(
            f"{pair.first}+{pair.second} in layer {pair.layer} ({pair.lift:.1f} times)"
            for pair in stats.coactive[:SHOWN_PAIRS]
        )
        rows.append(("together", f"{text} as often as by popularity alone"))
    return rows


def _batching(stats: RoutingStats) -> list[Row]:
    shown = [batch for batch in stats.batches if batch.sequences in SHOWN_BATCHES]
    return [
        (
            f"{batch.sequences} sequences",
            f"{batch.distinct:.1f} distinct experts per event; {batch.by_popularity:.1f} by popularity, "
            f"{batch.even:.1f} if routing were even ({batch.groups:,} merged batches)",
        )
        for batch in shown
    ]


def _domains(stats: RoutingStats) -> list[Row]:
    if not stats.domains:
        return []
    ordered = sorted(stats.domains, key=lambda pair: pair.distance)
    noise = f"; {stats.within_domain:.2f} within one" if stats.within_domain is not None else ""
    if len(ordered) == 1:
        (pair,) = ordered
        return [
            (
                "domains",
                f"{pair.first} and {pair.second} differ by {pair.distance:.2f} (total variation{noise})",
            )
        ]
    ends = [
        (name, f"{pair.first} and {pair.second}, {pair.distance:.2f}")
        for name, pair in (("closest", ordered[0]), ("farthest", ordered[-1]))
    ]
    mean = fmean(pair.distance for pair in ordered)
    names = {name for pair in ordered for name in (pair.first, pair.second)}
    return [
        (
            "domains",
            f"{len(names)} domains differ by {mean:.2f} on average (total variation{noise})",
        ),
        *ends,
    ]


def _prompts(stats: RoutingStats) -> list[Row]:
    prefixes = stats.prefixes
    if prefixes is None or not prefixes.prompts:
        return []
    text = f"{prefixes.repeated_prompts} of {prefixes.prompts:,} repeat an earlier one"
    if prefixes.shared is not None:
        text += (
            f"; {prefixes.shared:.0%} of prompt tokens repeat the beginning of an earlier prompt"
            f" (longest: {prefixes.longest_tokens} tokens)"
        )
    return [("prompts", text)]

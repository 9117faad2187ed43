"""Routing within a core set of experts: the half that all Dynamic Expert Sharing has in common."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from .base import GateScores, Routed


def within(said: GateScores, core: Container[int]) -> Routed:
    """Each token's likeliest experts among `core`, as many as its router gave it, or fewer if there are no more.

    The weights follow what the router gives these experts and add up to what they added up to. A token whose experts
    are all in the core is left as it was. O(experts named) per token.
    """
    routed: list[Sequence[int]] = []
    weighted: list[Sequence[float]] = []
    for token, weights in enumerate(said.weights):
        chosen = said.chosen(token)
        if all(expert in core for expert in chosen):
            routed.append(chosen)
            weighted.append(weights)
            continue
        ids, scores = said.ids[token], said.scores[token]
        places = _first(ids, core, len(weights))
        routed.append([ids[place] for place in places])
        weighted.append(_shared([scores[place] for place in places], sum(weights)))
    return Routed(routed, weighted)


def _first(ids: Sequence[int], core: Container[int], most: int) -> list[int]:
    """Places of the first `most` of `ids` that are in the core."""
    places: list[int] = []
    for place, expert in enumerate(ids):
        if expert in core:
            places.append(place)
            if len(places) == most:
                break
    return places


def _shared(scores: Sequence[float], total: float) -> list[float]:
    """`total` in proportion to exp(score)."""
    if not scores:
        return []
    highest = max(scores)
    parts = [math.exp(score - highest) for score in scores]
    share = total / sum(parts)
    return [part * share for part in parts]

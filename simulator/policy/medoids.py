"""Clusters of equal size around medoids, by Hamming distance between routes.

The regrouping of ExpertFlow's token scheduler (He et al., arXiv 2410.17954), generalised from two batches to n. For
fixed medoids the assignment is exact. Nothing is drawn at random: the first medoids are those farthest apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .base import Route


def cluster(routes: Sequence[Route], sizes: Sequence[int], iterations: int) -> list[list[int]]:
    """Positions in `routes` by cluster, ascending; cluster i has `sizes[i]` of them. O(n²) and `iterations` rounds."""
    distance = [[(one ^ other).bit_count() for other in routes] for one in routes]
    medoids = _far_apart(distance, len(sizes))
    found: list[list[int]] = []
    for _ in range(iterations):
        place = assign([[row[medoid] for medoid in medoids] for row in distance], sizes)
        found = [
            [item for item, cluster in enumerate(place) if cluster == number]
            for number in range(len(sizes))
        ]
        moved = [_medoid(distance, members) for members in found]
        if moved == medoids:
            break
        medoids = moved
    return found


def assign(costs: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[int]:
    """The cluster of each item so that the summed `costs[item][cluster]` is least and the sizes are as given."""
    if len(sizes) == 2:
        # Whoever gains most by the first cluster goes there: no exchange of two can be better.
        order = sorted(range(len(costs)), key=lambda item: costs[item][0] - costs[item][1])
        first = set(order[: sizes[0]])
        return [0 if item in first else 1 for item in range(len(costs))]
    return _Assignment(costs, sizes).solve()


class _Assignment:
    """Items enter one by one, each by the cheapest chain of moves between clusters; so every stage is optimal.

    `_moves[a][b]` is the cheapest move of a member of a to b: what it adds, and who moves.
    """

    def __init__(self, costs: Sequence[Sequence[int]], sizes: Sequence[int]) -> None:
        self._costs, self._sizes = costs, sizes
        self._members: list[list[int]] = [[] for _ in sizes]
        self._moves: list[list[tuple[int, int] | None]] = [[None] * len(sizes) for _ in sizes]

    def solve(self) -> list[int]:
        """The cluster of each item."""
        for item in range(len(self._costs)):
            for cluster in self._enter(item):
                self._moves[cluster] = self._moves_of(cluster)
        place = [0] * len(self._costs)
        for cluster, members in enumerate(self._members):
            for item in members:
                place[item] = cluster
        return place

    def _enter(self, item: int) -> list[int]:
        """Let an item in; returns the clusters that have changed."""
        chain = self._cheapest_chain(list(self._costs[item]))
        for cluster, onward in pairwise(chain):
            move = self._moves[cluster][onward]
            assert move is not None
            self._members[cluster].remove(move[1])
            self._members[onward].append(move[1])
        self._members[chain[0]].append(item)
        return chain

    def _cheapest_chain(self, entry: list[int]) -> list[int]:
        """Clusters from the one entered to the one with room (Bellman and Ford; there is no negative round)."""
        clusters = range(len(self._sizes))
        total, before = entry, [-1] * len(entry)
        for _ in clusters:
            for source in clusters:
                for target in clusters:
                    move = self._moves[source][target]
                    if move is not None and total[source] + move[0] < total[target]:
                        total[target], before[target] = total[source] + move[0], source
        open_ = [c for c in clusters if len(self._members[c]) < self._sizes[c]]
        chain = [min(open_, key=total.__getitem__)]
        while before[chain[-1]] >= 0:
            chain.append(before[chain[-1]])
        return chain[::-1]

    def _moves_of(self, cluster: int) -> list[tuple[int, int] | None]:
        costs, members = self._costs, self._members[cluster]
        return [
            min(((costs[m][target] - costs[m][cluster], m) for m in members), default=None)
            if target != cluster
            else None
            for target in range(len(self._sizes))
        ]


def _far_apart(distance: Sequence[Sequence[int]], count: int) -> list[int]:
    """The two farthest apart, then whoever is farthest from all chosen; the first of equals."""
    items = range(len(distance))
    if count < 2:
        return [_medoid(distance, items)] * count
    pairs = ((one, other) for one in items for other in range(one + 1, len(distance)))
    chosen = list(max(pairs, key=lambda pair: distance[pair[0]][pair[1]]))
    while len(chosen) < count:
        left = [item for item in items if item not in chosen]
        chosen.append(max(left, key=lambda item: min(distance[item][c] for c in chosen)))
    return chosen


def _medoid(distance: Sequence[Sequence[int]], members: Sequence[int]) -> int:
    """The member nearest to all others of its cluster; the first of equals."""
    return min(members, key=lambda one: sum(distance[one][other] for other in members))

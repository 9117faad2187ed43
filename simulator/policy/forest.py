"""A regression forest as numbers: what scikit-learn trained (simulator.forest), read without it.

Trees of integer features: a feature of at most the threshold goes left. They are JSON, kept in policy.json; the columns
of a tree are text (policy.tables), which stays short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...tracer.errors import UsageError

FOREST_FORMAT = "expertflow.forest/1"
MOST_NODES = 20_000
"""Nodes over all trees at most."""
_REMEMBERED = 50_000

_Node = tuple[int, int, int, int, float]
"""Feature (−1: a leaf), threshold, left, right, value."""


class Forest:
    """The mean of its trees. Answers are remembered by their features: the same ones come again and again."""

    def __init__(self, document: Mapping[str, Any], features: Sequence[str]) -> None:
        found = document.get("format"), list(document.get("features", ()))
        if found != (FOREST_FORMAT, list(features)):
            raise UsageError(
                f"The forest is {found[0]!r} over the features {found[1]}; expected {FOREST_FORMAT!r} over "
                f"{list(features)}. Learn it again from the trace."
            )
        self._trees: list[list[_Node]] = [_nodes(tree) for tree in document["trees"]]
        if not self._trees or sum(map(len, self._trees)) > MOST_NODES:
            raise UsageError(f"A forest has 1 to {MOST_NODES:,} nodes.")
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, features: tuple[int, ...]) -> float:
        """The value for these features."""
        found = self._known.get(features)
        if found is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            found = self._known[features] = self._mean(features)
        return found

    def _mean(self, features: tuple[int, ...]) -> float:
        total = 0.0
        for nodes in self._trees:
            feature, threshold, left, right, value = nodes[0]
            while feature >= 0:
                place = left if features[feature] <= threshold else right
                feature, threshold, left, right, value = nodes[place]
            total += value
        return total / len(self._trees)


COLUMNS = ("feature", "threshold", "left", "right")
"""Whole numbers by node, as text; `value` are the others."""


def _nodes(tree: Mapping[str, str]) -> list[_Node]:
    columns = [[int(number) for number in tree[name].split()] for name in COLUMNS]
    values = [float(number) for number in tree["value"].split()]
    return [(*node, value) for *node, value in zip(*columns, values, strict=True)]  # type: ignore[misc]

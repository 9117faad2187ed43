"""Trains the forest that corrects early gates (policy.predictors.adaptive_forest), and says how good it is.

Needs scikit-learn (the extra `learn`) to train; what it gives is plain numbers (policy.forest).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..tracer.errors import ResourceError, UsageError
from .lessons import transitions
from .policy.clues import FEATURES, Clues
from .policy.forest import COLUMNS, FOREST_FORMAT, Forest
from .split import split_by_batch
from .token_table import TokenTable
from .workload import Workload

TREES = 16
DEPTH = 6
_MOST_ROWS = 200_000
_SMALLEST_LEAF = 20
_LEAF = -1


def has_trainer() -> bool:
    """Whether scikit-learn is installed."""
    return importlib.util.find_spec("sklearn") is not None


def learn_forest(
    workload: Workload, *, seed: int = 0, trees: int = TREES, depth: int = DEPTH
) -> dict[str, Any]:
    """Train on a workload with look-ahead; reproducible.

    What a row's features know of popularity and transitions comes from the other half of the batches, so that they are
    as good as they will be on new text. Raises ResourceError without scikit-learn, UsageError without look-ahead.
    """
    features, wanted = training_rows(workload)
    fitted = fit(features, wanted, seed=seed, trees=trees, depth=depth)
    return document_of(fitted)


def training_rows(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Features [rows, FEATURES], and what votes are off by [rows]: the share of tokens that demand it, less theirs."""
    if workload.lookahead < 1:
        raise UsageError("A forest learns from look-ahead ids; trace again with --lookahead 3.")
    first, second = split_by_batch(workload)
    halves = [(first, second)] if first is second else [(first, second), (second, first)]
    features: list[tuple[int, ...]] = []
    wanted: list[float] = []
    for judged, taught in halves:
        for guess in guesses(judged, clues_of(taught)):
            for expert, clues in guess.clues.items():
                features.append(clues)
                wanted.append(guess.shares.get(expert, 0.0) - clues[0] / 1000)
    if not features:
        raise UsageError(
            "No event of the trace has look-ahead ids; trace again with --lookahead 3."
        )
    kept = (
        np.arange(min(len(features), _MOST_ROWS)) * len(features) // min(len(features), _MOST_ROWS)
    )
    return np.asarray(features, dtype=np.int32)[kept], np.asarray(wanted)[kept]


@dataclass(frozen=True, slots=True)
class Guess:
    """What is known at one event of the layer `ahead`, and the shares of its tokens that demand each expert then."""

    ahead: int
    tokens: int
    clues: Mapping[int, tuple[int, ...]]
    shares: Mapping[int, float]


def guesses(workload: Workload, clues: Clues) -> Iterator[Guess]:
    """Every event of a workload with every later layer of its pass that look-ahead was recorded for."""
    for place in range(len(workload.steps)):
        events = workload.events_of(place)
        for number in events:
            layer = int(workload.layer[number])
            signals = workload.signals(number, workload.lookahead, routed=True)
            clues.enter(layer, signals)
            for ahead in range(1, workload.lookahead + 1):
                known = clues.of(ahead)
                if known and number + ahead < events.stop:
                    shares = _shares(workload, number + ahead)
                    yield Guess(ahead, len(signals.lookahead[ahead]), known, shares)


def clues_of(taught: Workload) -> Clues:
    """Features that know the popularity and the transitions of a workload."""
    return Clues(taught.popularity(), transitions(TokenTable.of(taught)))


def fit(
    features: np.ndarray, wanted: np.ndarray, *, seed: int, trees: int = TREES, depth: int = DEPTH
) -> Any:
    """A scikit-learn forest of these rows. Raises ResourceError without scikit-learn."""
    if not has_trainer():
        raise ResourceError(
            "Training a forest needs scikit-learn. Run: pip install 'expertflow-trace[learn]'."
        )
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(
        n_estimators=trees,
        max_depth=depth,
        min_samples_leaf=_SMALLEST_LEAF,
        random_state=seed,
        n_jobs=1,
    )
    return forest.fit(features, wanted)


def document_of(fitted: Any) -> dict[str, Any]:
    """A trained forest as JSON: policy.forest reads it."""
    return {
        "format": FOREST_FORMAT,
        "features": list(FEATURES),
        "trees": [_columns(one.tree_) for one in fitted.estimators_],
    }


def _columns(tree: Any) -> dict[str, str]:
    is_leaf = tree.children_left == _LEAF
    columns = (
        np.where(is_leaf, _LEAF, tree.feature),
        # Features are whole numbers, so nothing lies between a threshold and the number below it.
        np.floor(tree.threshold).astype(np.int64),
        tree.children_left,
        tree.children_right,
        tree.value[:, 0, 0],
    )
    names = (*COLUMNS, "value")
    return {
        name: " ".join(map(repr, column.tolist()))
        for name, column in zip(names, columns, strict=True)
    }


def _shares(workload: Workload, event: int) -> dict[int, float]:
    first, last = workload.ptr[event : event + 2].tolist()
    tokens = int(workload.row_ptr[event + 1] - workload.row_ptr[event])
    counts = workload.counts[first:last].tolist()
    return {
        expert: count / tokens
        for expert, count in zip(workload.experts[first:last].tolist(), counts, strict=True)
    }


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of the experts that decode passes demand `ahead` layers later, which were among the `named` likeliest.

    `named` is in multiples of the experts the event demands. Look-ahead alone names k per token; beyond these the
    likeliest by popularity follow.
    """

    ahead: int
    named: int
    events: int
    gate_recall: float
    gate_precision: float
    forest_recall: float
    forest_precision: float


def accuracy(
    workload: Workload, taught: Workload, document: Mapping[str, Any], named: Sequence[int] = (1, 2)
) -> list[Accuracy]:
    """Compare look-ahead alone with its correction on decode passes, by depth; `taught` gives features their tables."""
    decode = workload.select(np.flatnonzero(workload.steps.is_decode))
    forest = Forest(document, FEATURES)
    popularity = taught.popularity()
    found: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for guess in guesses(decode, clues_of(taught)):
        clues, demanded = guess.clues, guess.shares.keys()
        layer = next(iter(clues.values()))[FEATURES.index("layer")]
        popular = np.argsort(-np.asarray(popularity[layer]), kind="stable").tolist()
        voted = sorted(
            (e for e, known in clues.items() if known[0]),
            key=lambda e, clues=clues: (-clues[e][0], -clues[e][1], e),
        )
        gate = [*voted, *(expert for expert in popular if expert not in voted)]
        score = {expert: known[0] / 1000 + forest(known) for expert, known in clues.items()}
        corrected = sorted(score, key=lambda e, score=score: (-score[e], e))
        for factor in named:
            most = factor * len(demanded)
            found.setdefault((guess.ahead, factor), []).append(
                (
                    len(demanded & set(gate[:most])),
                    len(demanded & set(corrected[:most])),
                    len(demanded),
                    len(corrected[:most]),
                )
            )
    rows: list[Accuracy] = []
    for (ahead, factor), counts in sorted(found.items()):
        gates, forests, demanded, said = np.asarray(counts).sum(axis=0).tolist()
        rows.append(
            Accuracy(
                ahead,
                factor,
                len(counts),
                gates / demanded,
                gates / (factor * demanded),
                forests / demanded,
                forests / said,
            )
        )
    return rows

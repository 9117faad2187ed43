"""How the router's choices hang together: reuse, transitions, company, drift; on a bounded sample of rows.

Small traces are looked at in full. Of larger ones files are taken evenly over the recording, so that a page opens at
once whatever the trace; each result says how many rows it rests on.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np
import pyarrow as pa

from ..tracer.errors import TraceError
from ..tracer.schema import Manifest, table_schemas
from ..tracer.stats import RoutingStats, describe_routing
from ..tracer.store import RoutingArrays, read_part
from .data import BAD_INPUT, FileKey, Found, Problem, manifest_of, reason_of, trace_key
from .routing import domains_of

SAMPLE_ROWS: Final = 600_000
BINS: Final = (1, 2, 4, 8, 16, 32, 64)
"""Upper ends of the classes of reuse distances, in passes of the same phase."""
_JUDGED: Final = 20_000
"""Tokens that predicted transitions are judged on at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Routing rows of some files, in recorded order. `segment` changes where files between were left out."""

    arrays: RoutingArrays = field(repr=False)
    segment: np.ndarray = field(repr=False)
    layers: int
    experts: int
    rows: int
    total_rows: int

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out."""
        return self.rows == self.total_rows


def sample_of(trace: Found[Manifest], limit: int = SAMPLE_ROWS) -> Sample | Problem:
    """Rows of a trace, at most about `limit`, or what kept them from being read."""
    try:
        return _sample(trace_key(trace), limit)
    except BAD_INPUT as error:
        return Problem(f"{trace.name}: routing", reason_of(error, trace.path, trace.path))


def stats_of(trace: Found[Manifest]) -> RoutingStats | Problem:
    """What `info` says of the routing, for the sample."""
    try:
        return _stats(trace_key(trace))
    except BAD_INPUT as error:
        return Problem(f"{trace.name}: routing", reason_of(error, trace.path, trace.path))


@lru_cache(maxsize=4)
def _sample(key: FileKey, limit: int) -> Sample:
    folder, manifest = manifest_of(key)
    files = manifest.tables.get("routing", ())
    total = manifest.rows("routing")
    kept = _evenly(len(files), limit / max(total, 1))
    columns = ["step", "layer", "sequence", "position", "phase", "experts"]
    schema = table_schemas(manifest.shape, manifest.recorded)["routing"]
    tables = [read_part(folder / files[n].path, schema, columns) for n in kept]
    if not any(table.num_rows for table in tables):
        raise TraceError("the routing table is empty.")
    jumps = np.cumsum([0, *(b != a + 1 for a, b in itertools.pairwise(kept))])
    arrays = _arrays(pa.concat_tables(tables), manifest.shape.top_k)
    shape = manifest.shape
    if (
        int(arrays.layer.max()) >= shape.num_moe_layers
        or int(arrays.experts.max()) >= shape.num_experts
    ):
        raise TraceError("routing names a layer or an expert that the model does not have.")
    return Sample(
        arrays=arrays,
        segment=np.repeat(jumps, [table.num_rows for table in tables]),
        layers=shape.num_moe_layers,
        experts=shape.num_experts,
        rows=len(arrays.step),
        total_rows=total,
    )


@lru_cache(maxsize=8)
def _stats(key: FileKey) -> RoutingStats:
    sample = _sample(key, SAMPLE_ROWS)
    names, domain_of = domains_of(key)
    labels = {number: names[place] for number, place in enumerate(domain_of.tolist()) if place >= 0}
    return describe_routing(sample.arrays, sample.layers, sample.experts, labels)


def _evenly(count: int, share: float) -> list[int]:
    """Numbers of the files to read: all, or evenly spread ones, always the first."""
    if share >= 1:
        return list(range(count))
    return sorted({int(place) for place in np.linspace(0, count - 1, max(1, int(count * share)))})


def _arrays(table: pa.Table, top_k: int) -> RoutingArrays:
    chunk = table.combine_chunks()
    position = chunk.column("position").to_numpy()
    phase = chunk.column("phase").cast(pa.string()).to_numpy(zero_copy_only=False)
    experts = chunk.column("experts").combine_chunks().flatten().to_numpy()
    return RoutingArrays(
        step=chunk.column("step").to_numpy(),
        layer=chunk.column("layer").to_numpy(),
        sequence=chunk.column("sequence").to_numpy(),
        position=position,
        phase_is_decode=np.asarray(phase == "decode"),
        token_id=np.full(len(position), -1, np.int32),
        is_pad=position < 0,
        experts=experts.reshape(-1, top_k),
    )


def reuse_distances(sample: Sample, phase: str) -> np.ndarray:
    """Uses of experts by the passes since their last use, in the classes of BINS, and one class for longer.

    First uses count nowhere. A use is a distinct expert of a layer's event; passes of the phase alone are counted.
    """
    arrays = sample.arrays
    is_in = arrays.phase_is_decode == (phase == "decode")
    step = arrays.step[is_in].astype(np.int64)
    counts = np.zeros(len(BINS) + 1, dtype=np.int64)
    if not len(step):
        return counts
    _, number = np.unique(step, return_inverse=True)
    span = int(number.max()) + 1
    block = sample.segment[is_in] * sample.layers + arrays.layer[is_in]
    keys = (block[:, None] * sample.experts + arrays.experts[is_in]) * span + number[:, None]
    keys = np.sort(keys, axis=None)
    keys = keys[np.diff(keys, prepend=-1) != 0]
    gaps = np.diff(keys)[np.diff(keys // span) == 0]
    places = np.searchsorted(np.asarray(BINS), gaps, side="left")
    return counts + np.bincount(places, minlength=len(counts))


def transitions(sample: Sample, layer: int) -> np.ndarray:
    """How often tokens that chose expert i of `layer` chose expert j of the next: counts[i, j]."""
    here, there = _pairs(sample, layer)
    return _joint(here, there, sample.experts)


def foresight(sample: Sample, layer: int) -> tuple[float, float] | None:
    """Share of the next layer's experts that transitions name, and that popularity names; top-k guesses each.

    Learned on tokens of even sequences, judged on those of odd ones; None if one of the two is missing.
    """
    here, there, sequence = _pairs_of_sequences(sample, layer)
    is_learned = sequence % 2 == 0
    if is_learned.all() or not is_learned.any():
        return None
    top_k = here.shape[1]
    joint = _joint(here[is_learned], there[is_learned], sample.experts)
    shares = joint / np.maximum(joint.sum(axis=1, keepdims=True), 1)
    popular = np.argsort(-joint.sum(axis=0), kind="stable")[:top_k]
    places = np.flatnonzero(~is_learned)
    places = places[:: max(1, len(places) // _JUDGED)][:_JUDGED]
    scores = sum(shares[here[places, column]] for column in range(top_k))
    guessed = np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, :top_k]
    return _found(there[places], guessed), _found(there[places], np.tile(popular, (len(places), 1)))


def company(sample: Sample, layer: int) -> np.ndarray:
    """How often a token chose experts i and j of `layer` together: counts[i, j], with own counts on the diagonal."""
    arrays = sample.arrays
    chosen = arrays.experts[(arrays.layer == layer) & ~arrays.is_pad].astype(np.int64)
    return _joint(chosen, chosen, sample.experts)


def lift(counts: np.ndarray) -> np.ndarray:
    """Company over what popularity alone would give: above 1 together more often; NaN where too little is expected.

    Pairs are expected in proportion to the popularity of both, as many in all as there are.
    """
    own = np.diag(counts).astype(float)
    expected = own[:, None] * own[None, :]
    np.fill_diagonal(expected, 0)
    pairs = counts.sum() - own.sum()
    expected *= pairs / max(float(expected.sum()), 1.0)
    out = np.full(counts.shape, np.nan)
    np.divide(counts, expected, out=out, where=expected >= 1)
    np.fill_diagonal(out, np.nan)
    return out


def drift(sample: Sample, layer: int, windows: int = 60) -> np.ndarray:
    """Choices of each expert of `layer` in equal parts of the recording, in order: counts[window, expert]."""
    arrays = sample.arrays
    chosen = arrays.experts[(arrays.layer == layer) & ~arrays.is_pad]
    windows = max(1, min(windows, len(chosen) // 8))
    window = np.arange(len(chosen)) * windows // max(1, len(chosen))
    keys = window[:, None] * sample.experts + chosen
    counts = np.bincount(keys.ravel(), minlength=windows * sample.experts)
    return counts.reshape(windows, sample.experts)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Total variation between two sets of counts, mean over layers if there are such: 0 the same, 1 disjoint."""
    shares = [counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1) for counts in (one, other)]
    return float(np.mean(np.abs(shares[0] - shares[1]).sum(axis=-1)) / 2)


def similar_order(matrix: np.ndarray) -> np.ndarray:
    """An order of rows in which similar ones stand together: by the second eigenvector of the Laplacian."""
    weights = np.nan_to_num(matrix, nan=0.0, posinf=0.0)
    weights = (weights + weights.T) / 2
    laplacian = np.diag(weights.sum(axis=1)) - weights
    _, vectors = np.linalg.eigh(laplacian)
    return np.argsort(vectors[:, min(1, vectors.shape[1] - 1)], kind="stable")


def _pairs(sample: Sample, layer: int) -> tuple[np.ndarray, np.ndarray]:
    here, there, _ = _pairs_of_sequences(sample, layer)
    return here, there


def _pairs_of_sequences(sample: Sample, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Experts of the same tokens in `layer` and the next, and the tokens' sequences."""
    arrays = sample.arrays
    span = int(arrays.position.max(initial=0)) + 1
    places = [np.flatnonzero((arrays.layer == n) & ~arrays.is_pad) for n in (layer, layer + 1)]
    keys = [arrays.sequence[p].astype(np.int64) * span + arrays.position[p] for p in places]
    _, first, second = np.intersect1d(keys[0], keys[1], return_indices=True)
    here, there = places[0][first], places[1][second]
    chosen = arrays.experts.astype(np.int64, copy=False)
    return chosen[here], chosen[there], arrays.sequence[here]


def _joint(here: np.ndarray, there: np.ndarray, experts: int) -> np.ndarray:
    counts = np.zeros(experts * experts, dtype=np.int64)
    for first in here.T.astype(np.int64):
        for second in there.T:
            counts += np.bincount(first * experts + second, minlength=experts * experts)
    return counts.reshape(experts, experts)


def _found(needed: np.ndarray, guessed: np.ndarray) -> float:
    """Share of the needed that are among the guessed, row by row."""
    if not needed.size:
        return 0.0
    is_named = (needed[:, :, None] == guessed[:, None, :]).any(axis=2)
    return float(is_named.mean())

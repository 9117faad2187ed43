"""The router's choices of a trace, counted: every row is looked at, a bounded number at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np
import pyarrow as pa

from ..tracer.errors import TraceError
from ..tracer.schema import Manifest
from .data import (
    ALL,
    BAD_INPUT,
    FileKey,
    Found,
    Problem,
    manifest_of,
    read_sequences,
    reason_of,
    tables_of,
    trace_key,
)

PHASES: Final = ("prefill", "decode")
_AT_ONCE: Final = 200_000
"""Rows counted together; bounds the memory of a large file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSummary:
    """Choices of the router, counted by phase, domain, layer and expert."""

    domains: tuple[str, ...]
    counts: np.ndarray = field(repr=False)
    padding_rows: int
    rows: int

    def select(self, phase: str, domain: str) -> np.ndarray:
        """Counts by layer and expert of one phase and domain, or of all."""
        phases = slice(None) if phase == ALL else [PHASES.index(phase)]
        domains = slice(None) if domain == ALL else [self.domains.index(domain)]
        return self.counts[phases][:, domains].sum(axis=(0, 1))

    def phases(self) -> tuple[str, ...]:
        """The phases that have rows."""
        return tuple(p for i, p in enumerate(PHASES) if self.counts[i].any())


def routing_summary(trace: Found[Manifest]) -> RoutingSummary | Problem:
    """The router's choices of a trace, counted, or what kept them from being read."""
    try:
        return _routing(trace_key(trace))
    except BAD_INPUT as error:
        return Problem(f"{trace.name}: routing", reason_of(error, trace.path, trace.path))


def domains_of(key: FileKey) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of domains, and the index of each sequence's own by its number; one domain if nobody knows."""
    try:
        sequences = read_sequences(key)
        return sequences.domains or ("",), sequences.domain_of
    except BAD_INPUT:  # Without its sequences a trace still has a heatmap, of one domain.
        return ("",), np.zeros(0, dtype=np.int64)


def domain_numbers(sequence: np.ndarray, domain_of: np.ndarray) -> np.ndarray:
    """Index of the domain of each row; rows of no known sequence (padding) go to the first."""
    known = (sequence >= 0) & (sequence < len(domain_of))
    domain = np.zeros(len(sequence), dtype=np.int64)
    domain[known] = np.maximum(domain_of[sequence[known]], 0)
    return domain


@lru_cache(maxsize=8)
def _routing(key: FileKey) -> RoutingSummary:
    folder, manifest = manifest_of(key)
    shape = manifest.shape
    domains, domain_of = domains_of(key)
    counts = np.zeros(
        (len(PHASES), len(domains), shape.num_moe_layers, shape.num_experts), dtype=np.int64
    )
    padding = rows = 0
    columns = ["layer", "sequence", "position", "phase", "experts"]
    for table in tables_of(folder, manifest, "routing", columns):
        for start in range(0, table.num_rows, _AT_ONCE):
            _count(table.slice(start, _AT_ONCE), domain_of, counts)
        padding += int((table.column("position").to_numpy() < 0).sum())
        rows += table.num_rows
    if not rows:
        raise TraceError("the routing table is empty.")
    counts.flags.writeable = False
    return RoutingSummary(domains=domains, counts=counts, padding_rows=padding, rows=rows)


def _count(table: pa.Table, domain_of: np.ndarray, counts: np.ndarray) -> None:
    """Add the choices of some routing rows to `counts`."""
    shape = counts.shape
    chunk = table.combine_chunks()
    experts = chunk.column("experts").combine_chunks().flatten().to_numpy()
    if not table.num_rows or experts.size % table.num_rows:
        raise TraceError("routing rows do not all have the same number of experts.")
    phase = _phase_codes(chunk.column("phase"))
    layer = chunk.column("layer").to_numpy().astype(np.int64)
    if layer.min() < 0 or layer.max() >= shape[2] or int(experts.max()) >= shape[3]:
        raise TraceError(
            f"routing names layer {layer.max()} or expert {experts.max()}, "
            f"but the model has {shape[2]} layers of {shape[3]} experts."
        )
    domain = domain_numbers(chunk.column("sequence").to_numpy(), domain_of)
    row = (phase * shape[1] + domain) * shape[2] + layer
    flat = np.repeat(row * shape[3], experts.size // table.num_rows) + experts
    counts += np.bincount(flat, minlength=counts.size).reshape(shape)


def _phase_codes(column: pa.ChunkedArray) -> np.ndarray:
    pieces = [np.empty(0, dtype=np.int64)]
    for chunk in column.chunks:
        names = chunk.dictionary.to_pylist()
        if strange := sorted(set(names) - set(PHASES)):
            raise TraceError(f"routing has a phase {strange[0]!r}; known: {', '.join(PHASES)}.")
        codes = np.array([PHASES.index(name) for name in names], dtype=np.int64)
        pieces.append(codes[chunk.indices.to_numpy()])
    return np.concatenate(pieces)

"""Peak bytes of a pass's working tensors, fitted to peaks that were measured.

A pass peaks while one of its layers computes experts. Of that peak one part depends on the pass alone, and one on
how its events were divided into waves: a wave holds its own rows, and those after the first hold the tensor in which
all waves are gathered besides. The last layer is not always the worst, but it has the advantage: its passes' KV cache
is complete, that of an earlier layer is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..tracer.types import MemoryPoint, Phase
from .least_squares import non_negative
from .policy.log import Entry

ONE_CALL = -1
"""Instead of the rows of a later wave: the event ran as a whole."""

_TRIES = 65


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBytes:
    """What the experts of one layer hold at their peak.

    `row` is for one token's share of one expert in a call that computes a whole event; `gathered_row` for one in a
    wave, whose states are gathered first; `partial` per token for the tensor that gathers waves, and `weighted` for
    its copy when they are combined; `layer_kv` is the KV cache of one layer per token.
    """

    row: float = 0.0
    gathered_row: float = 0.0
    partial: float = 0.0
    weighted: float = 0.0
    layer_kv: float = 0.0

    def of_event(self, tokens: int, first: int, later: int, layers_behind: int) -> float:
        """Bytes above those of the whole pass. `first` and `later`: see `wave_rows`."""
        if later == ONE_CALL:
            peak = self.row * first
        else:
            last = max(self.gathered_row * later, self.weighted * tokens)
            peak = max(self.gathered_row * first, self.partial * tokens + last)
        return peak - self.layer_kv * (tokens * layers_behind)

    def of_pass(self, tokens: int, waves: Iterable[tuple[int, int]], num_layers: int) -> float:
        """The worst of a pass's events; `waves` by MoE layer, from the first on."""
        return max(
            (
                self.of_event(tokens, first, later, num_layers - 1 - layer)
                for layer, (first, later) in enumerate(waves)
            ),
            default=0.0,
        )


@dataclass(frozen=True, slots=True)
class Activations:
    """Peaks of one phase: `weights` are of (1, tokens, batch × context, tokens × context)."""

    weights: tuple[float, float, float, float]
    experts: ExpertBytes

    def __call__(
        self, batch: np.ndarray, tokens: np.ndarray, context: np.ndarray, expert_bytes: np.ndarray
    ) -> np.ndarray:
        """Bytes of passes: [passes], as all arguments."""
        return np.asarray(self.weights) @ _features(batch, tokens, context) + expert_bytes


def wave_rows(log: Sequence[Entry], num_layers: int) -> dict[int, tuple[tuple[int, int], ...]]:
    """By step and MoE layer: rows of the first wave, and the most of a later one.

    Rows are pairs of a token and one of its experts; those computed on the CPU are not counted. Layers without an
    event have (0, ONE_CALL).
    """
    rows: dict[int, dict[int, dict[int, int]]] = {}
    on_cpu: set[tuple[int, int]] = set()
    for entry in log:
        if entry.kind != "event":
            continue
        waves = rows.setdefault(entry.step, {}).setdefault(entry.layer, {})
        if entry.wave >= 0:
            waves[entry.wave] = waves.get(entry.wave, 0) + entry.tokens
        else:
            on_cpu.add((entry.step, entry.layer))
    return {
        step: tuple(
            _first_and_later(layers.get(layer, {}), (step, layer) in on_cpu)
            for layer in range(num_layers)
        )
        for step, layers in rows.items()
    }


def _first_and_later(waves: Mapping[int, int], has_cpu: bool) -> tuple[int, int]:
    ordered = [waves[number] for number in sorted(waves)]
    first, others = (ordered[0], ordered[1:]) if ordered else (0, [])
    if not others and not has_cpu:
        return first, ONE_CALL
    return first, max(others, default=0)


@lru_cache(maxsize=256)
def fit_activations(
    points: tuple[MemoryPoint, ...],
    phase: Phase,
    *,
    partial: int,
    state: int,
    layer_kv: float,
) -> Activations:
    """Peaks of a phase; bytes per token of the tensor that gathers waves, of a hidden state, and of a layer's KV cache.

    Points in waves of files that do not say how they were divided are left out. Where none was in waves, such passes
    are charged the gathering tensor alone.
    """
    known = [p for p in points if p.phase == phase and (p.waves or p.largest_wave == 1)]
    if state == 0 or not any(p.waves for p in known):
        gathering = ExpertBytes(partial=partial)
        weights = _weights(known, gathering, 0)[0] if known else (0.0, 0.0, 0.0, 0.0)
        return Activations(weights, gathering)
    rows_per_token = partial // state
    most = max(p.activation_bytes / (p.tokens * rows_per_token) for p in known)

    def tried(row: float) -> tuple[float, float]:
        return _weights(known, _of_row(row, partial, state, layer_kv), rows_per_token)[1], row

    _, rough = min(tried(row) for row in np.linspace(0.0, most, _TRIES).tolist())
    step = most / (_TRIES - 1)
    near = np.linspace(max(0.0, rough - step), rough + step, _TRIES).tolist()
    _, best = min(tried(row) for row in near)
    experts = _of_row(best, partial, state, layer_kv)
    return Activations(_weights(known, experts, rows_per_token)[0], experts)


def _of_row(row: float, partial: int, state: int, layer_kv: float) -> ExpertBytes:
    return ExpertBytes(
        row=row, gathered_row=row + state, partial=partial, weighted=partial, layer_kv=layer_kv
    )


def _weights(
    points: Sequence[MemoryPoint], experts: ExpertBytes, rows_per_token: int
) -> tuple[tuple[float, float, float, float], float]:
    """What is left when experts are taken off, and the sum of squared relative errors."""
    sizes = [
        np.asarray(column, dtype=np.float64)
        for column in zip(*((p.batch, p.tokens, p.context) for p in points), strict=True)
    ]
    held = np.asarray([_held(point, experts, rows_per_token) for point in points])
    peaks = np.maximum(1.0, [point.activation_bytes for point in points])
    relative = (_features(*sizes) / peaks).T
    target = 1.0 - held / peaks
    found = non_negative(relative, target)
    error = float(np.square(relative @ found - target).sum())
    one, tokens, positions, pairs = found.tolist()
    return (one, tokens, positions, pairs), error


def _held(point: MemoryPoint, experts: ExpertBytes, rows_per_token: int) -> float:
    if not point.waves:
        return experts.of_event(point.tokens, point.tokens * rows_per_token, ONE_CALL, 0)
    return experts.of_pass(point.tokens, point.waves, len(point.waves))


def _features(batch: np.ndarray, tokens: np.ndarray, context: np.ndarray) -> np.ndarray:
    return np.stack([np.ones(len(tokens)), tokens, batch * context, tokens * context])

"""The words of the toolkit as frozen records: model shape, hardware profile, provenance.

No torch, no I/O. Every package shares these; one meaning each (docs/glossary.md). Times are seconds,
sizes are bytes, and the unit is in the name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

Phase = Literal["prefill", "decode"]
Origin = Literal["measured", "emulated", "declared"]
Why = Literal["demand", "prefetch", "warm"]


class ExpertKey(NamedTuple):
    """One expert weight block. `layer` counts MoE layers only, from 0."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """All a simulator needs to know of a model.

    `moe_layers` maps our layer numbers (its indices) to the model's decoder layers (its values); an encoder's
    come before them, counted from 0 as well.
    `expert_bytes` is one packed block, padding included. `kv_bytes_per_token` covers all layers.
    """

    model_id: str
    revision: str | None
    architecture: str
    dtype: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    expert_bytes: int
    non_expert_bytes: int
    kv_bytes_per_token: int
    hidden_size: int
    vocab_size: int

    @property
    def num_moe_layers(self) -> int:
        """Number of layers that have experts."""
        return len(self.moe_layers)

    @property
    def stacks(self) -> tuple[range, ...]:
        """Layers (as we number them) that one forward pass runs: all of them, or an encoder's and a decoder's.

        A second stack begins where the model's own layer numbers start again.
        """
        starts = [
            place
            for place, layer in enumerate(self.moe_layers)
            if place == 0 or layer <= self.moe_layers[place - 1]
        ]
        ends = [*starts[1:], self.num_moe_layers]
        return tuple(range(start, end) for start, end in zip(starts, ends, strict=True))

    @property
    def total_experts(self) -> int:
        """Number of expert blocks in the whole model."""
        return self.num_moe_layers * self.num_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCurve:
    """Seconds one copy takes by its size, on an otherwise idle (`busy=False`) or loaded machine.

    `points` are (bytes, seconds), ascending in bytes. `spread` is the relative interquartile range
    of the samples behind the points: how much to trust them.
    """

    pinned: bool
    busy: bool
    points: tuple[tuple[int, float], ...]
    spread: float = 0.0

    def copy_s(self, num_bytes: float) -> float:
        """Seconds for one copy of `num_bytes`, linear between points and beyond the last one."""
        sizes = [float(size) for size, _ in self.points]
        seconds = [second for _, second in self.points]
        if len(sizes) == 1:
            return seconds[0] * num_bytes / sizes[0]
        if num_bytes <= sizes[-1]:
            return float(np.interp(num_bytes, sizes, seconds))
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        return seconds[-1] + slope * (num_bytes - sizes[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """The way from host to device: what it is called, where its numbers come from, and the curves.

    `wake_s` is the time from asking for a copy to its start on an idle link, and from its end to
    the moment the asker goes on: paid once per wait, not per copy. `submit_s` is the asker's own time
    per copy. A prefetch gives way to a demand copy every `chunk_bytes`.
    """

    name: str
    origin: Origin
    curves: tuple[LinkCurve, ...]
    wake_s: float = 0.0
    submit_s: float = 0.0
    chunk_bytes: int = 4 * 2**20

    def curve(self, *, pinned: bool, busy: bool) -> LinkCurve:
        """The measured curve nearest to the asked-for conditions (pinning counts before load)."""
        return min(self.curves, key=lambda c: (c.pinned != pinned, c.busy != busy))


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """One machine as the time model sees it.

    `group_s` is what one more slot in a layer's pool adds to a call of the experts kernel.
    """

    name: str
    device: str
    device_bytes: int
    host_bytes: int
    threads: int
    link: LinkProfile
    origin: Origin
    group_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPoint:
    """Bytes of working tensors at their peak inside one forward pass (weights and KV excluded).

    `waves` says how events were divided where slots were short, by MoE layer: rows (pairs of a token and one of its
    experts) of the first wave, and the most of a later one, -1 for an event in one call. `largest_wave` is all that
    older files say of it: the largest share of an event's experts in one wave.
    """

    phase: Phase
    batch: int
    tokens: int
    context: int
    activation_bytes: int
    largest_wave: float = 1.0
    waves: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What made a file: enough to make it again."""

    command: str
    created: str
    versions: Mapping[str, str]
    seed: int
    text: Literal["own-generation", "teacher-forced", "imported"] = "own-generation"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """How the traced run was driven."""

    batch_size: int
    max_new_tokens: int
    residency: Literal["resident", "stream", "offload"]
    experts_implementation: str
    lookahead: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)

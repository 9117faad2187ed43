"""One memory budget: what a run takes on the device and on the host, by class, before anything is allocated.

`plan` makes it from a config, `deploy` before it loads; both refuse by the same sums. Bytes that are known exactly
(weights, slots, KV cache) are computed; working tensors are measured ones where a machine file has them, else those of
passes over shapes; what no config can tell (context of the driver, libraries) is declared, and every class says which
it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from ..tracer.errors import InputError, ResourceError
from ..tracer.quantities import format_bytes
from ..tracer.types import ModelShape, Phase
from ..tracer.widths import WorkingTensors
from .activations import ONE_CALL
from .costs import CostModel
from .paths import WEIGHTS, read_card

Basis = Literal[
    "computed from the config",
    "worked out by passes over shapes",
    "upper estimate from the config",
    "estimate from the config",
    "measured",
    "declared",
]
DEVICE_RESERVE_BYTES = 512 * 2**20
"""Declared: a GPU's driver context, its kernels' workspaces and what the allocator rounds up."""
HOST_RESERVE_BYTES = 2**30
"""Declared: Python and its libraries, on a machine where nothing runs yet."""
_STREAMED_LAYERS = 3
_COMPUTED: Basis = "computed from the config"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSize:
    """The largest pass of a run: `tokens` of `batch` sequences, and the positions each sequence has in the end.

    `sequences` have a KV cache at the same time: more than the batch where batches are decoded in turns. `in_parts`:
    a pass feeds parts of prompts, with a mask over what is cached.
    """

    batch: int
    tokens: int
    context: int
    sequences: int
    in_parts: bool = False

    @classmethod
    def of(cls, batch: int, prompt: int, context: int) -> RunSize:
        """Whole prompts in one pass, as the runtime feeds them."""
        return cls(batch=batch, tokens=batch * prompt, context=context, sequences=batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by class. `slots` experts fit on the device; `host_loading` is the host's peak while the model is loaded.

    `staging` are the rows that events gather if they run in waves. With `is_host` device and host are the same memory.
    `basis` says of each class how it is known.
    """

    slots: int
    total_experts: int
    expert_bytes: int
    non_expert_weights: int
    kv_cache: int
    staging: int
    activations: int
    predictor: int
    reserve: int
    host_experts: int
    host_loading: int
    host_reserve: int
    is_host: bool
    basis: Mapping[str, Basis] = field(default_factory=dict)

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.expert_bytes

    @property
    def beside_slots(self) -> int:
        """Device bytes of everything but the slots."""
        known = self.non_expert_weights + self.kv_cache + self.staging + self.activations
        return known + self.predictor + self.reserve

    @property
    def device_bytes(self) -> int:
        """What the device must have: the sum over the classes."""
        return self.slot_bytes + self.beside_slots

    @property
    def host_bytes(self) -> int:
        """What the host must have: while loading or while running, whichever is more."""
        running = self.host_experts + (self.device_bytes if self.is_host else 0)
        return max(self.host_loading, running) + self.host_reserve

    @property
    def classes(self) -> dict[str, int]:
        """Device bytes by class, in the order people read them."""
        return {
            "slots": self.slot_bytes,
            "non_expert_weights": self.non_expert_weights,
            "kv_cache": self.kv_cache,
            "staging": self.staging,
            "activations": self.activations,
            "predictor": self.predictor,
            "reserve": self.reserve,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """What a run needs whatever the number of slots; `plan` adds them.

    `staging` is taken only by runs in which some event does not fit its slots. `streams`: the experts are loaded layer
    by layer, straight into a file. `is_drawn`: weights are not loaded but made where they stay.
    `kept_per_sequence` are states that a sequence has beside its KV cache, whatever its length.
    """

    shape: ModelShape
    size: RunSize
    activations: int
    staging: int
    kept_per_sequence: int = 0
    predictor: int = 0
    reserve: int = 0
    host_reserve: int = 0
    is_host: bool = False
    on_disk: bool = False
    streams: bool = False
    is_drawn: bool = False
    basis: Mapping[str, Basis] = field(default_factory=dict)

    def plan(self, slots: int) -> MemoryPlan:
        """The budget with so many slots."""
        shape = self.shape
        return MemoryPlan(
            slots=slots,
            total_experts=shape.total_experts,
            expert_bytes=shape.expert_bytes,
            non_expert_weights=shape.non_expert_bytes,
            kv_cache=self.size.sequences
            * (shape.kv_bytes_per_token * self.size.context + self.kept_per_sequence),
            staging=0 if slots // shape.num_moe_layers >= self.largest_event else self.staging,
            activations=self.activations,
            predictor=self.predictor,
            reserve=self.reserve,
            host_experts=0 if self.on_disk else shape.total_experts * shape.expert_bytes,
            host_loading=self._loading(),
            host_reserve=self.host_reserve,
            is_host=self.is_host,
            basis=self.basis,
        )

    def _loading(self) -> int:
        """The host's peak while loading: the model, with one layer's experts twice while they are packed.

        Into a file they go layer by layer, and the library makes about as much again of a layer, twice.
        """
        if self.is_drawn:
            return 0
        layer = self.shape.num_experts * self.shape.expert_bytes
        layers = _STREAMED_LAYERS if self.streams else self.shape.num_moe_layers + 1
        return self.shape.non_expert_bytes + layers * layer

    @property
    def largest_event(self) -> int:
        """Most experts that one layer can be asked for in one pass: those of its largest pass."""
        return min(self.shape.num_experts, self.size.tokens * self.shape.top_k)

    @property
    def decode_event(self) -> int:
        """Most experts that one layer can be asked for in one decode step."""
        return min(self.shape.num_experts, self.size.batch * self.shape.top_k)

    def slots_in(self, device_bytes: int) -> int:
        """The most slots that fit into so many device bytes; 0 if none does."""
        most = self.shape.total_experts
        for beside in (
            self.plan(most).beside_slots,
            self.plan(0).beside_slots,
        ):  # without and with what waves take
            slots = min(most, max(0, (device_bytes - beside) // self.shape.expert_bytes))
            if slots and self.plan(slots).device_bytes <= device_bytes:
                return slots
        return 0


def estimated_needs(
    shape: ModelShape,
    size: RunSize,
    widths: WorkingTensors,
    *,
    measured: CostModel | None = None,
    predictor: int = 0,
    reserve: int = 0,
    host_reserve: int = 0,
    is_host: bool = False,
    on_disk: bool = False,
    streams: bool = False,
) -> MemoryNeeds:
    """What a run of this size needs. `measured` is a machine whose peaks of working tensors are used, if it has any."""
    if measured is not None and measured.memory:
        activations, staging = _measured(measured, shape, size)
        found: Basis = "measured"
        kept = 0  # states are among the measured working tensors
    else:
        activations = widths.activation_bytes(
            batch=size.batch,
            tokens=size.tokens,
            context=size.context,
            in_parts=size.in_parts,
        )
        staging = size.tokens * shape.top_k * shape.hidden_size * widths.item_bytes
        found = _how(widths)
        kept = widths.kept_per_sequence
    return MemoryNeeds(
        shape=shape,
        size=size,
        activations=activations,
        staging=staging,
        kept_per_sequence=kept,
        predictor=predictor,
        reserve=reserve,
        host_reserve=host_reserve,
        is_host=is_host,
        on_disk=on_disk,
        streams=on_disk and streams,
        basis={
            "slots": _COMPUTED,
            "non_expert_weights": _COMPUTED,
            "kv_cache": _COMPUTED,
            "staging": "measured" if found == "measured" else "upper estimate from the config",
            "activations": found,
            "predictor": _COMPUTED,
            "reserve": "declared",
            "host_experts": _COMPUTED,
            "host_loading": _COMPUTED,
            "host_reserve": "declared",
        },
    )


def _how(widths: WorkingTensors) -> Basis:
    if widths.is_by_pass:
        return "worked out by passes over shapes"
    return "upper estimate from the config" if widths.is_upper else "estimate from the config"


def predictor_file_bytes(folder: Path | None) -> int:
    """Bytes of a trained path predictor's weights; 0 without a folder. Raises InputError if it holds none."""
    if folder is None:
        return 0
    read_card(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path} is missing; train the predictor again.")
    return path.stat().st_size


def require_room(
    needs: MemoryNeeds,
    slots: int,
    *,
    device: str,
    device_bytes: int | None = None,
    host_bytes: int | None = None,
) -> MemoryPlan:
    """The budget with so many slots, if it fits what may be used (None: not asked).

    Raises ResourceError with the sums by class, and what would fit.
    """
    plan = needs.plan(slots)
    if device_bytes is not None and plan.device_bytes > device_bytes:
        raise ResourceError(
            f"{slots} slots do not fit: the run needs {format_bytes(plan.device_bytes)} on {device} "
            f"({classes_text(plan)}), {allowed(device_bytes, plan.device_bytes)}. {_way_out(needs, device_bytes)}"
        )
    if host_bytes is not None and plan.host_bytes > host_bytes:
        advice = (
            "Use a smaller model or number format (--dtype), or a machine with more memory."
            if needs.on_disk or plan.host_loading + plan.host_reserve > host_bytes
            else "Keep the experts on disk (--tier disk), or use a machine with more memory."
        )
        raise ResourceError(
            f"The run needs {format_bytes(plan.host_bytes)} of host memory "
            f"({format_bytes(plan.host_experts)} of experts while it runs, {format_bytes(plan.host_loading)} while "
            f"the model is loaded), {allowed(host_bytes, plan.host_bytes)}. {advice}"
        )
    return plan


def allowed(num_bytes: int, needed: int) -> str:
    """What may be used, beside a need that is larger; how much larger, if one does not see it."""
    words = f"{format_bytes(num_bytes)} may be used"
    if format_bytes(num_bytes) == format_bytes(needed):
        return f"{words}, {needed - num_bytes} B too few"
    return words


def classes_text(plan: MemoryPlan) -> str:
    """Device bytes by class in one line; classes that take nothing are left out."""
    return ", ".join(
        f"{name.replace('_', ' ')} {format_bytes(size)}"
        for name, size in plan.classes.items()
        if size
    )


def _way_out(needs: MemoryNeeds, device_bytes: int) -> str:
    fitting = needs.slots_in(device_bytes)
    if fitting:
        return f"{fitting} slots fit: tune again with --budget {fitting}slots."
    least = needs.plan(1).device_bytes
    return (
        f"Not even one slot fits, which takes {format_bytes(least)}: use a smaller batch, shorter prompts, fewer new "
        "tokens or a smaller number format (--dtype)."
    )


def _measured(costs: CostModel, shape: ModelShape, size: RunSize) -> tuple[int, int]:
    """Measured peaks of a run's largest passes, and what they take more if events run in waves: bytes.

    Of waves the worst is taken: nearly all of an event's rows in one that is not the first.
    """

    def peak(*, in_waves: bool) -> int:
        prefill = _peak(costs, "prefill", size.tokens, shape, size, in_waves=in_waves)
        decode = _peak(costs, "decode", size.batch, shape, size, in_waves=in_waves)
        return max(prefill, decode)

    whole = peak(in_waves=False)
    return whole, max(0, peak(in_waves=True) - whole)


def _peak(
    costs: CostModel,
    phase: Phase,
    tokens: int,
    shape: ModelShape,
    size: RunSize,
    *,
    in_waves: bool,
) -> int:
    peaks = costs.activations(phase)
    rows = tokens * shape.top_k
    held = peaks.experts.of_event(tokens, rows, rows if in_waves else ONE_CALL, 0)
    sizes = (np.asarray([number]) for number in (size.batch, tokens, size.context, held))
    found = peaks(*sizes)
    return int(np.ceil(found[0]))

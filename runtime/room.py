"""One check of room for all that load a model under a policy, before any weight is read.

The sums are those of the memory plan (simulator/memory_plan.py), which `plan` and `deploy --dry-run` print; here stands
what a machine has for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..simulator.machine import read_machine
from ..simulator.memory_plan import (
    MemoryNeeds,
    MemoryPlan,
    RunSize,
    allowed,
    classes_text,
    estimated_needs,
    predictor_file_bytes,
    require_room,
)
from ..simulator.policy.spec import PolicyFile, check_shape
from ..tracer.errors import ResourceError
from ..tracer.host_memory import available_host_bytes
from ..tracer.load import choose_device
from ..tracer.placement import choose_tier, free_bytes
from ..tracer.quantities import format_bytes, parse_bytes
from ..tracer.unloaded import UnloadedModel, describe
from .run_size import policy_size

if TYPE_CHECKING:
    from .deploy import RunRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a run needs whatever its slots, and the bytes it may use on the device and on the host."""

    needs: MemoryNeeds
    device: str
    device_bytes: int
    host_bytes: int
    notes: tuple[str, ...] = ()

    def require(self, slots: int) -> MemoryPlan:
        """Refuse what does not fit with so many slots. Raises ResourceError with the sums by class, and a way out."""
        return require_room(
            self.needs,
            slots,
            device=self.device,
            device_bytes=self.device_bytes,
            host_bytes=self.host_bytes,
        )

    def most_slots(self) -> int:
        """The most that fit on the device. Raises ResourceError if none does, or the host cannot hold the experts."""
        slots = max(1, self.needs.slots_in(self.device_bytes))
        self.require(slots)
        return slots

    def require_all(self, slots: int, why: str, way_out: str) -> MemoryPlan:
        """The same for slots that nobody asked for: `why` says whence they come, `way_out` what to do instead."""
        plan = self.needs.plan(slots)
        if plan.device_bytes > self.device_bytes:
            raise ResourceError(
                f"{why} That takes {format_bytes(plan.device_bytes)} on {self.device} ({classes_text(plan)}), "
                f"{allowed(self.device_bytes, plan.device_bytes)}. {way_out}"
            )
        return require_room(self.needs, slots, device=self.device, host_bytes=self.host_bytes)


def check_room(policy: PolicyFile, request: RunRequest, size: RunSize | None = None) -> Room:
    """Refuse a run under a policy that cannot fit. `size`: other passes than those over the request's prompts.

    Raises ResourceError with the sums by class, PolicyError for a model of another shape, UsageError and InputError for
    the rest of the request.
    """
    room = policy_room(policy, request, size)
    room.require(policy.behaviour.slots)
    return room


def policy_room(
    policy: PolicyFile,
    request: RunRequest,
    size: RunSize | None = None,
    *,
    elsewhere: bool = False,
) -> Room:
    """The room of a run under a policy. `elsewhere`: `--memory` may be more than this device has."""
    name = request.model or policy.shape.model_id
    found = unloaded(name, request)
    check_shape(policy.shape, found.shape)
    size = policy_size(policy, request, name) if size is None else size
    return room_of(found, size, request, elsewhere=elsewhere)


def unloaded(model: str, request: RunRequest) -> UnloadedModel:
    """The model of a request, from its config alone. Raises ResourceError, UsageError."""
    device = choose_device(request.device)
    choose_tier(request.tier)
    return describe(model, dtype=request.dtype, device=device)


def room_of(
    found: UnloadedModel, size: RunSize, request: RunRequest, *, elsewhere: bool = False
) -> Room:
    """The room of a model in passes of this size. Working tensors are those measured on `request.machine`, if told.

    What this process and the driver hold already is not free any more, so nothing is kept in reserve.
    """
    device = choose_device(request.device)
    costs = read_machine(request.machine).costs if request.machine is not None else None
    needs = estimated_needs(
        found.shape,
        size,
        found.widths,
        measured=costs,
        predictor=predictor_file_bytes(request.paths),
        is_host=device.type == "cpu",
        on_disk=choose_tier(request.tier) == "disk",
        streams=not found.is_adapted,
    )
    free = free_bytes(device)
    told = free if request.memory is None else parse_bytes(request.memory)
    return Room(
        needs=needs,
        device=str(device),
        device_bytes=told if elsewhere else min(told, free),
        host_bytes=available_host_bytes(),
        notes=found.notes,
    )

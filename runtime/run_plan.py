"""What a run will take, as a document: summed up before the model is loaded, for `deploy --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..simulator.memory_plan import MemoryPlan, RunSize
from ..simulator.policy.spec import PolicyFile
from ..tracer.types import ModelShape
from .room import Room, policy_room

if TYPE_CHECKING:
    from .deploy import RunRequest

RUN_PLAN_FORMAT = "expertflow.run_plan/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The budget of one run, and the bytes it may use on the device and on the host."""

    model: ModelShape
    policy: str
    policy_hash: str
    device: str
    size: RunSize
    memory: MemoryPlan
    device_bytes: int
    host_bytes: int
    notes: tuple[str, ...] = ()
    format: str = RUN_PLAN_FORMAT


def plan_run(
    policy: PolicyFile, request: RunRequest, size: RunSize | None = None
) -> tuple[RunPlan, Room]:
    """The budget of a run, and the room to require it of. With `request.memory` it may be another device's.

    `size`: other passes than those over the request's prompts. Raises as `check_room` does, but does not refuse.
    """
    spec = policy.behaviour
    room = policy_room(policy, request, size, elsewhere=True)
    plan = RunPlan(
        model=room.needs.shape,
        policy=spec.label,
        policy_hash=policy.behaviour_hash,
        device=room.device,
        size=room.needs.size,
        memory=room.needs.plan(spec.slots),
        device_bytes=room.device_bytes,
        host_bytes=room.host_bytes,
        notes=room.notes,
    )
    return plan, room

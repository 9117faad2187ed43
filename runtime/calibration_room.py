"""The check of room (room.py) for `verify` and `calibrate`, which run more than what a policy asks for."""

from __future__ import annotations

from collections.abc import Sequence

from ..simulator.memory_plan import RunSize
from ..simulator.policy.spec import PolicyFile, check_shape
from ..tracer.errors import ResourceError
from ..tracer.generate import Prompt
from ..tracer.load import choose_device
from ..tracer.placement import choose_residency
from ..tracer.quantities import format_bytes
from .deploy import RunRequest
from .room import room_of, unloaded
from .run_size import in_any_order, largest, prompts_to_run, served_size
from .serving import Load
from .serving_calibrate import closed_loop, settings_for


def check_calibrate(request: RunRequest, model: str, *, serves: int | None = None) -> int:
    """The most slots that a calibration has room for, one for every expert if they fit; `serves`: see `calibration_of`.

    Raises ResourceError with the sums by class if it has none, UsageError and InputError for the request.
    """
    found = unloaded(model, request)
    prompts = prompts_to_run(request, model, held_out_from=None)
    sizes = _calibration_sizes(prompts, request, serves)
    return min(room_of(found, size, request).most_slots() for size in sizes)


def check_verify(policy: PolicyFile, request: RunRequest, load: Load | None = None) -> None:
    """Refuse before loading what `verify` cannot fit: the resident model, and calibration.

    Both take the room of every expert, the one before the other. `load`: requests that arrive.

    Raises ResourceError with the sums by class, PolicyError for a model of another shape, UsageError and InputError for
    the rest of the request.
    """
    name = request.model or policy.shape.model_id
    found = unloaded(name, request)
    check_shape(policy.shape, found.shape)
    shape = found.shape
    if load is None:
        prompts = prompts_to_run(request, name, held_out_from=policy)
        # Two thirds are judged, the others are sorted by length to calibrate on.
        sizes = [in_any_order(prompts, request.batch_size, request.max_new_tokens)]
    else:
        sizes = _served_sizes(load)
    device = choose_device(request.device)
    why = (
        "verify runs the resident model for reference, and calibrates with a slot for each of its "
        f"{shape.total_experts} experts, so the device must hold all of it."
    )
    way_out = (
        f"Use `deploy`, which takes the policy's {policy.behaviour.slots} slots and no more, or a device with more "
        "memory."
    )
    for size in sizes:
        room_of(found, size, request).require_all(shape.total_experts, why, way_out)
    if choose_residency("auto", shape, device) == "stream":
        total = shape.non_expert_bytes + shape.total_experts * shape.expert_bytes
        raise ResourceError(
            f"{why} Its weights take {format_bytes(total)}, and on {device} too little is free beside them. {way_out}"
        )


def _served_sizes(load: Load) -> list[RunSize]:
    """Passes of requests that arrive, and of the batches in which their calibration measures memory."""
    sizes = [served_size(load)]
    if load.requests:
        most = load.settings.max_batch
        sizes.append(in_any_order(load.requests, most, max(load.new_tokens)))
    return sizes


def _calibration_sizes(
    prompts: Sequence[Prompt], request: RunRequest, serves: int | None
) -> list[RunSize]:
    """Passes over batches of prompts sorted by length, and those of a closed loop where one is served."""
    prompts = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
    new_tokens = request.max_new_tokens
    sizes = [largest(prompts, request.batch_size, new_tokens)]
    if serves is not None:
        load = closed_loop(prompts, serves, 2 * serves, new_tokens, settings_for(serves))
        sizes.append(served_size(load))
    return sizes

"""What a run will take, summed up before the model is loaded: from its config, the policy and the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..simulator.machine import read_machine
from ..simulator.memory_plan import (
    MemoryNeeds,
    MemoryPlan,
    RunSize,
    estimated_needs,
    predictor_file_bytes,
    require_room,
)
from ..simulator.policy.spec import PolicyFile, check_shape
from ..simulator.policy.units import regrouping_of
from ..tracer.errors import UsageError
from ..tracer.generate import Prompt
from ..tracer.host_memory import available_host_bytes
from ..tracer.load import choose_device
from ..tracer.placement import choose_tier
from ..tracer.prompts import (
    MAX_PROMPT_TOKENS,
    PromptText,
    batches,
    choose_prompts,
    read_prompts,
    tokenize,
)
from ..tracer.quantities import parse_bytes
from ..tracer.types import ModelShape
from ..tracer.unloaded import describe, tokenizer_of

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
    policy: PolicyFile, request: RunRequest, free: Callable[[torch.device], int]
) -> tuple[RunPlan, MemoryNeeds]:
    """The budget of a run, without loading the model. `free` tells what a device has left.

    Working tensors are those measured on `request.machine`, if there is one. Raises ResourceError for a model that
    cannot be had, PolicyError for one of another shape, UsageError and InputError for the rest of the request.
    """
    device = choose_device(request.device)
    on_disk = choose_tier(request.tier) == "disk"
    name = request.model or policy.shape.model_id
    described = describe(name, dtype=request.dtype, device=device)
    check_shape(policy.shape, described.shape)
    spec = policy.behaviour
    costs = read_machine(request.machine).costs if request.machine is not None else None
    needs = estimated_needs(
        described.shape,
        _size(policy, request, name),
        described.widths,
        measured=costs,
        predictor=predictor_file_bytes(request.paths),
        is_host=device.type == "cpu",
        on_disk=on_disk,
        streams=not described.is_adapted,
    )
    # What this process and the driver hold already is not free any more, so nothing is kept in reserve.
    allowed = parse_bytes(request.memory) if request.memory is not None else free(device)
    plan = RunPlan(
        model=described.shape,
        policy=spec.label,
        policy_hash=policy.behaviour_hash,
        device=str(device),
        size=needs.size,
        memory=needs.plan(spec.slots),
        device_bytes=allowed,
        host_bytes=available_host_bytes(),
        notes=described.notes,
    )
    return plan, needs


def require_run(plan: RunPlan, needs: MemoryNeeds) -> None:
    """Refuse what does not fit. Raises ResourceError with the sums by class and the way out."""
    require_room(
        needs,
        plan.memory.slots,
        device=plan.device,
        device_bytes=plan.device_bytes,
        host_bytes=plan.host_bytes,
    )


def _size(policy: PolicyFile, request: RunRequest, name: str) -> RunSize:
    """The largest pass over prompts that share a batch, with all new tokens behind them."""
    from .deploy import held_out

    if request.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {request.max_new_tokens}.")
    texts = held_out(read_prompts(request.prompts), policy)
    prompts = _prompts(choose_prompts(texts, request.limit), name)
    largest = max(
        batches(prompts, request.batch_size),
        key=lambda batch: len(batch) * _longest(batch),
    )
    scheduler = regrouping_of(policy.behaviour.build_scheduler())
    together = scheduler.batches if scheduler is not None else 1
    return RunSize(
        batch=len(largest),
        tokens=len(largest) * _longest(largest),
        context=_longest(largest) + request.max_new_tokens,
        sequences=min(len(prompts), len(largest) * together),
    )


def _longest(batch: Sequence[Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in batch)


def _prompts(texts: Sequence[PromptText], name: str) -> list[Prompt]:
    """The prompts as tokens; those with images are taken to be as long as may be."""
    if all(text.images for text in texts):
        return [Prompt(number, (0,) * MAX_PROMPT_TOKENS) for number in range(len(texts))]
    tokenizer = tokenizer_of(name)
    found: list[Prompt] = []
    for text in texts:
        if text.images:
            found.append(Prompt(len(found), (0,) * MAX_PROMPT_TOKENS))
        else:
            found += tokenize(tokenizer, [text], MAX_PROMPT_TOKENS)
    return found

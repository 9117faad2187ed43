"""Does a model fit, how fast can it be, and what would have to change: answered before anything is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..tracer.quantities import LinkSpec, format_bytes
from ..tracer.types import ModelShape
from .hardware_profiles import LINKS, DeclaredGpu
from .memory_plan import MemoryNeeds, MemoryPlan
from .speed_plan import SpeedPlan, speed_plan

PLAN_FORMAT = "expertflow.plan/1"
Outcome = Literal["resident", "offloaded", "in waves", "does not fit"]
_LONGEST = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What would have to change: bytes of device memory, bytes of host memory, positions of context.

    `least_bytes` hold one slot for all layers, `event_bytes` one decode event's experts in every layer (below that even
    a cache that guesses right waits in each layer), `resident_bytes` every expert. `longest_context` leaves one event
    per layer beside it; 0 if none does.
    """

    least_bytes: int
    event_bytes: int
    resident_bytes: int
    host_bytes: int
    longest_context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer of `plan`. `slots_ratio` is r: a decode event's experts over slots per layer (0 if there is no slot).

    `device_bytes` and `host_bytes` are what may be used; None: not told. `sources` says where declared numbers come
    from.
    """

    model: ModelShape
    device_bytes: int
    host_bytes: int | None
    outcome: Outcome
    finding: str
    slots_ratio: float
    memory: MemoryPlan
    speed: SpeedPlan
    changes: Changes
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    format: str = PLAN_FORMAT


def make_plan(
    needs: Callable[[int], MemoryNeeds],
    context: int,
    *,
    device_bytes: int,
    host_bytes: int | None,
    gpu: DeclaredGpu | None,
    link: LinkSpec,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Fit as many slots as go, and say what that means. `needs` is by context length."""
    here = needs(context)
    shape, event = here.shape, here.decode_event
    slots = here.slots_in(device_bytes)
    memory = here.plan(slots)
    outcome = _outcome(here, slots)
    return Plan(
        model=shape,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        outcome=outcome,
        finding=_finding(here, memory, outcome, device_bytes, host_bytes),
        slots_ratio=event * shape.num_moe_layers / slots if slots else 0.0,
        memory=memory,
        speed=speed_plan(shape, here.size, slots, gpu=gpu, link=link),
        changes=Changes(
            least_bytes=here.plan(1).device_bytes,
            event_bytes=here.plan(event * shape.num_moe_layers).device_bytes,
            resident_bytes=here.plan(shape.total_experts).device_bytes,
            host_bytes=memory.host_bytes,
            longest_context=_longest_context(needs, device_bytes),
        ),
        sources=_sources(gpu, link),
        notes=notes,
    )


def fits(plan: Plan) -> bool:
    """Whether the model can run at all with what may be used."""
    return plan.outcome != "does not fit" and (
        plan.host_bytes is None or plan.memory.host_bytes <= plan.host_bytes
    )


def _outcome(needs: MemoryNeeds, slots: int) -> Outcome:
    if not slots:
        return "does not fit"
    if slots >= needs.shape.total_experts:
        return "resident"
    enough = slots >= needs.decode_event * needs.shape.num_moe_layers
    return "offloaded" if enough else "in waves"


def _finding(
    needs: MemoryNeeds,
    memory: MemoryPlan,
    outcome: Outcome,
    device_bytes: int,
    host_bytes: int | None,
) -> str:
    shape, event = needs.shape, needs.decode_event
    share = f"{memory.slots} of {shape.total_experts} experts ({memory.slots / shape.total_experts:.0%})"
    found = {
        "resident": f"Every expert fits beside the rest: {share}. Nothing has to be offloaded.",
        "offloaded": f"It fits offloaded: {share} stay on the device, {memory.slots / shape.num_moe_layers:.1f} per "
        f"layer; a decode event demands up to {event}.",
        "in waves": f"It runs, but short of slots: {share}, {memory.slots / shape.num_moe_layers:.1f} per layer, and a "
        f"decode event demands up to {event}. Large events run in waves and no cache can hit by recency.",
        "does not fit": f"It does not fit: without any slot {format_bytes(needs.plan(0).device_bytes)} are needed, "
        f"{format_bytes(device_bytes)} may be used.",
    }[outcome]
    if host_bytes is not None and memory.host_bytes > host_bytes:
        found += (
            f" The host is too small: {format_bytes(memory.host_bytes)} are needed there, "
            f"{format_bytes(host_bytes)} may be used."
        )
    return found


def _longest_context(needs: Callable[[int], MemoryNeeds], device_bytes: int) -> int:
    """The longest context beside which every layer keeps room for one decode event, by bisection."""

    def is_enough(context: int) -> bool:
        one = needs(context)
        return one.slots_in(device_bytes) >= one.decode_event * one.shape.num_moe_layers

    if not is_enough(1):
        return 0
    low, high = 1, 2
    while high < _LONGEST and is_enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_enough(middle) else (low, middle)
    return low


def _sources(gpu: DeclaredGpu | None, link: LinkSpec) -> tuple[str, ...]:
    named = LINKS.get(link.text)
    told = named.source if named is not None else link.note or "as typed in"
    found = [f"link {link.text} ({link.origin}): {told}"]
    if gpu is not None:
        found.append(f"GPU {gpu.name} (declared): {gpu.source}")
    return tuple(found)

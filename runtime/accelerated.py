"""Accelerate's offloading as a baseline: whole layers that do not fit are brought to the device in every pass.

The device map is the one that `device_map="auto"` makes for the same room. Copies are Accelerate's own: one tensor
after the other, waited for, out of pageable memory. On the CPU its layers wait on disk, as it has no other place for
what is not to lie in the memory it computes from; an emulated link is waited for after each module's copies.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..simulator.account import CopyRow
from ..simulator.result import MemoryResult
from ..tracer.errors import ResourceError
from ..tracer.quantities import LinkSpec, format_bytes
from ..tracer.types import ExpertKey
from .deploy import Prepared
from .stock import PlainRuns, Words, count_weights, with_working

NAME = "accelerate"
LABEL = "Accelerate device_map"


@dataclass(frozen=True, slots=True)
class _Offloaded:
    """One module whose weights come and go: the hook that carries them, their bytes and how many tensors they are."""

    hook: Any
    num_bytes: int
    tensors: int


@contextmanager
def accelerated_runs(
    prepared: Prepared, *, slots: int, batch_size: int, max_new_tokens: int, trace_id: str = ""
) -> Iterator[PlainRuns]:
    """The model under Accelerate, in the room of its other weights and `slots` experts; then no more to be used.

    Raises ResourceError if Accelerate is not installed or leaves nothing on the device.
    """
    accelerate = _accelerate()
    loaded, device = prepared.loaded, prepared.device
    room = loaded.shape.non_expert_bytes + slots * loaded.shape.expert_bytes
    is_cuda = device.type == "cuda"
    nothing = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)
    # There copied weights would count as working tensors; here the device does not hold the model yet.
    working = nothing if is_cuda else with_working(nothing, prepared, batch_size)
    with tempfile.TemporaryDirectory(prefix="expertflow-accelerate-") as folder, _quiet():
        main: Any = (device.index or 0) if is_cuda else "cpu"
        places = accelerate.infer_auto_device_map(
            loaded.model,
            max_memory={main: room, **({"cpu": _ALL} if is_cuda else {})},
            no_split_module_classes=loaded.model._no_split_modules,
        )
        if next(iter(places.values())) != main:
            raise ResourceError(
                f"Accelerate leaves no layer on {device} in {format_bytes(room)}. Give it a larger --budget."
            )
        accelerate.dispatch_model(loaded.model, places, main_device=main, offload_dir=folder)
        moved = list(_offloaded(loaded.model))
        experts, others = count_weights(loaded)
        held = MemoryResult(
            non_expert_weights=others,
            slots=experts,
            staging=max((one.num_bytes for one in moved), default=0),
            kv_cache=working.kv_cache,
            activations=working.activations,
        )
        runs = PlainRuns(
            prepared,
            _words(prepared, trace_id),
            with_working(held, prepared, batch_size) if is_cuda else held,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
        for number, one in enumerate(moved):
            one.hook.pre_forward = _carried(one, number, runs, prepared.link)
        try:
            runs.warm_up()
            yield runs
        finally:
            drop_weights(loaded.model)


_ALL = 2**62
"""Bytes of host memory that Accelerate may use: what does not fit has failed to load before."""


def _accelerate() -> ModuleType:
    try:
        import accelerate
    except ModuleNotFoundError:
        raise ResourceError(
            "Baseline 'accelerate' needs accelerate, which is not installed. "
            "Run: pip install 'expertflow-trace[accelerate]'"
        ) from None
    return accelerate


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep its notices off the terminal."""
    logger = logging.getLogger("accelerate")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _words(prepared: Prepared, trace_id: str) -> Words:
    link, is_cuda = prepared.link, prepared.device.type == "cuda"
    notes = ("Accelerate's layers wait on disk, memory-mapped, whatever the others' tier is.",)
    return Words(
        name=NAME,
        label=LABEL,
        link=link.text if link else "host to device" if is_cuda else "disk to memory",
        link_origin="emulated" if link else "measured",
        trace_id=trace_id,
        warnings=() if is_cuda else notes,
    )


def drop_weights(model: Any) -> None:
    """Let go of a model's weights, so that the next copy of it is not held beside them."""
    for module in model.modules():
        module._parameters.clear()
        module.__dict__.pop("_hf_hook", None)


def _offloaded(model: Any) -> Iterator[_Offloaded]:
    """The modules of a dispatched model that Accelerate brings in for every call."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if not getattr(one, "offload", False):
                continue
            weights = list(module.parameters(recurse=one.place_submodules))
            if weights:
                size = sum(weight.numel() * weight.element_size() for weight in weights)
                yield _Offloaded(one, size, len(weights))


def _carried(
    one: _Offloaded, number: int, runs: PlainRuns, link: LinkSpec | None
) -> Callable[..., Any]:
    """The hook's own copies, timed as a stall and counted; an emulated link is waited for."""
    inner, timer = one.hook.pre_forward, runs.watch.timer
    least_s = one.tensors * link.latency_s + one.num_bytes / link.bandwidth_Bps if link else 0.0

    def carry(module: Any, *args: Any, **kwargs: Any) -> Any:
        timer.enter()
        start_s = timer.now()
        found = inner(module, *args, **kwargs)
        if (remaining_s := start_s + least_s - timer.now()) > 0:
            time.sleep(remaining_s)
        timer.lap("stall_s")
        timer.leave(number, distinct=0, waves=1)
        # The key is the module's number: what Accelerate moves are no single experts.
        key, end_s = ExpertKey(number, 0), timer.now()
        runs.copies.append(
            CopyRow(key, "demand", runs.watch.step, one.num_bytes, start_s, start_s, end_s, start_s)
        )
        return found

    return carry

"""Experts computed where they are: on the CPU, from host memory, while the device goes on with the others.

The library's own kernels run there too, expert by expert, on the rows of the tokens that chose it. What comes out
is not weighted yet; it is gathered with what the device computed and combined as by the stock kernel
(tracer/slotwise.py), so the order of summing is the stock one. Where the CPU is the device the same kernel runs, and
the numbers are the same to the last bit. Elsewhere the CPU's kernel rounds differently from the device's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..tracer.blocks import HostBlocks, StandIn
from ..tracer.hooks import ExpertLayer, stock_function
from ..tracer.slotwise import send, unweighted
from ..tracer.switching import hasten, relax
from ..tracer.types import ExpertKey

_HOST_IMPLEMENTATION = "grouped_mm"
"""On a CPU beside a device: one product per expert, by torch's own kernels (oneDNN for bf16); no weights gathered."""


class CpuWork(NamedTuple):
    """What one event gave the CPU: experts, the (token, expert) pairs, and seconds until they were done."""

    experts: int
    pairs: int
    seconds: float


class CpuThread:
    """The thread that computes them, one event at a time. `work` is what it did so far."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "expertflow-cpu")
        self.work: list[CpuWork] = []
        hasten()

    def submit(self, compute: Callable[[], torch.Tensor]) -> Future[torch.Tensor]:
        """Ask for something; what it raises is raised by the future."""
        return self._pool.submit(compute)

    def close(self) -> None:
        """Wait for what it is at, and stop it."""
        self._pool.shutdown(cancel_futures=True)
        relax()


@dataclass(slots=True)
class HandedOver:
    """Rows on their way through the CPU. `places` are their positions among the flat [tokens × top_k] pairs."""

    future: Future[torch.Tensor] | None
    places: torch.Tensor
    num_pairs: int

    def gathered(self, partial: torch.Tensor | None) -> torch.Tensor | None:
        """Wait, and put the rows beside those of the device: [tokens × top_k, hidden]. Raises what computing raised."""
        if self.future is None:
            return partial
        rows = self.future.result().to(self.places.device, non_blocking=True)
        if partial is None:
            partial = rows.new_empty(self.num_pairs, rows.shape[-1])
        partial[self.places] = rows
        return partial


class CpuExperts:
    """The experts of one layer in host memory. Make it before the layer gets its handler."""

    def __init__(
        self,
        layer: ExpertLayer,
        blocks: HostBlocks,
        thread: CpuThread,
        device: torch.device,
        implementation: str,
    ) -> None:
        is_apart = device.type != "cpu"
        self._layer = layer.index
        self._blocks = blocks
        self._thread = thread
        # What is no weight (activations, norms after the experts) must be on the CPU as well.
        self._module: nn.Module = copy.deepcopy(layer.module).cpu() if is_apart else layer.module
        self._stock = stock_function(
            layer.module, _HOST_IMPLEMENTATION if is_apart else implementation
        )
        self._is_batched = implementation == "batched_mm" and not is_apart
        self._stand_ins: dict[int, StandIn] = {}

    def hand_over(
        self, experts: Sequence[int], hidden_states: torch.Tensor, chosen: np.ndarray
    ) -> HandedOver:
        """Start computing `experts` for the tokens [tokens, hidden] that chose them; returns at once."""
        began = perf_counter()
        flat = chosen.reshape(-1)
        groups = [np.flatnonzero(flat == expert) for expert in experts]
        sizes = [len(group) for group in groups]
        places = send(np.concatenate(groups), hidden_states.device)
        if not sum(sizes):
            return HandedOver(None, places, flat.size)
        states = hidden_states[places // chosen.shape[1]]
        there = None
        if states.device.type == "cuda":
            # The destination of such a copy is page-locked.
            states = states.to("cpu", non_blocking=True)
            there = torch.cuda.Event()
            there.record()
        parts = [(expert, size) for expert, size in zip(experts, sizes, strict=True) if size]
        is_lone = self._is_batched and flat.size > 1
        future = self._thread.submit(lambda: self._compute(parts, states, there, began, is_lone))
        return HandedOver(future, places, flat.size)

    @torch.inference_mode()
    def _compute(
        self,
        parts: Sequence[tuple[int, int]],
        states: torch.Tensor,
        there: Any,
        began: float,
        is_batched: bool,
    ) -> torch.Tensor:
        """`parts` are experts and how many of the rows are theirs."""
        if there is not None:
            there.synchronize()
        rows = states.split([size for _, size in parts])
        computed = torch.cat(
            [
                self._one(expert, own, is_batched)
                for (expert, _), own in zip(parts, rows, strict=True)
            ]
        )
        if there is not None:
            computed = computed.pin_memory()
        work = CpuWork(len(parts), len(states), perf_counter() - began)
        self._thread.work.append(work)
        return computed

    def _one(self, expert: int, states: torch.Tensor, is_batched: bool) -> torch.Tensor:
        stand_in = self._stand_ins.get(expert)
        if stand_in is None:
            weights = self._blocks.weights(ExpertKey(self._layer, expert))
            stand_in = self._stand_ins[expert] = StandIn(self._module, weights)
        first = torch.zeros(len(states), 1, dtype=torch.int64)
        return unweighted(self._stock, stand_in, states, first, is_batched=is_batched)

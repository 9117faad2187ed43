"""Peak bytes of working tensors: what a forward pass needs beside weights.

CUDA's allocator counts by itself. On the CPU every operation's results are counted as they appear and
vanish, which is slow: it is used for a few passes, apart from the timed ones. Scratch space inside a
single operation is not seen there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .generate import Prompt, StepObserver, StepTokens, greedy
from .load import LoadedModel
from .timing import StepInfo
from .types import MemoryPoint, ModelShape

METERED_PASSES = 3
"""A prefill and two decode passes show a batch's peak."""


class _CpuMeter(TorchDispatchMode):
    """Counts live storages made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._owners: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in [result] if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._count(leaf, (args, kwargs))
        return result

    def _count(self, tensor: torch.Tensor, given: Any) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._owners:
            if place in _places(given):
                return  # a view of something made before the meter: a weight
            self._owners[place] = 0
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._owners[place] += 1
        weakref.finalize(tensor, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        if place not in self._owners:
            return
        self._owners[place] -= 1
        if self._owners[place] == 0:
            del self._owners[place]
            self.live_bytes -= size


def _places(tree: Any) -> set[int]:
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return {leaf.untyped_storage().data_ptr() for leaf in leaves}


class PeakMeter:
    """Context manager: `peak_bytes` are the working tensors at their peak inside it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu: _CpuMeter | None = None
        self._before = 0
        self.peak_bytes = 0

    def take_peak(self) -> int:
        """The peak since the last call (or the start), inside the context."""
        if self._cpu is not None:
            peak, self._cpu.peak_bytes = self._cpu.peak_bytes, self._cpu.live_bytes
        else:
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device) - self._before
            torch.cuda.reset_peak_memory_stats(self._device)
        self.peak_bytes = max(self.peak_bytes, peak)
        return peak

    def __enter__(self) -> PeakMeter:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._cpu = _CpuMeter()
            self._cpu.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.take_peak()
        if self._cpu is not None:
            self._cpu.__exit__(kind, error, traceback)


class SilentObserver:
    """Watches nothing; for passes whose times do not count."""

    def begin_step(self, info: StepInfo, tokens: StepTokens) -> None:
        """See generate.StepObserver."""

    def end_step(self) -> float:
        """See generate.StepObserver."""
        return 0.0


class _PeakObserver:
    """Takes the peak of every pass, and lets another observer see it too."""

    def __init__(self, inner: StepObserver, meter: PeakMeter) -> None:
        self._inner = inner
        self._meter = meter
        self._info: StepInfo | None = None
        self.peaks: list[tuple[StepInfo, int]] = []

    def begin_step(self, info: StepInfo, tokens: StepTokens) -> None:
        self._info = info
        self._inner.begin_step(info, tokens)

    def end_step(self) -> float:
        assert self._info is not None
        self.peaks.append((self._info, self._meter.take_peak()))
        return self._inner.end_step()


def measure_memory(
    loaded: LoadedModel,
    batches: Sequence[Sequence[Prompt]],
    device: torch.device,
    *,
    observer: StepObserver | None = None,
    first_step: int = 0,
) -> list[MemoryPoint]:
    """Peak working tensors of the first passes of each batch, KV cache taken out.

    These passes are apart from the timed ones. The model runs as it is installed now.
    """
    return [
        _point(loaded.shape, info, peak)
        for batch in batches
        for info, peak in peaks(loaded, batch, device, observer=observer, first_step=first_step)
    ]


def peaks(
    loaded: LoadedModel,
    batch: Sequence[Prompt],
    device: torch.device,
    *,
    observer: StepObserver | None = None,
    first_step: int = 0,
) -> list[tuple[StepInfo, int]]:
    """Peak bytes of working tensors and KV cache together, for each of a batch's first passes."""

    def generate(watch: StepObserver) -> None:
        greedy(
            loaded.model,
            batch,
            max_new_tokens=METERED_PASSES,
            eos_ids=frozenset(),
            pad_id=loaded.pad_id,
            first_step=first_step,
            observer=watch,
        )

    return peaks_of(generate, device, observer or SilentObserver())


def peaks_of(
    generate: Callable[[StepObserver], object], device: torch.device, observer: StepObserver
) -> list[tuple[StepInfo, int]]:
    """Peak bytes of working tensors and KV cache together, for each pass that `generate` shows its observer."""
    with PeakMeter(device) as meter:
        watch = _PeakObserver(observer, meter)
        generate(watch)
    return watch.peaks


def _point(shape: ModelShape, info: StepInfo, peak_bytes: int) -> MemoryPoint:
    kv_bytes = shape.kv_bytes_per_token * info.batch * info.context
    return MemoryPoint(
        phase=info.phase,
        batch=info.batch,
        tokens=info.tokens,
        context=info.context,
        activation_bytes=max(0, peak_bytes - kv_bytes),
    )


def spread_by_size(batches: Sequence[Sequence[Prompt]], count: int) -> list[Sequence[Prompt]]:
    """A few batches from the smallest to the largest by padded tokens, the largest always in."""
    ordered = sorted(batches, key=lambda b: len(b) * max(len(p.token_ids) for p in b))
    if len(ordered) <= count:
        return ordered
    return [ordered[round(place * (len(ordered) - 1) / (count - 1))] for place in range(count)]

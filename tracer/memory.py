"""Peak bytes of working tensors: what a forward pass needs beside weights.

CUDA's allocator counts by itself. On the CPU every operation's results are counted as they appear and
vanish, which is slow: it is used for a few passes, apart from the timed ones. Scratch space inside a
single operation is not seen there.
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _CpuMeter(TorchDispatchMode):
    """Counts live storages made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._owners: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._count(leaf, given)
        return result

    def _count(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in given and place not in self._owners:
            return  # a view of something made before the meter: a weight
        if place not in self._owners:
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


class PeakMeter:
    """Context manager: `peak_bytes` are the working tensors at their peak inside it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu: _CpuMeter | None = None
        self._before = 0
        self.peak_bytes = 0

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
        if self._cpu is not None:
            self._cpu.__exit__(kind, error, traceback)
            self.peak_bytes = self._cpu.peak_bytes
            return
        torch.cuda.synchronize(self._device)
        self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before

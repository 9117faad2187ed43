"""Packed expert blocks on the host, and the slot arena on the device.

An expert's tensors lie behind one another in one block, so that a load is one copy. The arena is the
same layout, one row per slot; strided views of it look like the stacked weights the library's kernels
expect, with slot numbers in place of expert numbers. Only bytes here: no policy, no copying, no clock.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .errors import ResourceError, is_out_of_memory
from .hooks import ExpertLayer, align
from .types import ExpertKey

Tier = Literal["ram", "disk"]
TIERS: tuple[Tier, ...] = ("ram", "disk")


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one weight tensor of an expert lies inside its block."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor itself, padding excluded."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The layout every block of a model shares."""

    places: tuple[TensorPlace, ...]
    block_bytes: int

    @classmethod
    def of(cls, layer: ExpertLayer) -> BlockLayout:
        """Lay out one expert of this layer, each tensor aligned."""
        places: list[TensorPlace] = []
        offset = 0
        for name in layer.weight_names:
            stacked = getattr(layer.module, name)
            place = TensorPlace(name, offset, tuple(stacked.shape[1:]), stacked.dtype)
            places.append(place)
            offset += align(place.num_bytes)
        return cls(tuple(places), offset)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """See rows of a uint8 [n, block_bytes] buffer as stacked weights {name: [n, *shape]}."""
        stacked: dict[str, torch.Tensor] = {}
        for place in self.places:
            columns = buffer[:, place.offset : place.offset + place.num_bytes]
            stacked[place.name] = columns.view(place.dtype).unflatten(1, place.shape)
        return stacked


class HostBlocks:
    """Every expert of the model, packed, in host memory or in a memory-mapped file.

    `pin=True` page-locks the buffer at its exact size (torch's own pinning rounds up to a power of
    two). Packing takes a layer's weights and frees the originals, so the model is never held twice. With `is_empty` the
    blocks are left to be filled, as weights are loaded (streamed.py). Raises ResourceError if there is no room, with
    the layers as they were.
    """

    def __init__(
        self,
        layers: list[ExpertLayer],
        *,
        tier: Tier = "ram",
        pin: bool = False,
        is_empty: bool = False,
    ) -> None:
        self.layout = BlockLayout.of(layers[0])
        self.num_layers = len(layers)
        self.num_experts = int(layers[0].module.num_experts)  # type: ignore[arg-type]
        self.tier: Tier = tier
        self.pinned = False
        self._file: Any = None
        self.buffer = self._allocate()
        if not is_empty:
            for layer in layers:
                self._pack(layer)
        if pin:
            # Last: locked pages are taken at once, and would lie beside all that is still to be packed.
            try:
                self._pin()
            except ResourceError:
                self._give_back([] if is_empty else layers)
                raise

    @property
    def num_bytes(self) -> int:
        """Host bytes of all blocks."""
        return self.buffer.numel()

    def block(self, key: ExpertKey) -> torch.Tensor:
        """The packed bytes of one expert: uint8 [block_bytes]."""
        return self.buffer[key.layer * self.num_experts + key.expert]

    def weights(self, key: ExpertKey) -> dict[str, torch.Tensor]:
        """One expert where it lies, as stacked weights {name: [1, *shape]}."""
        return self.layout.views(self.block(key)[None])

    def stacked(self, layer: int) -> dict[str, torch.Tensor]:
        """A layer's experts where they lie, as stacked weights {name: [experts, *shape]}."""
        rows = slice(layer * self.num_experts, (layer + 1) * self.num_experts)
        return self.layout.views(self.buffer[rows])

    def close(self) -> None:
        """Give back page locks and the backing file."""
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr())  # type: ignore[union-attr]
            self.pinned = False
        if self._file is not None:
            self.buffer = torch.empty(0, dtype=torch.uint8)
            self._file()
            self._file = None

    def _allocate(self) -> torch.Tensor:
        rows = self.num_layers * self.num_experts
        total = rows * self.layout.block_bytes
        if self.tier == "ram":
            try:
                return torch.empty(rows, self.layout.block_bytes, dtype=torch.uint8, device="cpu")
            except (RuntimeError, MemoryError) as cause:
                if not is_out_of_memory(cause):
                    raise
                raise ResourceError(
                    f"The experts need {total / 1e9:.1f} GB of host memory, which cannot be had. Keep them in a file "
                    "with --tier disk."
                ) from None
        try:
            flat, self._file = _mapped(total)
        except (OSError, RuntimeError) as cause:
            raise ResourceError(
                f"The disk tier needs {total / 1e9:.1f} GB in {tempfile.gettempdir()}: {cause}. "
                "Set TMPDIR to a folder with more room."
            ) from None
        self._file = weakref.finalize(self, self._file)
        return flat.view(rows, self.layout.block_bytes)

    def _pin(self) -> None:
        pointer, size = self.buffer.data_ptr(), self.buffer.numel()
        status = torch.cuda.cudart().cudaHostRegister(pointer, size, 0)  # type: ignore[union-attr]
        if int(status) != 0:
            raise ResourceError(
                f"Could not page-lock {size / 1e9:.1f} GB of host memory (CUDA error {status}). "
                "Raise the locked-memory limit (`ulimit -l`), or deploy with --no-pin."
            )
        self.pinned = True

    def _pack(self, layer: ExpertLayer) -> None:
        views = self.stacked(layer.index)
        for name in layer.weight_names:
            views[name].copy_(getattr(layer.module, name).detach())
        self.take_over(layer)

    def _give_back(self, layers: list[ExpertLayer]) -> None:
        """Let layers that were packed have their weights again, where they lie now."""
        for layer in layers:
            for name, weight in self.stacked(layer.index).items():
                setattr(layer.module, name, nn.Parameter(weight, requires_grad=False))

    def take_over(self, layer: ExpertLayer) -> None:
        """Leave a layer without weights of its own, now that they are here."""
        for name in layer.weight_names:
            empty = torch.empty(0, dtype=getattr(layer.module, name).dtype)
            setattr(layer.module, name, nn.Parameter(empty, requires_grad=False))


def _mapped(total: int) -> tuple[torch.Tensor, Callable[[], None]]:
    """A new file in memory, uint8 [total], and what removes it. Raises OSError, RuntimeError."""
    descriptor, name = tempfile.mkstemp(prefix="expertflow-blocks-")
    try:
        # Room is taken now: a disk that is full later would end the process at a write to memory.
        os.posix_fallocate(descriptor, 0, total)
        flat = torch.from_file(name, shared=True, size=total, dtype=torch.uint8, device="cpu")
    except BaseException:
        os.unlink(name)
        raise
    finally:
        os.close(descriptor)
    return flat, lambda: Path(name).unlink(missing_ok=True)


class SlotArena:
    """Room for `slots` experts on the device, usable as stacked weights by the stock kernels."""

    def __init__(self, layout: BlockLayout, slots: int, device: torch.device) -> None:
        self.layout = layout
        self.slots = slots
        try:
            self.buffer = torch.zeros(slots, layout.block_bytes, dtype=torch.uint8, device=device)
        except (RuntimeError, MemoryError) as cause:
            # CUDA's allocator has an error of its own for this; the CPU's raises a plain RuntimeError.
            raise ResourceError(
                f"{slots} slots need {slots * layout.block_bytes / 1e9:.2f} GB on {device}: "
                f"{str(cause).splitlines()[0]} Tune for a smaller --budget."
            ) from None
        self.weights = layout.views(self.buffer)

    @property
    def num_bytes(self) -> int:
        """Device bytes of all slots."""
        return self.buffer.numel()

    def slot(self, index: int) -> torch.Tensor:
        """The bytes of one slot: uint8 [block_bytes]."""
        return self.buffer[index]

    def part(self, slots: range) -> dict[str, torch.Tensor]:
        """Some consecutive slots as stacked weights {name: [len(slots), *shape]}."""
        return {name: weight[slots.start : slots.stop] for name, weight in self.weights.items()}


class StandIn:
    """Looks like an experts module to the library's kernels, but its weights are the arena.

    Everything that is not a weight (activation, gating, flags) comes from the real module, where it is looked for once:
    modules look for what they lack in many places.
    """

    def __init__(self, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        self._module = module
        self.num_experts = next(iter(weights.values())).shape[0]
        for name, weight in weights.items():
            setattr(self, name, weight)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        setattr(self, name, found)
        return found

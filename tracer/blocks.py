"""Packed expert blocks on the host, and the slot arena on the device.

An expert's tensors lie behind one another in one block, so that a load is one copy. The arena is the
same layout, one row per slot; strided views of it look like the stacked weights the library's kernels
expect, with slot numbers in place of expert numbers. Only bytes here: no policy, no copying, no clock.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .errors import ResourceError
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
    two). `pack` takes a layer's weights and frees the originals, so the model is never held twice.
    """

    def __init__(self, layers: list[ExpertLayer], *, tier: Tier = "ram", pin: bool = False) -> None:
        self.layout = BlockLayout.of(layers[0])
        self.num_layers = len(layers)
        self.num_experts = int(layers[0].module.num_experts)  # type: ignore[arg-type]
        self.tier: Tier = tier
        self.pinned = False
        self._file: Any = None
        self.buffer = self._allocate()
        if pin:
            self._pin()
        for layer in layers:
            self._pack(layer)

    @property
    def num_bytes(self) -> int:
        """Host bytes of all blocks."""
        return self.buffer.numel()

    def block(self, key: ExpertKey) -> torch.Tensor:
        """The packed bytes of one expert: uint8 [block_bytes]."""
        return self.buffer[key.layer * self.num_experts + key.expert]

    def close(self) -> None:
        """Give back page locks and the backing file."""
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr())  # type: ignore[union-attr]
            self.pinned = False
        if self._file is not None:
            self.buffer = torch.empty(0, dtype=torch.uint8)
            Path(self._file.name).unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _allocate(self) -> torch.Tensor:
        rows = self.num_layers * self.num_experts
        total = rows * self.layout.block_bytes
        if self.tier == "ram":
            return torch.empty(rows, self.layout.block_bytes, dtype=torch.uint8)
        try:
            self._file = tempfile.NamedTemporaryFile(prefix="expertflow-blocks-", delete=False)  # noqa: SIM115
            self._file.truncate(total)
            flat = torch.from_file(self._file.name, shared=True, size=total, dtype=torch.uint8)
        except (OSError, RuntimeError) as cause:
            raise ResourceError(
                f"The disk tier needs {total / 1e9:.1f} GB in {tempfile.gettempdir()}: {cause}. "
                "Set TMPDIR to a folder with more room."
            ) from None
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
        rows = slice(layer.index * self.num_experts, (layer.index + 1) * self.num_experts)
        views = self.layout.views(self.buffer[rows])
        for name in layer.weight_names:
            views[name].copy_(getattr(layer.module, name).detach())
            empty = torch.empty(0, dtype=views[name].dtype)
            setattr(layer.module, name, nn.Parameter(empty, requires_grad=False))


class SlotArena:
    """Room for `slots` experts on the device, usable as stacked weights by the stock kernels."""

    def __init__(self, layout: BlockLayout, slots: int, device: torch.device) -> None:
        self.layout = layout
        self.slots = slots
        try:
            self.buffer = torch.zeros(slots, layout.block_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as cause:
            raise ResourceError(
                f"{slots} slots need {slots * layout.block_bytes / 1e9:.2f} GB on {device}: "
                f"{cause}. Tune for a smaller --budget."
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

    Everything that is not a weight (activation, gating, flags) comes from the real module.
    """

    def __init__(self, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        self._module = module
        self.num_experts = next(iter(weights.values())).shape[0]
        for name, weight in weights.items():
            setattr(self, name, weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

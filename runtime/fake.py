"""Fakes for tests: experts that exist in name only, and host memory that cannot be read.

They stand where HostBlocks does, so that all that moves bytes and decides is the real thing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..tracer.blocks import BlockLayout, HostBlocks
from ..tracer.types import ExpertKey, ModelShape

_NUMBER_BYTES = 8


class LabelledBlocks(HostBlocks):
    """Every block holds its own number over and over, so that a slot tells whose weights it has."""

    def __init__(self, shape: ModelShape, *, block_bytes: int = 8 * _NUMBER_BYTES) -> None:
        self.layout = BlockLayout((), block_bytes)
        self.num_layers = shape.num_moe_layers
        self.num_experts = shape.num_experts
        self.tier = "ram"
        self.pinned = False
        self._file = None
        # From 1 on: an empty slot is full of zeros.
        numbers = torch.arange(1, shape.total_experts + 1, dtype=torch.int64)
        width = block_bytes // _NUMBER_BYTES
        self.buffer = numbers[:, None].expand(-1, width).contiguous().view(torch.uint8)

    def holder(self, block: torch.Tensor) -> ExpertKey | None:
        """Whose weights these bytes are; None if they are of several or of nobody."""
        numbers = block.view(torch.int64).unique().tolist()
        if len(numbers) != 1 or not 1 <= numbers[0] <= len(self.buffer):
            return None
        return ExpertKey(*divmod(numbers[0] - 1, self.num_experts))


class FaultyBlocks(HostBlocks):
    """The blocks of another, some of which cannot be read: `fails` is asked each time one is wanted.

    `slot_bytes` pretends that a slot takes so much, to run out of memory.
    """

    def __init__(
        self,
        blocks: HostBlocks,
        fails: Callable[[ExpertKey], bool] = lambda key: False,
        *,
        slot_bytes: int | None = None,
    ) -> None:
        self._fails = fails
        self.layout = blocks.layout
        if slot_bytes is not None:
            self.layout = BlockLayout(blocks.layout.places, slot_bytes)
        self.num_layers = blocks.num_layers
        self.num_experts = blocks.num_experts
        self.tier = blocks.tier
        self.pinned = blocks.pinned
        self._file = None
        self.buffer = blocks.buffer

    def block(self, key: ExpertKey) -> torch.Tensor:
        """The packed bytes of one expert, or bytes that are not there."""
        found = super().block(key)
        return found.to("meta") if self._fails(key) else found

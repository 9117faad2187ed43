"""Bytes and places: host blocks, the slot arena and the copies between them. No policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..simulator.account import CopyRow
from ..simulator.policy.base import Load
from ..simulator.policy.residency import Pool
from ..tracer.blocks import HostBlocks, SlotArena, StandIn
from ..tracer.copies import Copy, copy_engine
from ..tracer.hooks import ExpertLayer
from ..tracer.quantities import LinkSpec
from ..tracer.types import ExpertKey


class ExpertStore:
    """Carries out the core's commands on real memory.

    One arena serves all pools; each layer sees its own pool's slots as stacked weights, so that the
    kernels never walk over slots the layer cannot use.
    """

    def __init__(
        self,
        blocks: HostBlocks,
        slots: int,
        device: torch.device,
        now: Callable[[], float],
        *,
        link: LinkSpec | None = None,
        writes_back: bool = False,
    ) -> None:
        self.blocks = blocks
        self.arena = SlotArena(blocks.layout, slots, device)
        self._engine = copy_engine(device, now, pinned=blocks.pinned, link=link)
        self._flying: dict[ExpertKey, Copy] = {}
        self._rows: list[CopyRow] = []
        # Weights do not change: what comes back is the same, and nobody reads it.
        block = blocks.block(ExpertKey(0, 0))
        self._back = torch.empty_like(block, pin_memory=blocks.pinned) if writes_back else None

    @property
    def pinned(self) -> bool:
        """Whether the host side is page-locked."""
        return self._engine.pinned

    def stand_in(self, layer: ExpertLayer, pool: Pool) -> StandIn:
        """The module the kernels see for a layer: its weights are the pool's slots."""
        return StandIn(layer.module, self.arena.part(pool.slots))

    def submit(self, step: int, loads: Sequence[Load]) -> list[Copy]:
        """Start loads; returns their copies, to wait for. Of loads that cannot be started none is on its way."""
        copies = [
            Copy(
                load.key,
                self.blocks.block(load.key),
                self.arena.slot(load.slot),
                load.why,
                step,
                back=self._back if load.evicts is not None else None,
            )
            for load in loads
        ]
        for copy in copies:
            if copy.why == "prefetch":
                self._flying[copy.key] = copy
        try:
            self._engine.submit(copies)
        except BaseException:
            for copy in copies:
                self._flying.pop(copy.key, None)
                self._engine.abandon(copy)
            raise
        return copies

    def hurry(self, late: Sequence[ExpertKey]) -> list[Copy]:
        """Let prefetches that are late go first; returns their copies, to wait for."""
        flying = [self._flying.pop(key) for key in late]
        for copy in flying:
            self._engine.promote(copy)
        return flying

    def wait(self, copies: Sequence[Copy]) -> bool:
        """Make compute wait for copies. Returns whether there was anything to wait for. Raises ResourceError."""
        if copies:
            self._engine.wait(copies)
        return bool(copies)

    def cancel(self, key: ExpertKey) -> None:
        """Give up a prefetch."""
        self._engine.cancel(self._flying.pop(key))

    def abandon(self, copies: Sequence[Copy], late: Sequence[ExpertKey]) -> set[ExpertKey]:
        """Nobody waits for these copies and late prefetches any more; returns which of them are in their slots."""
        unasked = [self._flying.pop(key) for key in late if key in self._flying]
        return {copy.key for copy in (*copies, *unasked) if self._engine.abandon(copy)}

    def arrived(self) -> list[ExpertKey]:
        """Prefetches that ended since the last call, in order of their end."""
        return self._landed(self._engine.finished())

    def failed(self) -> list[ExpertKey]:
        """Prefetches that failed since the last call."""
        return self._landed(self._engine.failed())

    def _landed(self, copies: Sequence[Copy]) -> list[ExpertKey]:
        keys: list[ExpertKey] = []
        for copy in copies:
            if self._flying.get(copy.key) is copy:
                del self._flying[copy.key]
                keys.append(copy.key)
        return keys

    def rows(self) -> list[CopyRow]:
        """All copies that have ended, with their times (waits for the device on CUDA)."""
        self._collect()
        return self._rows

    def take_rows(self) -> list[CopyRow]:
        """The copies that have ended since the last call; forgets them."""
        rows, self._rows = self.rows(), []
        return rows

    def _collect(self) -> None:
        for copy in self._engine.take_records():
            is_whole = not copy.is_cancelled and copy.error is None
            moved = copy.num_bytes if is_whole else copy.moved
            self._rows.append(
                CopyRow(
                    copy.key,
                    copy.why,
                    copy.step,
                    moved,
                    copy.queued_s,
                    copy.start_s,
                    copy.end_s,
                    copy.needed_s,
                )
            )

    def close(self) -> None:
        """Stop copying and free the arena. The host blocks stay with their owner."""
        self._engine.close()

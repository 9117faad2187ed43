"""One pool of slots for all layers."""

from __future__ import annotations

from typing import ClassVar

from ..base import Share


class Global:
    """Layers compete for slots; the cache alone decides."""

    name: ClassVar[str] = "global"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def divide(self, num_layers: int, num_experts: int, slots: int) -> list[Share]:
        return [Share(tuple(range(num_layers)), min(slots, num_layers * num_experts))]


MEMBER = Global

"""Every layer gets the same number of slots, of its own."""

from __future__ import annotations

from typing import ClassVar

from ..base import Share


class Equal:
    """One pool per layer; earlier layers take the remainder. One pool for all if slots are too few."""

    name: ClassVar[str] = "equal"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def divide(self, num_layers: int, num_experts: int, slots: int) -> list[Share]:
        if slots < num_layers:
            return [Share(tuple(range(num_layers)), slots)]
        each, more = divmod(min(slots, num_layers * num_experts), num_layers)
        return [Share((layer,), each + (layer < more)) for layer in range(num_layers)]


MEMBER = Equal

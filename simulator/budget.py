"""Budgets as people write them: a share of all experts, a number of slots, or bytes."""

from __future__ import annotations

import re

from ..tracer.errors import UsageError
from ..tracer.quantities import parse_bytes
from ..tracer.types import ModelShape

_SLOTS = re.compile(r"^(\d+)\s*slots?$")
_SHARE = re.compile(r"^(\d*\.?\d+)(%?)$")


def parse_budget(text: str, shape: ModelShape) -> int:
    """Slots that a budget pays for, at most one per expert of the model.

    Accepts `0.5` or `50%` (share of all experts), `128slots`, or bytes such as `6GiB`. Raises UsageError.
    """
    text = text.strip()
    if match := _SLOTS.match(text):
        slots = int(match[1])
    elif match := _SHARE.match(text):
        share = float(match[1]) / (100 if match[2] else 1)
        if not 0 < share <= 1:
            raise _wrong(text, "a share lies above 0 and at most at 1; for slots write 128slots")
        slots = max(1, int(share * shape.total_experts + 1e-9))
    else:
        try:
            slots = parse_bytes(text) // shape.expert_bytes
        except UsageError:
            raise _wrong(text, "it is none of the three forms") from None
        if slots < 1:
            raise _wrong(text, f"one expert of this model takes {shape.expert_bytes} bytes")
    if slots < 1:
        raise _wrong(text, "at least one slot is needed")
    return min(slots, shape.total_experts)


def _wrong(text: str, why: str) -> UsageError:
    return UsageError(
        f"Budget {text!r} cannot be used: {why}. Allowed: a share of all experts (0.5), a number of "
        "slots (128slots), or bytes (6GiB)."
    )

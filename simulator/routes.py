"""Routes of tokens as the schedulers of the policy read them, from arrays of experts."""

from __future__ import annotations

import numpy as np

from ..tracer.store import NO_EXPERT
from .policy.base import Route


def routes_of(experts: np.ndarray, num_experts: int) -> list[Route]:
    """One route per token, of experts [tokens, layers, k]; NO_EXPERT is nobody."""
    tokens, layers, _ = experts.shape
    # One place more than there are experts takes those that are nobody's.
    taken = np.zeros((tokens, layers, num_experts + 1), dtype=bool)
    ids = np.where(experts == NO_EXPERT, num_experts, experts).astype(np.int64)
    np.put_along_axis(taken, ids, values=True, axis=2)
    bits = taken[:, :, :num_experts].reshape(tokens, layers * num_experts)
    packed = np.packbits(bits, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]

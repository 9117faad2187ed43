"""Peak device memory of a run, by class, from the sizes of its passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..tracer.types import ModelShape
from .costs import CostModel
from .result import MemoryResult
from .workload import StepDemand, Steps


@dataclass(frozen=True, slots=True, eq=False)
class PassSizes:
    """Sizes of forward passes: [passes] each. `expert_bytes` is what the worst of a pass's events held.

    `kv_beside` counts positions of other batches' KV cache, none if it is None.
    """

    is_decode: np.ndarray
    batch: np.ndarray
    tokens: np.ndarray
    context: np.ndarray
    expert_bytes: np.ndarray
    kv_beside: np.ndarray | None = None

    @classmethod
    def of(cls, walked: Sequence[StepDemand], expert_bytes: Sequence[float]) -> PassSizes:
        """Sizes of single passes."""
        return cls(
            np.asarray([step.phase == "decode" for step in walked], dtype=bool),
            np.asarray([step.batch for step in walked], dtype=np.int64),
            np.asarray([step.tokens for step in walked], dtype=np.int64),
            np.asarray([step.context for step in walked], dtype=np.int64),
            np.asarray(expert_bytes, dtype=np.float64),
            np.asarray([step.kv_beside for step in walked], dtype=np.int64),
        )

    @classmethod
    def of_steps(cls, steps: Steps, expert_bytes: np.ndarray) -> PassSizes:
        """Sizes of a workload's passes."""
        sizes = (steps.is_decode, steps.batch, steps.tokens, steps.context)
        return cls(*sizes, expert_bytes, steps.kv_beside)


def predicted_memory(
    passes: PassSizes, slots: int, shape: ModelShape, costs: CostModel
) -> MemoryResult:
    """Peak device bytes by class: the pass where KV cache and working tensors together are largest."""
    positions = passes.batch * passes.context
    if passes.kv_beside is not None:
        positions = positions + passes.kv_beside
    kv = (shape.kv_bytes_per_token * positions).astype(np.float64)
    activations = np.zeros(len(kv))
    for phase in ("prefill", "decode"):
        is_phase = passes.is_decode == (phase == "decode")
        activations[is_phase] = costs.activations(phase)(
            passes.batch[is_phase],
            passes.tokens[is_phase],
            passes.context[is_phase],
            passes.expert_bytes[is_phase],
        )
    worst = int(np.argmax(kv + activations)) if len(kv) else None
    return MemoryResult(
        non_expert_weights=shape.non_expert_bytes,
        slots=slots * shape.expert_bytes,
        kv_cache=0 if worst is None else round(kv[worst]),
        activations=0 if worst is None else round(activations[worst]),
    )

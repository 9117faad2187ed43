"""How fast a model can be on a declared machine, before any routing is known: best, worst, and hit rates between.

Bounds, not forecasts: they take a declared GPU's and link's own numbers and nothing of launches, decisions or routing.
A trace turns them into a forecast (`simulate`, `tune`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tracer.quantities import LinkSpec
from ..tracer.types import ModelShape, Phase
from .costs import NO_TRAFFIC, CostModel
from .hardware import declared_costs
from .hardware_profiles import DeclaredGpu
from .memory_plan import RunSize

HIT_RATES = (0.5, 0.75, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow:
    """Decoding at one hit rate: tokens per second if no copy is hidden behind compute, and if all are.

    `link_s` is the link's share of one step, `bytes_per_token` what crosses it for each sequence.
    """

    hit_rate: float
    bytes_per_token: float
    link_s: float
    hidden_none_tokens_per_s: float
    hidden_all_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedPlan:
    """Bounds of one size of run on a declared machine.

    `compute_s` is one decode step with every expert resident, 0 if no GPU was named: then rates are those of the link
    alone, and there is no best one (0). `best` needs every demanded expert to be resident and the sequences to agree
    on them; at the `worst` every event misses all of the most experts it can demand, one copy after the other, and no
    copy is hidden. First tokens are those of prompts as long as the context, without any copy and with every expert
    copied. `even_hit_rate` is what the slots would hit if all experts were equally likely.
    """

    gpu: str
    link: str
    copy_s: float
    compute_s: float
    best_tokens_per_s: float
    worst_tokens_per_s: float
    first_token_best_s: float
    first_token_worst_s: float
    even_hit_rate: float
    rows: tuple[SpeedRow, ...]
    notes: tuple[str, ...] = ()


def speed_plan(
    shape: ModelShape, size: RunSize, slots: int, *, gpu: DeclaredGpu | None, link: LinkSpec
) -> SpeedPlan:
    """Bounds for a model with so many slots. Raises UsageError if the shape lacks its experts' size or format."""
    costs, notes = declared_costs(shape, gpu, link) if gpu is not None else (None, ())
    layers, copy_s = shape.num_moe_layers, link.copy_s(shape.expert_bytes)
    most = min(shape.num_experts, size.batch * shape.top_k)
    # What sequences that choose independently of each other, all experts alike, demand together.
    usual = shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** size.batch)
    best_s = _step_s(costs, shape, "decode", size.batch, size, shape.top_k)
    usual_s = _step_s(costs, shape, "decode", size.batch, size, usual)
    worst_s = _step_s(costs, shape, "decode", size.batch, size, most) + layers * most * copy_s
    asked = min(shape.num_experts, size.tokens * shape.top_k)
    first_s = _step_s(costs, shape, "prefill", size.tokens, size, asked)
    return SpeedPlan(
        gpu=gpu.name if gpu is not None else "",
        link=link.text,
        copy_s=copy_s,
        compute_s=usual_s,
        best_tokens_per_s=size.batch / best_s if best_s else 0.0,
        worst_tokens_per_s=size.batch / worst_s,
        first_token_best_s=first_s,
        first_token_worst_s=first_s + layers * asked * copy_s,
        even_hit_rate=min(1.0, slots / shape.total_experts),
        rows=tuple(_row(rate, usual, usual_s, copy_s, shape, size.batch) for rate in HIT_RATES),
        notes=notes,
    )


def _row(
    hit_rate: float,
    distinct: float,
    compute_s: float,
    copy_s: float,
    shape: ModelShape,
    batch: int,
) -> SpeedRow:
    loads = (1 - hit_rate) * distinct * shape.num_moe_layers
    link_s = loads * copy_s
    return SpeedRow(
        hit_rate=hit_rate,
        bytes_per_token=loads * shape.expert_bytes / batch,
        link_s=link_s,
        hidden_none_tokens_per_s=batch / (compute_s + link_s),
        hidden_all_tokens_per_s=batch / max(compute_s, link_s),
    )


def _step_s(
    costs: CostModel | None,
    shape: ModelShape,
    phase: Phase,
    tokens: int,
    size: RunSize,
    distinct: float,
) -> float:
    """Seconds of one pass without any copy; 0 if no GPU was named."""
    if costs is None:
        return 0.0
    known = costs.phase(phase)
    mixer_s = costs.mixer_s(phase, tokens, size.context, NO_TRAFFIC)
    experts_s = known.experts(1, tokens, distinct, *NO_TRAFFIC, 0)
    return shape.num_moe_layers * (mixer_s + experts_s) + costs.head_s(phase, size.batch, tokens)

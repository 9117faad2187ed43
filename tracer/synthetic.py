"""A trace without a model: sticky, skewed routing with declared times.

For trying the tools on a machine without a GPU, and for tests. Every time in it comes from a
declared profile and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .probe import provenance
from .store import Trace
from .synthetic_run import BANDWIDTH_BYTES_PER_S, COPY_LAUNCH_S, VOCAB, Router, Run
from .types import (
    HardwareProfile,
    LinkCurve,
    LinkProfile,
    MemoryPoint,
    ModelShape,
    RunSettings,
)
from .writer import TraceWriter


def synthetic_trace(
    out: Path,
    *,
    layers: int = 4,
    experts: int = 16,
    top_k: int = 2,
    sequences: int = 4,
    prompt_tokens: int = 16,
    new_tokens: int = 16,
    batch_size: int = 2,
    seed: int = 0,
    stickiness: float = 0.4,
    lookahead: int = 1,
    hit: float = 0.8,
    skew: float = 1.0,
    expert_bytes: int = 4 << 20,
    domains: Sequence[str] = ("prose", "code"),
    weights: bool = True,
    stream: bool = False,
    overwrite: bool = False,
) -> Trace:
    """Write a valid trace of a model that does not exist, and open it.

    `stickiness` is the chance that a token keeps one of its predecessor's experts; `skew` spreads
    popularity (0: all alike); `hit` is the chance that a look-ahead id of depth 1 is right, and its
    power at greater depths. Prompts are `prompt_tokens` long at most, left-padded within a batch;
    each sequence gets `new_tokens`: the first from the prefill step, the rest from one decode step
    each. `stream` adds a demand transfer for every distinct expert and the stall it causes.
    """
    rng = np.random.default_rng(seed)
    shape = _shape(layers, experts, top_k, expert_bytes)
    recorded = ["routing", "token_ids", "steps", *(["weights"] if weights else [])]
    recorded += [f"lookahead_{depth}" for depth in range(1, lookahead + 1)]
    recorded += ["transfers"] if stream else []
    writer = TraceWriter(
        Path(out),
        shape=shape,
        hardware=_hardware(shape),
        run=RunSettings(
            batch_size=batch_size,
            max_new_tokens=new_tokens,
            residency="stream" if stream else "resident",
            experts_implementation="none",
            lookahead=lookahead,
            extra={"stickiness": str(stickiness), "hit": str(hit), "skew": str(skew)},
        ),
        provenance=provenance(seed, "imported", notes=("Synthetic routing; no model was run.",)),
        recorded=recorded,
        overwrite=overwrite,
    )
    popularity = rng.normal(scale=skew, size=(len(domains), layers, experts))
    popularity[1:] = 0.5 * popularity[:1] + 0.5 * popularity[1:]
    router = Router(rng, popularity, top_k, stickiness, hit)
    with writer:
        run = Run(writer, shape, router, recorded, stream)
        for batch, first in enumerate(range(0, sequences, batch_size)):
            numbers = np.arange(first, min(first + batch_size, sequences))
            run.batch(batch, numbers, domains, prompt_tokens, new_tokens)
        point = MemoryPoint(
            phase="prefill",
            batch=min(batch_size, sequences),
            tokens=min(batch_size, sequences) * prompt_tokens,
            context=prompt_tokens,
            activation_bytes=batch_size * prompt_tokens * shape.hidden_size * 2 * 8,
        )
        writer.close(memory=[point], warnings=["Synthetic: times are declared, not measured."])
    return Trace.open(writer.out)


def _shape(layers: int, experts: int, top_k: int, expert_bytes: int) -> ModelShape:
    return ModelShape(
        model_id=f"synthetic-{layers}x{experts}-top{top_k}",
        revision=None,
        architecture="Synthetic",
        dtype="bfloat16",
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        top_k=top_k,
        expert_bytes=expert_bytes,
        non_expert_bytes=64 << 20,
        kv_bytes_per_token=layers * 2 * 512 * 2,
        hidden_size=512,
        vocab_size=VOCAB,
    )


def _hardware(shape: ModelShape) -> HardwareProfile:
    sizes = (4096, 65_536, 1 << 20, 16 << 20, 256 << 20)

    def curve(pinned: bool, busy: bool, share: float) -> LinkCurve:
        rate = BANDWIDTH_BYTES_PER_S * share
        points = tuple((size, COPY_LAUNCH_S + size / rate) for size in sizes)
        return LinkCurve(pinned=pinned, busy=busy, points=points)

    curves = (curve(True, False, 1.0), curve(True, True, 0.92), curve(False, False, 0.4))
    return HardwareProfile(
        name="declared 24 GB GPU",
        device="cuda:0",
        device_bytes=24 << 30,
        host_bytes=64 << 30,
        threads=8,
        link=LinkProfile(
            name="declared PCIe 4.0 x16", origin="declared", curves=curves, wake_s=10e-6
        ),
        origin="declared",
    )

"""What-if machines from vendors' numbers: a GPU and a link by name, for routing recorded elsewhere.

A declared machine knows bytes and arithmetic only. What a real one adds (launches, read-back, the policy's
own code, kernels below their peak) is not charged, and the notes say so.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..tracer.errors import UsageError, unknown_name
from ..tracer.probe import provenance
from ..tracer.profile.files import is_profile, link_of
from ..tracer.quantities import LinkSpec, format_bytes
from ..tracer.types import ModelShape, Phase
from .costs import CostModel, Linear, PhaseCosts
from .hardware_profiles import GPUS, LINKS, DeclaredGpu
from .machine import MachineFile
from .moe_table import MoeTable, expert_weights, read_moe_table

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|ms|us|µs)")
_CHUNK_BYTES = 4 * 2**20
_OTHER_BYTES = 2
"""Bytes of one weight outside the experts: quantised models keep those in 16 bits."""


def parse_link(text: str) -> LinkSpec:
    """Read a link: a declared one by name (`pcie4x16`), its numbers (`25GB/s+10us`), or a measured one.

    A measured one is a profile, by file (`profile.json`) or saved name. Raises UsageError, InputError.
    """
    name = text.strip().lower()
    if name in LINKS:
        link = LINKS[name]
        return LinkSpec(name, link.bandwidth_Bps, link.latency_s)
    if is_profile(text):
        return link_of(text)
    try:
        return LinkSpec.parse(text)
    except UsageError:
        unknown = unknown_name("link", text, LINKS)
        raise UsageError(
            f"{unknown} Or write its numbers: BANDWIDTH/s, and after a + the latency of one copy, for "
            "example 25GB/s+10us; or name a profile.json."
        ) from None


def parse_cpu_expert(text: str) -> Linear:
    """Read the declared time of one expert on the CPU, `2ms+0.3ms`: once, and per token. Raises UsageError."""
    parts = [_TIME.fullmatch(part.strip()) for part in text.split("+")]
    if len(parts) > 2 or not all(parts):
        raise UsageError(
            f"Time of an expert on the CPU {text!r} is not understood; write seconds per expert, and after a + "
            "seconds per token that chose it, for example 2ms+0.3ms."
        )
    seconds = [float(part[1]) * _SECONDS[part[2]] for part in parts if part]
    return Linear((seconds[0], seconds[1] if len(seconds) > 1 else 0.0))


def declared_gpu(name: str) -> DeclaredGpu:
    """A GPU by name. Raises UsageError with the nearest one that is known."""
    key = name.strip().lower()
    if key not in GPUS:
        raise unknown_name("GPU", name, GPUS)
    return GPUS[key]


def declared_costs(
    shape: ModelShape, gpu: DeclaredGpu, link: LinkSpec, table: MoeTable | None = None
) -> tuple[CostModel, tuple[str, ...]]:
    """The time model of a declared machine, and notes on what it leaves out.

    Weights cross the device memory at its full bandwidth and arithmetic runs at its full rate, one after the
    other. With a `table`, experts take the times measured there. Raises UsageError if the shape lacks the
    size or the number format of its experts.
    """
    if shape.expert_bytes <= 0:
        raise UsageError(
            f"The size of {shape.model_id}'s experts is not known, so no machine can be declared for it. "
            "Import the routing again with --expert-bytes."
        )
    copy_s = link.copy_s(shape.expert_bytes)
    costs = CostModel(
        prefill=_phase(shape, gpu, table, "prefill"),
        decode=_phase(shape, gpu, table, "decode"),
        expert_bytes=shape.expert_bytes,
        copy_s=copy_s,
        busy_copy_s=copy_s,
        wake_s=0.0,
        chunk_bytes=_CHUNK_BYTES,
        num_experts=shape.num_experts,
        gathered_bytes_per_token=shape.top_k * shape.hidden_size * _OTHER_BYTES,
        kv_move=Linear((0.0, 2 / gpu.memory_Bps)),  # what is copied is read and written
    )
    return costs, _notes(shape, gpu, link, table, costs)


def machine_of(
    shape: ModelShape, gpu_name: str, link_text: str, table_path: Path | str | None = None
) -> MachineFile:
    """A declared machine for `shape`, in the form of a calibrated one.

    `table_path` is a table of measured MoE layers (see moe_table.py). Raises UsageError for unknown names,
    InputError for a table that does not fit.
    """
    gpu, link = declared_gpu(gpu_name), parse_link(link_text)
    table = None
    if table_path is not None:
        table = read_moe_table(table_path, device=gpu.device, shape=shape)
    costs, notes = declared_costs(shape, gpu, link, table)
    return MachineFile(
        costs=costs,
        shape=shape,
        device=f"{gpu.name} (declared)",
        link=link.text,
        link_origin="declared",
        batch_size=1,
        is_declared=True,
        provenance=provenance(0, "imported", notes=notes),
    )


def _phase(shape: ModelShape, gpu: DeclaredGpu, table: MoeTable | None, phase: Phase) -> PhaseCosts:
    head_bytes, mixer_bytes = _read_bytes(shape)
    # In prefill the cache is written once and read from fast memory, so only decode pays for its length.
    kv_bytes = shape.kv_bytes_per_token / shape.num_moe_layers if phase == "decode" else 0.0
    mixer = _weights_s(mixer_bytes / shape.num_moe_layers, gpu)
    head = _weights_s(head_bytes, gpu)
    return PhaseCosts(
        mixer=Linear((mixer[0], mixer[1], kv_bytes / gpu.memory_Bps, 0.0, 0.0)),
        experts=_experts(shape, gpu) if table is None else table.fit(phase),
        # One token per sequence goes through the head, whatever the length of its prompt.
        head=Linear((head[0], head[1], 0.0)),
        decision=Linear((0.0, 0.0, 0.0)),
        readback_s=0.0,
        lookahead=Linear((0.0, 0.0, 0.0)),
    )


def _experts(shape: ModelShape, gpu: DeclaredGpu) -> Linear:
    flops_per_token = shape.top_k * 2 * expert_weights(shape)
    by_distinct = shape.expert_bytes / gpu.memory_Bps
    return Linear((0.0, flops_per_token / gpu.flops, by_distinct, 0.0, 0.0, 0.0))


def _weights_s(num_bytes: float, gpu: DeclaredGpu) -> tuple[float, float]:
    """Seconds to read weights once, and to apply them to one token."""
    return num_bytes / gpu.memory_Bps, 2 * num_bytes / _OTHER_BYTES / gpu.flops


def _read_bytes(shape: ModelShape) -> tuple[float, float]:
    """Bytes outside the experts that one pass reads: in the head, and in all layers together.

    The input embedding is looked up, not read: a table of its size is left out where there is room for two.
    """
    table = min(shape.vocab_size * shape.hidden_size * _OTHER_BYTES, shape.non_expert_bytes)
    rest = shape.non_expert_bytes - table
    return table, rest - table if rest >= table else rest


def _notes(
    shape: ModelShape,
    gpu: DeclaredGpu,
    link: LinkSpec,
    table: MoeTable | None,
    costs: CostModel,
) -> tuple[str, ...]:
    named = LINKS.get(link.text)
    notes = [
        f"Declared machine: {gpu.source} ({format_bytes(gpu.memory_Bps)}/s, {gpu.flops / 1e12:g} TFLOP/s "
        "at 16 bits). Launches, read-back of the routing, decisions, look-ahead and kernels below their "
        "peak are not charged; real speed is lower.",
        link.note or f"Declared link {link.text}: {named.source if named else 'as typed in'}.",
        "Reading weights and arithmetic are added, not overlapped; waves cost no more than one walk.",
    ]
    if not shape.non_expert_bytes:
        notes.append("Weights outside the experts are not known and not charged.")
    if not shape.kv_bytes_per_token:
        notes.append("The size of the KV cache is not known and reading it is not charged.")
    if table is not None:
        notes += table.notes
        notes.append(
            f"Median error of the fit to {table.source}: {costs.decode.experts.residual:.1%} in decode, "
            f"{costs.prefill.experts.residual:.1%} in prefill."
        )
    return tuple(notes)

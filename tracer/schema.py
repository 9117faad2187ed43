"""The trace format, version 1: Arrow schemas, column meanings and the manifest.

This is the only place that knows column names and types. `docs/trace-format.md` is generated
from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from .types import HardwareProfile, MemoryPoint, ModelShape, Provenance, RunSettings

FORMAT = "expertflow.trace/1"
TABLES = ("routing", "steps", "transfers", "sequences")
WHOLE_STEP = -1
"""`layer` of the rows in `steps` that describe the whole forward pass."""


def _field(name: str, kind: pa.DataType, meaning: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"meaning": meaning})


_LABEL = pa.dictionary(pa.int8(), pa.string())


def routing_schema(
    top_k: int, *, weights: bool = False, lookahead: int = 0, scores: int = 0
) -> pa.Schema:
    """One row per (step, layer, token): which experts the router chose.

    `weights` adds the gate weights; `lookahead` adds one column per depth with the experts that
    the gate of layer + depth picks from this layer's hidden state; `scores` adds that many of each
    token's likeliest experts with what the gate gave them.
    """
    ids = pa.list_(pa.uint16(), top_k)
    columns = [
        _field("step", pa.int32(), "forward pass, counted from 0 over the whole run"),
        _field("layer", pa.int16(), "MoE layer, counted from 0 (manifest: shape.moe_layers)"),
        _field("sequence", pa.int32(), "row of the sequences table"),
        _field("position", pa.int32(), "token position in its sequence; -1 for padding"),
        _field("phase", _LABEL, "prefill or decode"),
        _field("token_id", pa.int32(), "the token fed in; -1 if ids were redacted"),
        _field(
            "modality",
            _LABEL,
            "text, image, video, audio, or pad for padding (which loads experts too)",
        ),
        _field("experts", ids, "expert ids in router order, likeliest first"),
    ]
    if weights:
        columns.append(
            _field("weights", pa.list_(pa.float16(), top_k), "gate weights of those experts")
        )
    columns.extend(
        _field(
            f"lookahead_{depth}",
            ids,
            f"experts the gate of layer+{depth} picks from this layer's hidden state; "
            "null past the last layer, and where no gate could be asked early",
            nullable=True,
        )
        for depth in range(1, lookahead + 1)
    )
    if scores:
        columns += [
            _field(
                "score_ids",
                pa.list_(pa.uint16(), scores),
                "likeliest experts of the token: those chosen by score, then the others by score, ties by id",
            ),
            _field(
                "scores",
                pa.list_(pa.float16(), scores),
                "natural log of what the gate gave these experts, up to a constant per token: weights are in "
                "proportion to exp(score)",
            ),
        ]
    return pa.schema(columns)


STEPS = pa.schema(
    [
        _field("step", pa.int32(), "forward pass, counted from 0"),
        _field("layer", pa.int16(), "MoE layer, or -1 for the whole forward pass"),
        _field("phase", _LABEL, "prefill or decode"),
        _field("batch", pa.int16(), "sequences in the batch"),
        _field("tokens", pa.int32(), "tokens fed in, padding included"),
        _field("context", pa.int32(), "longest sequence after this pass, in tokens"),
        _field("distinct", pa.int16(), "distinct experts demanded (0 for the whole pass)"),
        _field("waves", pa.int16(), "rounds the experts ran in (1 unless slots were short)"),
        _field("start_s", pa.float64(), "start on the run's clock"),
        _field("mixer_s", pa.float64(), "attention, norms and router before the experts"),
        _field("readback_s", pa.float64(), "bringing the router's choice to the host"),
        _field("decision_s", pa.float64(), "the policy's own time"),
        _field("lookahead_s", pa.float64(), "computing predictions (gates of later layers)"),
        _field("stall_s", pa.float64(), "compute waiting for expert loads"),
        _field("experts_s", pa.float64(), "expert computation and its launches"),
        _field("total_s", pa.float64(), "the whole row, from start to end"),
    ]
)

TRANSFERS = pa.schema(
    [
        _field("transfer", pa.int64(), "copy, counted from 0"),
        _field("step", pa.int32(), "forward pass that asked for it; -1 before the first"),
        _field("layer", pa.int16(), "MoE layer of the expert"),
        _field("expert", pa.int32(), "expert id"),
        _field("bytes", pa.int64(), "bytes moved"),
        _field("why", _LABEL, "demand, prefetch or warm"),
        _field("stream", _LABEL, "serial resource that carried it"),
        _field("queued_s", pa.float64(), "asked for"),
        _field("start_s", pa.float64(), "copy began"),
        _field("end_s", pa.float64(), "copy ended"),
        _field("needed_s", pa.float64(), "compute wanted it; null if never", nullable=True),
        _field("pinned", pa.bool_(), "host side was page-locked"),
    ]
)

SEQUENCES = pa.schema(
    [
        _field("sequence", pa.int32(), "number, counted from 0"),
        _field("prompt_id", pa.string(), "id given in the prompt file, or its number"),
        _field("domain", pa.string(), "domain label given in the prompt file, or empty"),
        _field("batch", pa.int32(), "batch it ran in"),
        _field("prompt_tokens", pa.int32(), "prompt length"),
        _field("generated_tokens", pa.int32(), "tokens generated"),
        _field("finish", _LABEL, "length, eos, or cut (the run was killed inside it)"),
        _field("ttft_s", pa.float64(), "start of its batch to its first token"),
        _field("prompt_sha256", pa.string(), "hash of the prompt's text"),
        _field("prompt_text", pa.string(), "the prompt; null unless asked for", nullable=True),
        _field(
            "output_ids",
            pa.list_(pa.int32()),
            "generated token ids; null if ids were redacted",
            nullable=True,
        ),
    ]
)


TEMPLATE = _field("template", pa.string(), "label of the prompt's template, or empty")
"""Last column of `sequences` where prompts came with templates (`template` in manifest.recorded)."""


def sequences_schema(*, template: bool = False) -> pa.Schema:
    """One row per prompt. `template` adds the label of its template."""
    return SEQUENCES.append(TEMPLATE) if template else SEQUENCES


def recorded_scores(recorded: Sequence[str]) -> int:
    """How many experts per token have gate scores: 16 if `scores_16` was recorded, 0 if none."""
    found = (name.removeprefix("scores_") for name in recorded if name.startswith("scores_"))
    return next((int(number) for number in found if number.isdigit()), 0)


def table_schemas(shape: ModelShape, recorded: Sequence[str]) -> dict[str, pa.Schema]:
    """Return the schema of every table of one trace, by table name."""
    return {
        "routing": routing_schema(
            shape.top_k,
            weights="weights" in recorded,
            lookahead=sum(name.startswith("lookahead_") for name in recorded),
            scores=recorded_scores(recorded),
        ),
        "steps": STEPS,
        "transfers": TRANSFERS,
        "sequences": sequences_schema(template="template" in recorded),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """One Parquet file of a trace, by its path inside the folder."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`manifest.json`: written last, so its presence means the trace is complete.

    `trace_id` is a hash over the files' hashes and the shape; `recorded` names what later parts
    may rely on (routing, weights, lookahead_1…, scores_M, token_ids, text, template, steps, transfers).
    """

    trace_id: str
    shape: ModelShape
    hardware: HardwareProfile
    run: RunSettings
    provenance: Provenance
    recorded: tuple[str, ...]
    tables: Mapping[str, tuple[FileInfo, ...]]
    memory: tuple[MemoryPoint, ...] = ()
    format: str = FORMAT
    salvaged: bool = False
    warnings: tuple[str, ...] = field(default=())

    def rows(self, table: str) -> int:
        """Rows of one table over all its files."""
        return sum(file.rows for file in self.tables.get(table, ()))

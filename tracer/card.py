"""The README of a trace folder: a Hugging Face dataset card, so that the folder is a data set."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from .schema import Manifest

_ABOUT = {
    "routing": "One row per (step, layer, token): the experts the router chose.",
    "steps": "One row per (step, layer), and one with layer -1 for the whole forward pass.",
    "transfers": "One row per copy of an expert from host to device.",
    "sequences": "One row per prompt.",
}
_ORIGIN = {
    "measured": "measured on this machine",
    "emulated": "emulated: real copies, then waits up to the named link's time",
    "declared": "declared: taken from a profile, not measured",
}


def dataset_card(manifest: Manifest, schemas: Mapping[str, pa.Schema]) -> str:
    """Return the Markdown of the card: YAML that names every table's files, then plain words."""
    tables = [name for name in schemas if manifest.rows(name) or name == "sequences"]
    sections = [f"## {name}\n\n{_ABOUT[name]}\n\n{_columns(schemas[name])}" for name in tables]
    return "\n".join([_yaml(manifest, tables), _summary(manifest), _reading(tables), *sections])


def _yaml(manifest: Manifest, tables: list[str]) -> str:
    lines = ["---", "pretty_name: ExpertFlow routing trace", "tags:", "- mixture-of-experts"]
    lines += ["- expertflow", "configs:"]
    for name in tables:
        files = manifest.tables[name]
        path = files[0].path if name == "sequences" else f"{name}/*.parquet"
        lines += [f"- config_name: {name}", "  data_files:", "  - split: train"]
        lines.append(f'    path: "{path}"')
        if name == "routing":
            lines.append("  default: true")
    return "\n".join([*lines, "---", ""])


def _summary(manifest: Manifest) -> str:
    shape, hardware, run = manifest.shape, manifest.hardware, manifest.run
    lines = [
        f"# Expert routing of {shape.model_id}",
        "",
        f"- Format: `{manifest.format}`, trace id `{manifest.trace_id}`",
        f"- Model: {shape.model_id}"
        + (f" at `{shape.revision}`" if shape.revision else "")
        + f" ({shape.architecture}, {shape.dtype}): {shape.num_moe_layers} MoE layers of "
        f"{shape.num_experts} experts, top {shape.top_k}, {shape.expert_bytes:,} bytes each",
        f"- Device: {hardware.name} (`{hardware.device}`); times are {_ORIGIN[hardware.origin]}",
        f"- Link: {hardware.link.name}; {_ORIGIN[hardware.link.origin]}",
        f"- Run: batch {run.batch_size}, up to {run.max_new_tokens} new tokens, experts "
        f"{run.residency}; text: {manifest.provenance.text}",
        f"- Recorded: {', '.join(manifest.recorded)}",
        f"- Made by `{manifest.provenance.command}` at {manifest.provenance.created}",
    ]
    if manifest.salvaged:
        lines.append("- Salvaged from a run that did not end: see the warnings below")
    lines += [f"- Note: {note}" for note in manifest.provenance.notes]
    lines += [f"- Warning: {warning}" for warning in manifest.warnings]
    return "\n".join([*lines, ""])


def _reading(tables: list[str]) -> str:
    first = tables[0]
    return "\n".join(
        [
            "## Reading it without ExpertFlow",
            "",
            "```python",
            f'datasets.load_dataset("path/of/this/folder", "{first}")',
            f"""duckdb.sql("SELECT layer, count(*) FROM '{first}/*.parquet' GROUP BY layer")""",
            f'polars.read_parquet("{first}/*.parquet")',
            f'pandas.read_parquet("{first}")',
            "```",
            "",
            "`sha256sum -c SHA256SUMS` verifies the files.",
            "",
        ]
    )


def _columns(schema: pa.Schema) -> str:
    lines = ["| Column | Type | Meaning |", "|---|---|---|"]
    for field in schema:
        meaning = (field.metadata or {}).get(b"meaning", b"").decode()
        kind = "string" if pa.types.is_dictionary(field.type) else str(field.type)
        lines.append(f"| {field.name} | {kind} | {meaning} |")
    return "\n".join([*lines, ""])

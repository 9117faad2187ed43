"""Verifying a whole trace: every byte against its hash, every row against its meaning."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .errors import TraceError
from .schema import WHOLE_STEP, FileInfo
from .store import RoutingArrays, Trace, read_part, require_hash, routing_arrays
from .writer import CARD, CHECKSUMS, MANIFEST

_KNOWN_FILES = (MANIFEST, CHECKSUMS, CARD)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What a sound trace holds, and what is odd about it without being wrong."""

    trace_id: str
    files: int
    bytes: int
    rows: Mapping[str, int]
    steps: int
    salvaged: bool
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Counts:
    """Routing rows per (step, layer), gathered part by part; keys are step * layers + layer."""

    layers: int
    rows: dict[int, int]
    sequences: set[int]

    def add(self, routing: RoutingArrays) -> None:
        keys = routing.step.astype(np.int64) * self.layers + routing.layer
        for key, count in zip(*np.unique(keys, return_counts=True), strict=True):
            self.rows[int(key)] = self.rows.get(int(key), 0) + int(count)
        self.sequences.update(np.unique(routing.sequence).tolist())


def check_trace(path: Path | str) -> CheckReport:
    """Verify hashes, Parquet pages, columns, ids, completeness of steps and the sequences.

    Raises TraceError naming the first file that is damaged and what is wrong with it. Notes on a
    sound trace (a salvaged one, files that do not belong) come back as warnings.
    """
    trace = Trace.open(path)
    _check_sums(trace)
    for files in trace.manifest.tables.values():
        for file in files:
            require_hash(trace.path / file.path, file)
    counts = _check_routing(trace)
    steps = _check_whole(trace, counts)
    if trace.manifest.rows("steps"):
        _check_steps(trace, counts, steps)
    _check_transfers(trace)
    _check_sequences(trace, counts)
    strays = _strays(trace)
    manifest = trace.manifest
    return CheckReport(
        trace_id=manifest.trace_id,
        files=sum(len(files) for files in manifest.tables.values()),
        bytes=sum(file.bytes for files in manifest.tables.values() for file in files),
        rows={table: manifest.rows(table) for table in manifest.tables},
        steps=steps,
        salvaged=manifest.salvaged,
        warnings=(*manifest.warnings, *(f"{name} is no part of the trace." for name in strays)),
    )


def _check_sums(trace: Trace) -> None:
    path = trace.path / CHECKSUMS
    files = [file for files in trace.manifest.tables.values() for file in files]
    expected = {f"{file.sha256}  {file.path}" for file in files}
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        raise TraceError(
            f"{path} is missing or unreadable. Restore it from a copy of the trace."
        ) from None
    manifest_sum = hashlib.sha256((trace.path / MANIFEST).read_bytes()).hexdigest()
    expected |= {f"{manifest_sum}  {MANIFEST}", ""}
    if set(lines) != expected:
        raise TraceError(
            f"{path} does not agree with {MANIFEST}: one of the two was changed after the "
            "trace was written. Restore both from a copy."
        )


def _read(trace: Trace, table: str, file: FileInfo) -> pa.Table:
    path = trace.path / file.path
    rows = read_part(path, trace.schemas[table])
    if rows.num_rows != file.rows:
        raise TraceError(f"{path} holds {rows.num_rows} rows instead of {file.rows}.")
    return rows


def _check_routing(trace: Trace) -> _Counts:
    counts = _Counts(trace.shape.num_moe_layers, {}, set())
    for file in trace.manifest.tables["routing"]:
        routing = routing_arrays(_read(trace, "routing", file))
        _check_ids(trace, trace.path / file.path, routing)
        counts.add(routing)
    return counts


def _check_ids(trace: Trace, path: Path, routing: RoutingArrays) -> None:
    shape = trace.shape
    if routing.experts.size and int(routing.experts.max()) >= shape.num_experts:
        raise TraceError(
            f"{path}: expert {int(routing.experts.max())} is named, but the model has experts 0 to "
            f"{shape.num_experts - 1}."
        )
    for depth, ids in routing.lookahead.items():
        predicted = ids[ids[:, 0] != np.iinfo(ids.dtype).max]
        if predicted.size and int(predicted.max()) >= shape.num_experts:
            raise TraceError(f"{path}: lookahead_{depth} names an expert the model does not have.")
    ordered = np.sort(routing.experts, axis=1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    if twice.size:
        raise TraceError(f"{path}: row {int(twice[0])} names one expert twice.")
    if routing.layer.size and not 0 <= routing.layer.min() <= routing.layer.max() < len(
        shape.moe_layers
    ):
        raise TraceError(f"{path}: a layer lies outside 0 to {len(shape.moe_layers) - 1}.")
    if (routing.is_pad != (routing.position < 0)).any():
        raise TraceError(f"{path}: position -1 and modality pad must come together.")


def _check_whole(trace: Trace, counts: _Counts) -> int:
    """Every step from 0 has every MoE layer of one stack, with as many tokens in each. Returns the steps."""
    folder = trace.path / "routing"
    layers = counts.layers
    steps = max(counts.rows, default=-1) // layers + 1
    for step in range(steps):
        tokens = [counts.rows.get(step * layers + layer, 0) for layer in range(layers)]
        stack = next((s for s in trace.shape.stacks if any(tokens[layer] for layer in s)), None)
        wanted = range(layers) if stack is None or sum(tokens) != _total(tokens, stack) else stack
        missing = [layer for layer in wanted if not tokens[layer]]
        if missing or len({tokens[layer] for layer in wanted}) != 1:
            what = f"lacks layer {missing[0]}" if missing else "has layers of different lengths"
            raise TraceError(f"{folder}: step {step} {what}. Record the trace again.")
    return steps


def _total(tokens: Sequence[int], layers: range) -> int:
    return sum(tokens[layer] for layer in layers)


def _check_steps(trace: Trace, counts: _Counts, num_steps: int) -> None:
    folder = trace.path / "steps"
    files = trace.manifest.tables["steps"]
    rows = pa.concat_tables([_read(trace, "steps", file) for file in files])
    step, layer = rows["step"].to_numpy().astype(np.int64), rows["layer"].to_numpy()
    whole = step[layer == WHOLE_STEP]
    if sorted(whole.tolist()) != list(range(num_steps)):
        raise TraceError(
            f"{folder}: the whole-step rows do not match the {num_steps} steps of routing."
        )
    is_layer = layer != WHOLE_STEP
    keys = (step[is_layer] * counts.layers + layer[is_layer]).tolist()
    tokens = rows["tokens"].to_numpy()[is_layer].tolist()
    if len(keys) != len(counts.rows) or dict(zip(keys, tokens, strict=True)) != counts.rows:
        raise TraceError(f"{folder}: its layers and token counts do not match the routing table.")
    is_timed = np.isfinite(rows["total_s"].to_numpy())
    if (is_timed != trace.has_times).any():
        said = "were recorded" if trace.has_times else "were not recorded"
        raise TraceError(f"{folder}: {MANIFEST} says that times {said}, but the rows differ.")


def _check_transfers(trace: Trace) -> None:
    shape = trace.shape
    for file in trace.manifest.tables.get("transfers", ()):
        rows = _read(trace, "transfers", file)
        layer, expert = rows["layer"].to_numpy(), rows["expert"].to_numpy()
        is_known = (layer >= 0) & (layer < shape.num_moe_layers)
        is_known &= (expert >= 0) & (expert < shape.num_experts)
        if not is_known.all():
            path = trace.path / file.path
            raise TraceError(f"{path}: a copy names an expert the model does not have.")


def _check_sequences(trace: Trace, counts: _Counts) -> None:
    for file in trace.manifest.tables["sequences"]:
        ids = _read(trace, "sequences", file)["sequence"].to_pylist()
        path = trace.path / file.path
        if len(set(ids)) != len(ids):
            raise TraceError(f"{path}: a sequence is listed twice.")
        missing = sorted(counts.sequences - set(ids))
        if missing:
            raise TraceError(f"{path}: sequence {missing[0]} of the routing table is not listed.")


def _strays(trace: Trace) -> list[str]:
    listed = {file.path for files in trace.manifest.tables.values() for file in files}
    found: list[str] = []
    for path in sorted(trace.path.rglob("*")):
        name = path.relative_to(trace.path).as_posix()
        if path.is_dir() or name in listed or name in _KNOWN_FILES or "/." in f"/{name}":
            continue
        if path.suffix == ".parquet" and "/" in name and name.split("/")[0] in trace.schemas:
            raise TraceError(
                f"{path} is not listed in {MANIFEST}, yet other readers will load it. Remove it."
            )
        found.append(name)
    return found

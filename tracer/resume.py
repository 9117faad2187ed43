"""Going on with a run that was cut off, so that its trace comes out as if nothing had happened.

Batches do not know of each other: those that were recorded to their end stay, the one that was cut off runs
again from its first token. What the run is made of is written down when it begins; a run that differs in any
of it is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from .errors import UsageError
from .generate import Prompt
from .parts import parquet_bytes
from .prompts import PromptText
from .records import to_json
from .schema import FileInfo, table_schemas
from .store import read_part
from .types import ModelShape, Provenance, RunSettings
from .unfinished import Unfinished, look
from .writer import HEADER, MANIFEST, PARTS, Header, next_number, write_durably

_SAMPLE_ELEMENTS = 1024
_WORDS = {
    "prompts_sha256": "prompts",
    "weights_sha256": "weights of the model",
    "slots": "slots of the stream",
}
_DECIDING_VERSIONS = (
    "python",
    "expertflow-trace",
    "numpy",
    "pyarrow",
    "torch",
    "transformers",
    "safetensors",
)
"""Libraries that may change what is recorded; the others may be upgraded in between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where a run goes on: parts to keep, the batch and step to go on with, and its clock.

    `header` is the one to go on under; `generated` are the tokens of the batches that stay.
    """

    header: Header
    files: dict[str, list[FileInfo]]
    batches: int
    steps: int
    transfers: int
    clock_s: float
    sequences: int
    generated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a run must have in common with the one it goes on from."""

    shape: ModelShape
    run: RunSettings
    recorded: tuple[str, ...]
    provenance: Provenance
    device: str
    machine: str
    threads: int
    link: str


def identity_of(header: Header) -> Identity:
    """What the header of a run says of it."""
    hardware = header.hardware
    return Identity(
        shape=header.shape,
        run=header.run,
        recorded=header.recorded,
        provenance=header.provenance,
        device=hardware.device,
        machine=hardware.name,
        threads=hardware.threads,
        link=hardware.link.name,
    )


def differences(before: Identity, now: Identity) -> list[str]:
    """What differs, in words: `batch_size: 2 before, 3 now`. Empty if the runs are one."""
    pairs: list[tuple[str, Any, Any]] = []
    for name in ("shape", "run"):
        old, new = to_json(getattr(before, name)), to_json(getattr(now, name))
        pairs += [(key, old[key], new[key]) for key in old if key != "extra"]
    extra = before.run.extra, now.run.extra
    names = sorted({*extra[0], *extra[1]})
    pairs += [(_WORDS.get(key, key), extra[0].get(key), extra[1].get(key)) for key in names]
    pairs.append(("recorded", ", ".join(before.recorded), ", ".join(now.recorded)))
    old, new = before.provenance, now.provenance
    pairs += [("seed", old.seed, new.seed), ("text", old.text, new.text)]
    pairs += [
        (f"version of {key}", old.versions.get(key), new.versions.get(key))
        for key in _DECIDING_VERSIONS
    ]
    pairs += [
        (name, getattr(before, name), getattr(now, name))
        for name in ("device", "machine", "threads", "link")
    ]
    return [
        f"{name}: {_short(was)} before, {_short(is_now)} now"
        for name, was, is_now in pairs
        if was != is_now
    ]


def require_same(partial: Path, before: Identity, now: Identity) -> None:
    """Raise UsageError naming what differs."""
    found = differences(before, now)
    if found:
        raise UsageError(
            f"{partial} cannot be gone on with, as this run differs: {'; '.join(found)}. "
            "Repeat the arguments of the run that was cut off, or start anew with --overwrite."
        )


def go_on(partial: Path) -> Resumed:
    """Cut `partial` back to the batches that were recorded to their end.

    Safe to be killed in: the list of parts changes at once, and nothing it names is touched before.
    """
    found = look(partial)
    files = {name: _kept(partial, name, found) for name in found.files}
    lines = [
        json.dumps({"table": table, **to_json(file)}) + "\n"
        for table, listed in files.items()
        for file in listed
    ]
    write_durably(partial / PARTS, "".join(lines).encode())
    (partial / MANIFEST).unlink(missing_ok=True)
    listed = {file.path for each in files.values() for file in each}
    for path in [*partial.glob("*/*.parquet"), *partial.glob("*/*.tmp")]:
        if path.relative_to(partial).as_posix() not in listed:
            path.unlink()
    return _resumed(partial, found, files)


def prompts_sha256(texts: Sequence[PromptText], prompts: Sequence[Prompt]) -> str:
    """Hash of everything about the prompts that reaches the trace or the model."""
    rows = [
        [text.prompt_id, text.domain, text.template, text.sha256, prompt.token_ids, prompt.forced]
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def weights_sha256(model: Any) -> str:
    """Hash of every parameter's name, shape, type and a sample of its values (both ends and the middle).

    It tells one checkpoint from another within a moment; a change of a few single weights it may miss.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().reshape(-1)
        middle = max(0, flat.numel() // 2 - _SAMPLE_ELEMENTS // 2)
        for start in (0, middle, max(0, flat.numel() - _SAMPLE_ELEMENTS)):
            sample = flat[start : start + _SAMPLE_ELEMENTS].contiguous().view(torch.uint8)
            digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def held(partial: Path) -> Iterator[None]:
    """Hold the folder for one process, until it ends however it ends. Raises UsageError if another has it.

    File systems that know no locks are trusted.
    """
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{partial} is being written by a run that is still going. Wait for it, or stop it first."
            ) from None
        except OSError:
            pass
        yield
    finally:
        with suppress(OSError):
            os.close(descriptor)


def has_begun(partial: Path) -> bool:
    """Whether a run got as far as writing down what it is."""
    return (partial / HEADER).is_file()


def _kept(partial: Path, table: str, found: Unfinished) -> list[FileInfo]:
    """The parts of one table that hold nothing beyond the last whole batch; one that does is cut."""
    schema = table_schemas(found.header.shape, found.header.recorded)[table]
    column, limit = (
        ("batch", found.batches) if table == "sequences" else ("step", found.batch_steps)
    )
    kept: list[FileInfo] = []
    for file in found.files[table]:
        marks = read_part(partial / file.path, schema, [column])[column]
        if file.rows == 0 or int(marks.to_numpy().max()) < limit:
            kept.append(file)
            continue
        rows = read_part(partial / file.path, schema, filters=pc.field(column) < limit)
        if rows.num_rows:
            # A number of its own: the part it is cut from stays until the list has changed.
            number = next_number(found.files[table])
            body = parquet_bytes(rows, table, number)
            path = f"{table}/part-{number:05d}.parquet"
            write_durably(partial / path, body)
            digest = hashlib.sha256(body).hexdigest()
            kept.append(FileInfo(path=path, rows=rows.num_rows, bytes=len(body), sha256=digest))
    return kept


def _resumed(partial: Path, found: Unfinished, files: Mapping[str, Sequence[FileInfo]]) -> Resumed:
    schemas = table_schemas(found.header.shape, found.header.recorded)

    def column(table: str, name: str) -> list[Any]:
        return [
            value
            for file in files[table]
            for value in read_part(partial / file.path, schemas[table], [name])[name].to_pylist()
        ]

    starts, totals = column("steps", "start_s"), column("steps", "total_s")
    ends = [start + total for start, total in zip(starts, totals, strict=True)]
    header = found.header
    note = (
        f"Cut off and resumed at step {found.batch_steps} (batch {found.batches}); the pause is not on the "
        "run's clock."
    )
    told = replace(header.provenance, notes=(*header.provenance.notes, note))
    return Resumed(
        header=replace(header, provenance=told),
        files={name: list(listed) for name, listed in files.items()},
        batches=found.batches,
        steps=found.batch_steps,
        transfers=1 + max(column("transfers", "transfer"), default=-1),
        clock_s=max([*ends, *column("transfers", "end_s")], default=0.0),
        sequences=len(column("sequences", "sequence")),
        generated=sum(column("sequences", "generated_tokens")),
    )


def _short(value: Any) -> str:
    text = str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if is_hash else repr(value)

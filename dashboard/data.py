"""What lies in the data folder: found by format, read once per version of a file, never trusted.

Nothing here raises for bad input: whatever cannot be read becomes a `Problem` with its name and
reason, and everything else is still shown. Loaders are cached on (path, size, time of change), so
a file written again is read again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from ..simulator.machine import MACHINE_FORMAT
from ..simulator.policy.spec import POLICY_FORMAT, PolicyFile, read_policy
from ..simulator.result import (
    RESULT_FORMAT,
    TUNING_FORMAT,
    VERDICT_FORMAT,
    Result,
    Tuning,
    Verdict,
)
from ..tracer.errors import InputError, TraceError
from ..tracer.records import from_json, read_json
from ..tracer.schema import FORMAT as TRACE_FORMAT
from ..tracer.schema import TABLES, Manifest, table_schemas
from ..tracer.store import read_manifest, read_part

MAX_DEPTH: Final = 4
MAX_FILES: Final = 2_000
MAX_JSON_BYTES: Final = 64 * 2**20
PHASES: Final = ("prefill", "decode")
ALL: Final = "all"

T = TypeVar("T")
_BAD_INPUT: Final = (
    InputError,
    OSError,
    pa.ArrowException,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    MemoryError,
)


class FileKey(NamedTuple):
    """One version of one file: the key of every cache."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that could not be read: its path inside the data folder, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Found(Generic[T]):
    """A record and where it was found; `name` is the path inside the data folder."""

    name: str
    path: Path
    value: T


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """All that was found in one data folder."""

    root: Path
    traces: tuple[Found[Manifest], ...] = ()
    tunings: tuple[Found[Tuning], ...] = ()
    verdicts: tuple[Found[Verdict], ...] = ()
    results: tuple[Found[Result], ...] = ()
    policies: tuple[Found[PolicyFile], ...] = ()
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One trace and everything that refers to it; `trace` is missing when only results are here."""

    name: str
    trace_id: str
    trace: Found[Manifest] | None
    tunings: tuple[Found[Tuning], ...]
    verdicts: tuple[Found[Verdict], ...]
    results: tuple[Found[Result], ...]
    policies: tuple[Found[PolicyFile], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSummary:
    """What ran: how many sequences and tokens, of which domains."""

    sequences: int
    prompt_tokens: int
    generated_tokens: int
    domains: tuple[str, ...]
    domain_of: np.ndarray = field(repr=False)
    """Index into `domains` by sequence number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSummary:
    """Choices of the router, counted by phase, domain, layer and expert."""

    domains: tuple[str, ...]
    counts: np.ndarray = field(repr=False)
    padding_rows: int
    rows: int

    def select(self, phase: str, domain: str) -> np.ndarray:
        """Counts by layer and expert of one phase and domain, or of all."""
        phases = slice(None) if phase == ALL else [PHASES.index(phase)]
        domains = slice(None) if domain == ALL else [self.domains.index(domain)]
        return self.counts[phases][:, domains].sum(axis=(0, 1))

    def phases(self) -> tuple[str, ...]:
        """The phases that have rows."""
        return tuple(p for i, p in enumerate(PHASES) if self.counts[i].any())


def data_root(argv: Sequence[str] | None = None) -> Path:
    """The folder to show: `--data DIR`, else EXPERTFLOW_DATA, else the repository's traces."""
    words = list(sys.argv[1:] if argv is None else argv)
    for index, word in enumerate(words):
        if word.startswith("--data="):
            return Path(word.removeprefix("--data="))
        if word == "--data" and index + 1 < len(words):
            return Path(words[index + 1])
    if folder := os.environ.get("EXPERTFLOW_DATA"):
        return Path(folder)
    shipped = Path(__file__).resolve().parents[1] / "traces"
    return shipped if shipped.is_dir() else Path("traces")


def discover(root: Path) -> Catalog:
    """Search a folder for traces, results, tunings, verdicts and policies."""
    if not root.is_dir():
        return Catalog(root=root, problems=(Problem(str(root), "this folder does not exist."),))
    found: dict[str, list[Found[Any]]] = {kind: [] for kind in _KINDS}
    problems: list[Problem] = []
    for path in _json_files(root, problems):
        name = path.relative_to(root).as_posix()
        try:
            kind, value = _load(_key(path))
            if kind:
                is_trace = kind == TRACE_FORMAT
                where, shown = (path.parent, _folder_name(root, path)) if is_trace else (path, name)
                found[kind].append(Found(shown, where, value))
                if is_trace:
                    problems += _file_problems(shown, path.parent, value)
        except _BAD_INPUT as error:
            problems.append(Problem(name, _reason(error, path, root)))
    return Catalog(
        root=root,
        traces=tuple(found[TRACE_FORMAT]),
        tunings=tuple(found[TUNING_FORMAT]),
        verdicts=tuple(found[VERDICT_FORMAT]),
        results=tuple(found[RESULT_FORMAT]),
        policies=tuple(found[POLICY_FORMAT]),
        problems=tuple(problems),
    )


def subjects(catalog: Catalog) -> tuple[Subject, ...]:
    """Group what was found by trace; results of a trace that is not here are a subject too."""
    ids = [trace.value.trace_id for trace in catalog.traces]
    ids += [tuning.value.trace_id for tuning in catalog.tunings]
    ids += [verdict_trace(verdict.value) for verdict in catalog.verdicts]
    ids += [result.value.trace_id for result in catalog.results]
    out: list[Subject] = []
    for trace_id in dict.fromkeys(filter(None, ids)):
        same = [t for t in catalog.traces if t.value.trace_id == trace_id]
        # Two copies of one trace are two entries: they may differ in what is still readable.
        out += [_subject(catalog, trace_id, trace) for trace in same or [None]]
    return tuple(out)


def verdict_trace(verdict: Verdict) -> str:
    """The trace a verdict's forecasts were made from."""
    return verdict.runs[0].predicted.trace_id if verdict.runs else ""


def sequence_summary(trace: Found[Manifest]) -> SequenceSummary | Problem:
    """Totals over the sequences of a trace, or what kept them from being read."""
    try:
        return _sequences(_trace_key(trace))
    except _BAD_INPUT as error:
        return Problem(f"{trace.name}: sequences", _reason(error, trace.path, trace.path))


def routing_summary(trace: Found[Manifest]) -> RoutingSummary | Problem:
    """The router's choices of a trace, counted, or what kept them from being read."""
    try:
        return _routing(_trace_key(trace))
    except _BAD_INPUT as error:
        return Problem(f"{trace.name}: routing", _reason(error, trace.path, trace.path))


_KINDS: Final[Mapping[str, type[Any]]] = {
    TRACE_FORMAT: Manifest,
    RESULT_FORMAT: Result,
    VERDICT_FORMAT: Verdict,
    TUNING_FORMAT: Tuning,
    POLICY_FORMAT: PolicyFile,
}


_NOT_SHOWN: Final = frozenset(
    {
        MACHINE_FORMAT,
        "expertflow.check/1",
        "expertflow.curve/1",
        "expertflow.doctor/1",
        "expertflow.import/1",
        "expertflow.info/1",
        "expertflow.members/1",
        "expertflow.run/1",
        "expertflow.sweep/1",
    }
)
"""Ours and sound, but no page has a use for them."""


@lru_cache(maxsize=256)
def _load(key: FileKey) -> tuple[str, Any]:
    """The format of a JSON file and its record; no format for files that are none of ours."""
    if key.size > MAX_JSON_BYTES:
        raise InputError(f"{key.size} bytes; files above {MAX_JSON_BYTES} bytes are not read.")
    path = Path(key.path)
    raw = read_json(path)
    kind = raw.get("format") if isinstance(raw, Mapping) else None
    if not isinstance(kind, str):
        if path.name == "manifest.json" and (path.parent / "routing").is_dir():
            raise TraceError(f'no "format" field; a trace says "{TRACE_FORMAT}".')
        return "", None
    if kind in _NOT_SHOWN:
        return "", None
    if kind not in _KINDS:
        if kind.startswith("expertflow."):
            raise InputError(f"unknown format {kind!r}; known: {', '.join(_KINDS)}.")
        return "", None
    if kind == TRACE_FORMAT:
        return kind, read_manifest(path.parent)
    if kind == POLICY_FORMAT:
        return kind, read_policy(path)
    return kind, from_json(_KINDS[kind], raw)


@lru_cache(maxsize=16)
def _sequences(key: FileKey) -> SequenceSummary:
    folder, manifest = _manifest(key)
    columns = ["sequence", "domain", "prompt_tokens", "generated_tokens"]
    parts = list(_tables(folder, manifest, "sequences", columns))
    if not parts:
        raise TraceError("the manifest lists no sequences file.")
    table = pa.concat_tables(parts)
    names = [name or "" for name in table.column("domain").to_pylist()]
    domains = tuple(sorted(set(names)))
    numbers = table.column("sequence").to_numpy()
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < 10_000_000:
        raise TraceError("sequence numbers are out of range.")
    domain_of = np.full(int(numbers.max()) + 1 if numbers.size else 0, -1, dtype=np.int64)
    domain_of[numbers] = [domains.index(name) for name in names]
    return SequenceSummary(
        sequences=table.num_rows,
        prompt_tokens=int(table.column("prompt_tokens").to_numpy().sum()),
        generated_tokens=int(table.column("generated_tokens").to_numpy().sum()),
        domains=domains,
        domain_of=domain_of,
    )


@lru_cache(maxsize=8)
def _routing(key: FileKey) -> RoutingSummary:
    folder, manifest = _manifest(key)
    shape = manifest.shape
    try:
        sequences = _sequences(key)
        domains, domain_of = sequences.domains or ("",), sequences.domain_of
    except _BAD_INPUT:  # Without its sequences a trace still has a heatmap, of one domain.
        domains, domain_of = ("",), np.zeros(0, dtype=np.int64)
    counts = np.zeros(
        (len(PHASES), len(domains), shape.num_moe_layers, shape.num_experts), dtype=np.int64
    )
    padding = rows = 0
    columns = ["layer", "sequence", "position", "phase", "experts"]
    for table in _tables(folder, manifest, "routing", columns):
        for start in range(0, table.num_rows, 200_000):
            _count(table.slice(start, 200_000), domain_of, counts)
        padding += int((table.column("position").to_numpy() < 0).sum())
        rows += table.num_rows
    if not rows:
        raise TraceError("the routing table is empty.")
    counts.flags.writeable = False
    return RoutingSummary(domains=domains, counts=counts, padding_rows=padding, rows=rows)


def _count(table: pa.Table, domain_of: np.ndarray, counts: np.ndarray) -> None:
    """Add the choices of some routing rows to `counts`."""
    shape = counts.shape
    chunk = table.combine_chunks()
    experts = chunk.column("experts").combine_chunks().flatten().to_numpy()
    if not table.num_rows or experts.size % table.num_rows:
        raise TraceError("routing rows do not all have the same number of experts.")
    phase = _phase_codes(chunk.column("phase"))
    layer = chunk.column("layer").to_numpy().astype(np.int64)
    sequence = chunk.column("sequence").to_numpy().astype(np.int64)
    if layer.min() < 0 or layer.max() >= shape[2] or int(experts.max()) >= shape[3]:
        raise TraceError(
            f"routing names layer {layer.max()} or expert {experts.max()}, "
            f"but the model has {shape[2]} layers of {shape[3]} experts."
        )
    known = (sequence >= 0) & (sequence < len(domain_of))
    domain = np.zeros_like(sequence)
    domain[known] = np.maximum(domain_of[sequence[known]], 0)
    row = (phase * shape[1] + domain) * shape[2] + layer
    flat = np.repeat(row, experts.size // table.num_rows) * shape[3] + experts.astype(np.int64)
    counts += np.bincount(flat, minlength=counts.size).reshape(shape)


def _phase_codes(column: pa.ChunkedArray) -> np.ndarray:
    pieces = [np.empty(0, dtype=np.int64)]
    for chunk in column.chunks:
        names = chunk.dictionary.to_pylist()
        if strange := sorted(set(names) - set(PHASES)):
            raise TraceError(f"routing has a phase {strange[0]!r}; known: {', '.join(PHASES)}.")
        codes = np.array([PHASES.index(name) for name in names], dtype=np.int64)
        pieces.append(codes[chunk.indices.to_numpy()])
    return np.concatenate(pieces)


def _tables(folder: Path, manifest: Manifest, table: str, columns: list[str]) -> Iterator[pa.Table]:
    """A table's files one by one, so that memory is bounded by the largest."""
    schema = table_schemas(manifest.shape, manifest.recorded)[table]
    for file in manifest.tables.get(table, ()):
        yield read_part(folder / file.path, schema, columns)


def _manifest(key: FileKey) -> tuple[Path, Manifest]:
    return Path(key.path).parent, _load(key)[1]


def _trace_key(trace: Found[Manifest]) -> FileKey:
    return _key(trace.path / "manifest.json")


def _key(path: Path) -> FileKey:
    stat = path.stat()
    return FileKey(str(path), stat.st_size, stat.st_mtime_ns)


def _json_files(root: Path, problems: list[Problem]) -> Iterator[Path]:
    """JSON files in a stable order, bounded in depth and number; no hidden or partial ones."""
    seen = 0
    for folder, folders, files in os.walk(root):
        depth = len(Path(folder).relative_to(root).parts)
        skip = depth >= MAX_DEPTH
        folders[:] = [] if skip else sorted(f for f in folders if not _is_passed_over(f))
        if "routing" in folders and "manifest.json" not in files:
            name = _folder_name(root, Path(folder) / "manifest.json")
            problems.append(Problem(name, "no manifest.json: the recording did not finish."))
        for file in sorted(files):
            if file.endswith(".json") and not _is_passed_over(file):
                seen += 1
                if seen > MAX_FILES:
                    reason = f"more than {MAX_FILES} JSON files; the rest was not looked at."
                    problems.append(Problem(str(root), reason))
                    return
                yield Path(folder) / file


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name.endswith(".partial")


def _file_problems(name: str, folder: Path, manifest: Manifest) -> list[Problem]:
    """Files of a trace that are gone, or of another size than the manifest says (no hashing)."""
    out: list[Problem] = []
    for file in (f for table in TABLES for f in manifest.tables.get(table, ())):
        path = folder / file.path
        if not path.is_file():
            out.append(Problem(f"{name}/{file.path}", "listed in the manifest, but not there."))
        elif (got := path.stat().st_size) != file.bytes:
            reason = f"{got} bytes, but the manifest says {file.bytes}: truncated or changed."
            out.append(Problem(f"{name}/{file.path}", reason))
    return out


def _subject(catalog: Catalog, trace_id: str, trace: Found[Manifest] | None) -> Subject:
    tunings = tuple(t for t in catalog.tunings if t.value.trace_id == trace_id)
    hashes = {r.policy_hash for t in tunings for r in t.value.candidates}
    names = {trace_id, trace.name if trace else trace_id}
    return Subject(
        name=trace.name if trace else f"{trace_id[:12]} (trace not here)",
        trace_id=trace_id,
        trace=trace,
        tunings=tunings,
        verdicts=tuple(v for v in catalog.verdicts if verdict_trace(v.value) == trace_id),
        results=tuple(r for r in catalog.results if r.value.trace_id == trace_id),
        policies=tuple(
            p
            for p in catalog.policies
            if p.value.trace in names or p.value.behaviour_hash in hashes
        ),
    )


def _folder_name(root: Path, manifest: Path) -> str:
    name = manifest.parent.relative_to(root).as_posix()
    return root.resolve().name if name == "." else name


def _reason(error: BaseException, path: Path, root: Path) -> str:
    """The message of an error without the machine's paths; the name beside it gives the place."""
    if isinstance(error, KeyError):
        return f"{error} is missing."
    text = _first_line(error)
    for prefix in (f"{path}: ", f"{path} ", f"{root}/"):
        text = text.replace(prefix, "")
    return text


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__

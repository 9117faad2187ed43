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
import pyarrow.parquet as pq

from ..simulator.machine import MACHINE_FORMAT, MachineFile
from ..simulator.policy.spec import POLICY_FORMAT, PolicyFile, read_policy
from ..simulator.result import (
    RESULT_FORMAT,
    TUNING_FORMAT,
    VERDICT_FORMAT,
    Result,
    Tuning,
    Verdict,
)
from ..simulator.sweep_folder import DOCUMENT, PARTS, RESULTS, SWEEP_FORMAT, SweepFile
from ..simulator.sweep_row import SCHEMA
from ..tracer.errors import InputError, TraceError
from ..tracer.live import LIVE_FORMAT, LiveStatus
from ..tracer.live import SUFFIX as LIVE_SUFFIX
from ..tracer.records import from_json, read_json
from ..tracer.schema import FORMAT as TRACE_FORMAT
from ..tracer.schema import TABLES, Manifest, table_schemas
from ..tracer.store import read_manifest, read_part

MAX_DEPTH: Final = 4
MAX_FILES: Final = 2_000
MAX_JSON_BYTES: Final = 64 * 2**20
MAX_LIVE_BYTES: Final = 2**20
ALL: Final = "all"

T = TypeVar("T")
BAD_INPUT: Final = (
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
    machines: tuple[Found[MachineFile], ...] = ()
    sweeps: tuple[Found[SweepFile], ...] = ()
    lives: tuple[Found[LiveStatus], ...] = ()
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
            kind, value = _load(file_key(path))
            if kind:
                is_folder = kind in _FOLDERS
                where, shown = (
                    (path.parent, _folder_name(root, path)) if is_folder else (path, name)
                )
                found[kind].append(Found(shown, where, value))
                if kind == TRACE_FORMAT:
                    problems += _file_problems(shown, path.parent, value)
        except BAD_INPUT as error:
            problems.append(Problem(name, reason_of(error, path, root)))
    return _catalog(root, found, problems)


def discover_file(path: Path) -> Catalog:
    """A catalog of one file, or what kept it from being read."""
    root = path.parent
    found: dict[str, list[Found[Any]]] = {kind: [] for kind in _KINDS}
    problems: list[Problem] = []
    try:
        kind, value = _load(file_key(path))
        if kind:
            found[kind].append(Found(path.name, root if kind in _FOLDERS else path, value))
        else:
            problems.append(
                Problem(path.name, "it is not a file of this toolkit that can be shown.")
            )
    except BAD_INPUT as error:
        problems.append(Problem(path.name, reason_of(error, path, root)))
    return _catalog(root, found, problems)


def _catalog(
    root: Path, found: Mapping[str, list[Found[Any]]], problems: Sequence[Problem]
) -> Catalog:
    return Catalog(
        root=root,
        traces=tuple(found[TRACE_FORMAT]),
        tunings=tuple(found[TUNING_FORMAT]),
        verdicts=tuple(found[VERDICT_FORMAT]),
        results=tuple(found[RESULT_FORMAT]),
        policies=tuple(found[POLICY_FORMAT]),
        machines=tuple(found[MACHINE_FORMAT]),
        sweeps=tuple(found[SWEEP_FORMAT]),
        lives=tuple(found[LIVE_FORMAT]),
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
        return read_sequences(trace_key(trace))
    except BAD_INPUT as error:
        return Problem(f"{trace.name}: sequences", reason_of(error, trace.path, trace.path))


def live_runs(catalog: Catalog) -> list[Found[LiveStatus]]:
    """What commands say of themselves now: files that were found before, and those that have come since.

    They change every second, so no cache keeps them. What cannot be read at this moment is left out.
    """
    known = [one.path for one in catalog.lives]
    come = [p for p in _json_files(catalog.root, []) if p.name.endswith(LIVE_SUFFIX)]
    found: list[Found[LiveStatus]] = []
    for path in dict.fromkeys([*known, *come]):
        try:
            if path.stat().st_size <= MAX_LIVE_BYTES:
                value = from_json(LiveStatus, read_json(path))
                found.append(Found(path.relative_to(catalog.root).as_posix(), path, value))
        except BAD_INPUT:
            continue
    return found


def sweep_table(sweep: Found[SweepFile]) -> pa.Table | Problem:
    """The rows of a sweep, finished or not, or what kept them from being read."""
    try:
        return _sweep_rows(
            file_key(sweep.path / DOCUMENT), tuple(map(file_key, _row_files(sweep.path)))
        )
    except BAD_INPUT as error:
        return Problem(f"{sweep.name}: rows", reason_of(error, sweep.path, sweep.path))


_KINDS: Final[Mapping[str, type[Any]]] = {
    TRACE_FORMAT: Manifest,
    RESULT_FORMAT: Result,
    VERDICT_FORMAT: Verdict,
    TUNING_FORMAT: Tuning,
    POLICY_FORMAT: PolicyFile,
    MACHINE_FORMAT: MachineFile,
    SWEEP_FORMAT: SweepFile,
    LIVE_FORMAT: LiveStatus,
}
_FOLDERS: Final = frozenset({TRACE_FORMAT, SWEEP_FORMAT})
"""Formats of which the folder is the thing, and the JSON in it tells what it is."""


_NOT_SHOWN: Final = frozenset(
    {
        "expertflow.baselines/1",
        "expertflow.check/1",
        "expertflow.curve/1",
        "expertflow.doctor/1",
        "expertflow.export/1",
        "expertflow.flags/1",
        "expertflow.gpu-bench/1",
        "expertflow.import/1",
        "expertflow.info/1",
        "expertflow.members/1",
        "expertflow.profile/1",
        "expertflow.profiles/1",
        "expertflow.merge/1",
        "expertflow.plan/1",
        "expertflow.report/1",
        "expertflow.run/1",
        "expertflow.run_plan/1",
        "expertflow.sample/1",
        "expertflow.split/1",
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
def read_sequences(key: FileKey) -> SequenceSummary:
    """Totals over the sequences of a trace. Raises one of BAD_INPUT."""
    folder, manifest = manifest_of(key)
    columns = ["sequence", "domain", "prompt_tokens", "generated_tokens"]
    parts = list(tables_of(folder, manifest, "sequences", columns))
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
def _sweep_rows(document: FileKey, files: tuple[FileKey, ...]) -> pa.Table:
    if not files:
        raise InputError(f"there is neither {RESULTS} nor a part of it beside {DOCUMENT}.")
    tables = [pq.ParquetFile(file.path).read() for file in files]
    if any(table.schema.names != SCHEMA.names for table in tables):
        raise InputError("its columns are not those of a sweep.")
    return pa.concat_tables(tables)


def _row_files(folder: Path) -> list[Path]:
    whole = folder / RESULTS
    return [whole] if whole.is_file() else sorted((folder / PARTS).glob("part-*.parquet"))


def tables_of(
    folder: Path, manifest: Manifest, table: str, columns: list[str]
) -> Iterator[pa.Table]:
    """A table's files one by one, so that memory is bounded by the largest."""
    schema = table_schemas(manifest.shape, manifest.recorded)[table]
    for file in manifest.tables.get(table, ()):
        yield read_part(folder / file.path, schema, columns)


def manifest_of(key: FileKey) -> tuple[Path, Manifest]:
    """The folder and the manifest of a trace."""
    return Path(key.path).parent, _load(key)[1]


def trace_key(trace: Found[Manifest]) -> FileKey:
    """What caches of a trace hang on: its manifest, which is written last."""
    return file_key(trace.path / "manifest.json")


def file_key(path: Path) -> FileKey:
    """The version of a file as it lies there now."""
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


def reason_of(error: BaseException, path: Path, root: Path) -> str:
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

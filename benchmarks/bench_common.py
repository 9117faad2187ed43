"""What the benchmarks of the simulator share: data, machines, times, bars, tables, and the page they fill.

Imported by the scripts beside it, which run from a checkout: `python benchmarks/oracle.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

if find_spec("expertflow") is None:  # from a checkout, not installed
    sys.path.append(str(Path(__file__).resolve().parent.parent / ".typing"))

from expertflow.simulator.workload import Rows, Steps, Workload
from expertflow.tracer.probe import installed_version, machine_name
from expertflow.tracer.types import ModelShape

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
PAGE = ROOT / "docs" / "simulator-speed.md"
_LIBRARIES = ("numpy", "numba", "simpy", "libcachesim")


@dataclass(frozen=True, slots=True)
class Source:
    """Published routing: where it lies, the experts per layer, and the axis that counts tokens."""

    name: str
    file: str
    num_experts: int
    token_axis: int = 0

    @property
    def path(self) -> Path:
        """The file, never copied."""
        return DATA / self.file

    def ids(self) -> np.ndarray:
        """Expert ids: [tokens, layers, top_k]."""
        with np.load(self.path, allow_pickle=False) as archive:
            ids = archive["expert_ids"]
        return np.ascontiguousarray(ids.swapaxes(0, self.token_axis))


GPT_OSS = Source("gpt-oss-20b decode", "gpt-oss-20b-decode/routing.npz", 32)
TRACES = (
    GPT_OSS,
    *(
        Source(f"DeepSeek-V2-Lite {task}", f"deepseek-v2-lite-prefill/{task}.npz", 64, 1)
        for task in ("intent", "law", "summary")
    ),
)


@dataclass(frozen=True, slots=True)
class Bar:
    """A promise and what was found. `is_judged` is false in --quick, where sizes are too small to judge."""

    what: str
    found: float
    limit: float
    is_least: bool
    unit: str
    is_judged: bool = True

    @property
    def is_met(self) -> bool:
        """Whether the promise holds."""
        return self.found >= self.limit if self.is_least else self.found <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.is_least else "≤"
        verdict = "met" if self.is_met else "MISSED"
        if not self.is_judged:
            verdict = f"{verdict}, but not judged with --quick"
        return f"{self.what}: {self.found:,.2f} {self.unit} (bar {sign} {self.limit:g}): {verdict}"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a title, as they stand in the terminal and in the page."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        """The table as Markdown, numbers to the right."""
        lines = [" | ".join(self.head)]
        lines.append(" | ".join("---" if place == 0 else "---:" for place in range(len(self.head))))
        lines += [" | ".join(str(cell) for cell in row) for row in self.rows]
        return f"{self.title}\n\n" + "\n".join(f"| {line} |" for line in lines)


class Report:
    """What a script found: notes, tables and bars, printed for people or as JSON."""

    def __init__(self, script: str, options: argparse.Namespace) -> None:
        self._script, self._options = script, options
        self._tables: list[Table] = []
        self._notes: list[str] = []
        self._bars: list[Bar] = []
        self._numbers: dict[str, Any] = {}

    def table(self, table: Table) -> None:
        """Add a table."""
        self._tables.append(table)

    def note(self, text: str) -> None:
        """Add a sentence."""
        self._notes.append(text)

    def bar(
        self,
        what: str,
        found: float,
        limit: float,
        unit: str,
        *,
        at_least: bool,
        always: bool = False,
    ) -> None:
        """Add a promise. With --quick it is shown and not judged, unless it holds at any size (`always`)."""
        is_judged = always or not self._options.quick
        self._bars.append(Bar(what, found, limit, at_least, unit, is_judged))

    def numbers(self, name: str, value: Any) -> None:
        """Add what only the JSON shows."""
        self._numbers[name] = value

    def finish(self) -> None:
        """Print everything, fill the page if asked to, and exit 1 if a bar is missed."""
        if self._options.json:
            document = {
                "benchmark": self._script,
                "machine": hardware(),
                "quick": self._options.quick,
                "bars": [asdict(bar) | {"is_met": bar.is_met} for bar in self._bars],
                "notes": self._notes,
                "tables": [asdict(table) for table in self._tables],
                **self._numbers,
            }
            print(json.dumps(document, indent=2, ensure_ascii=False))
        else:
            print(self.text())
        if self._options.write:
            write_block(PAGE, self._script, self.text())
        missed = [bar for bar in self._bars if bar.is_judged and not bar.is_met]
        for bar in missed:
            print(f"error: {bar}", file=sys.stderr)
        sys.exit(1 if missed else 0)

    def text(self) -> str:
        """Everything as Markdown."""
        size = " Sizes of --quick: a smoke test, not a measurement." if self._options.quick else ""
        parts = [f"Measured on {hardware()}.{size}"]
        parts += [table.markdown() for table in self._tables]
        parts += self._notes
        parts.append("\n".join(f"- {bar}" for bar in self._bars))
        return "\n\n".join(part for part in parts if part)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every script has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--quick", action="store_true", help="small sizes; times are not judged")
    made.add_argument("--write", action="store_true", help=f"fill in its part of {PAGE.name}")
    return made


def options_of(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, and refuse to put a smoke test's numbers on the page."""
    options = made.parse_args()
    if options.quick and options.write:
        made.error("--write needs a full run, not --quick.")
    return options


def skip(why: str) -> None:
    """End without a finding and without a failure."""
    print(f"skipped: {why}")
    sys.exit(0)


def present(sources: Sequence[Source]) -> list[Source]:
    """The sources whose files are there; the others are named on stderr."""
    for source in sources:
        if not source.path.exists():
            print(f"skipped: {source.name}: {source.path} is absent", file=sys.stderr)
    return [source for source in sources if source.path.exists()]


def hardware() -> str:
    """The machine and the libraries that make the numbers."""
    versions = {name: installed_version(name) for name in _LIBRARIES}
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{machine_name()}; Python {platform.python_version()}, {known}"


def cpu_s(work: Callable[[], object], repeats: int = 3) -> float:
    """CPU seconds of this process: the median of `repeats`, after one run that compiles and warms."""
    work()
    seconds: list[float] = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def write_block(page: Path, script: str, text: str) -> None:
    """Put `text` between the marks of `script` in a page. Raises SystemExit if it has none."""
    first, last = f"<!-- generated by benchmarks/{script} -->", f"<!-- end of {script} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(first)
    _, closed, after = rest.partition(last)
    if not found or not closed:
        raise SystemExit(f"{page} has no part marked {first} … {last}.")
    page.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8")


def plain(record: Any) -> dict[str, Any]:
    """A record for JSON."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


# --- workloads -----------------------------------------------------------------------------------


def shape_of(num_layers: int, num_experts: int, top_k: int, expert_bytes: int = 1) -> ModelShape:
    """A shape of which only the counts and the size of an expert matter."""
    return ModelShape(
        model_id=f"{num_layers}x{num_experts}-top{top_k}",
        revision=None,
        architecture="Benchmark",
        dtype="bfloat16",
        num_layers=num_layers,
        moe_layers=tuple(range(num_layers)),
        num_experts=num_experts,
        top_k=top_k,
        expert_bytes=expert_bytes,
        non_expert_bytes=0,
        kv_bytes_per_token=0,
        hidden_size=2048,
        vocab_size=50_304,
    )


def events_of(ids: np.ndarray, num_experts: int, ahead: np.ndarray | None = None) -> Workload:
    """One decode step per token, one event per layer: what the toolkit replays.

    `ids`, and `ahead` (look-ahead ids of the next layer), are [tokens, layers, top_k].
    """
    tokens, layers, top_k = ids.shape
    events = tokens * layers
    rows = Rows(
        experts=ids.reshape(events, top_k).astype(np.uint16),
        sequence=np.zeros(events, np.int32),
        lookahead={} if ahead is None else {1: ahead.reshape(events, top_k)},
    )
    return _workload(
        rows,
        np.tile(np.arange(layers, dtype=np.int16), tokens),
        np.arange(events + 1) * top_k,
        np.sort(ids, axis=2).reshape(-1).astype(np.int32),
        steps=tokens,
        num_layers=layers,
        num_experts=num_experts,
        lookahead=int(ahead is not None),
    )


def accesses_of(ids: np.ndarray, num_experts: int) -> Workload:
    """Every access an event of its own, in order of the file: what caches of blocks and pages see."""
    tokens, layers, top_k = ids.shape
    accesses = ids.size
    return _workload(
        Rows(experts=np.zeros((0, top_k), np.uint16), sequence=np.zeros(0, np.int32)),
        np.tile(np.repeat(np.arange(layers, dtype=np.int16), top_k), tokens),
        np.arange(accesses + 1),
        ids.reshape(-1).astype(np.int32),
        steps=tokens,
        num_layers=layers,
        num_experts=num_experts,
        lookahead=0,
    )


def _workload(
    rows: Rows,
    layer: np.ndarray,
    ptr: np.ndarray,
    experts: np.ndarray,
    *,
    steps: int,
    num_layers: int,
    num_experts: int,
    lookahead: int,
) -> Workload:
    one, events = np.ones(steps, np.int64), len(layer)
    row_ptr = np.arange(events + 1) if len(rows.sequence) else np.zeros(events + 1, np.int64)
    return Workload(
        steps=Steps(
            number=np.arange(steps),
            is_decode=np.ones(steps, bool),
            batch=one,
            tokens=one,
            context=one,
            member_ptr=np.arange(steps + 1),
            members=np.zeros(steps, np.int64),
        ),
        event_ptr=np.arange(steps + 1) * (events // steps),
        layer=layer,
        ptr=ptr,
        experts=experts,
        counts=np.ones(len(experts), np.int32),
        weights=None,
        row_ptr=row_ptr,
        rows=rows,
        prompt_tokens={},
        batch_size=1,
        num_layers=num_layers,
        num_experts=num_experts,
        lookahead=lookahead,
    )

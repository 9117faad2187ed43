"""400 configurations over gpt-oss-20b's published decode routing, on a declared GPU behind a declared link.

    python benchmarks/sweep_gpt_oss.py [--quick] [--json] [--write] [--keep FOLDER]

The routing is imported into a temporary folder, then `expertflow-trace sweep` runs in a child process with two
workers: wall time (bar 360 s) and peak memory of its process tree (bar 4 GB, shared pages counted once). Afterwards
the same folder gets the bounds and the baselines that are not in the grid, and the script prints what the numbers
say: policies by budget, and a finding in two sentences.

Times are predictions for declared hardware: order and ratios are what counts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import bench_common as common
from bench_common import GPT_OSS, ROOT, Report, Table
from expertflow.simulator.judge import Judge, Opening
from expertflow.simulator.result import Bounds
from expertflow.simulator.sweep_folder import RESULTS
from expertflow.simulator.sweep_row import Row, rows_of

WALL_BAR_S, MEMORY_BAR_GB, POINTS = 360.0, 4.0, 400
GPU, LINK, WORKERS = "rtx4090", "pcie4x16", 2
MODEL = (
    "--model", "gpt-oss-20b", "--experts", "32", "--expert-bytes", "13.2MB", "--non-expert-bytes", "2.6GB",
    "--hidden-size", "2880", "--dtype", "mxfp4", "--domain", "dataset",
)  # fmt: skip
BUDGETS = ("0.125", "0.1875", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875")
CACHES = (
    "arc", "fifo", "least_stale", "lfru", "lfu", "lru", "multi_factor", "sieve", "slru", "static",
)  # fmt: skip
ALLOCATIONS = ("adapmoe", "equal", "global", "marginal_gain", "predicted_demand")
BASELINES = ("none", "two_level_lru")
"""Caches of the table that would make the grid larger than it is to be; with equal slots per layer."""
SHOWN = ("0.125", "0.25", "0.5", "0.75")
"""Budgets of the table on the page; all are in the JSON."""
QUICK_TOKENS, QUICK_BUDGETS, QUICK_CACHES = 3_000, ("0.25", "0.5"), ("lru", "static", "arc")
_SAMPLE_S = 0.25


@dataclass(frozen=True, slots=True)
class Line:
    """One policy at one budget, under the allocation that serves it best, beside the bounds of that budget."""

    budget: str
    slots: int
    cache: str
    allocation: str
    hit_rate: float
    bytes_per_token: float
    tokens_per_s: float
    share_of_belady_hits: float
    share_of_belady_speed: float
    share_of_link_bound: float


def main() -> None:
    """Sweep, measure and say what was found."""
    made = common.parser(__doc__)
    made.add_argument(
        "--keep", type=Path, help="folder for trace and sweep; default: a temporary one"
    )
    options = common.options_of(made)
    if not common.present([GPT_OSS]):
        common.skip("no routing to replay")
    if find_spec("numba") is None:
        common.skip("the compiled engine needs numba (pip install 'expertflow-trace[fast]')")
    report = Report("sweep_gpt_oss.py", options)
    budgets = QUICK_BUDGETS if options.quick else BUDGETS
    caches = QUICK_CACHES if options.quick else CACHES
    allocations = ALLOCATIONS[:2] if options.quick else ALLOCATIONS
    kept = None if options.keep is None else nullcontext(options.keep)
    with kept or tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        trace = _imported(folder, options.quick)
        points = _swept(report, folder, trace, budgets, caches, allocations)
        if not options.quick and points != POINTS:
            raise SystemExit(f"the grid has {points} points, not {POINTS}")
        _sweep(folder, trace, "bounds", _space(budgets, BASELINES, ("equal",), bounds=True))
        rows = _rows(folder)
        bounds = _bounds(trace, rows, budgets)
    lines = [line for budget in budgets for line in _lines(rows, budget, bounds[budget])]
    report.numbers("lines", [common.plain(line) for line in lines])
    report.numbers("bounds", {budget: common.plain(found) for budget, found in bounds.items()})
    report.table(_bounds_table(rows, budgets, bounds))
    report.table(_table([line for line in lines if line.budget in SHOWN]))
    alone = " and ".join(BASELINES)
    report.note(
        f"Every cache is shown under the best of {', '.join(allocations)}; {alone} were tried with equal slots only. "
        "Policies learn from every other sequence and are judged on the others, at batch 1."
    )
    report.note(_finding(lines, bounds))
    report.finish()


# --- sweeping ------------------------------------------------------------------------------------


def _imported(folder: Path, quick: bool) -> Path:
    trace = folder / "trace"
    limit = ("--limit-tokens", str(QUICK_TOKENS)) if quick else ()
    _run("import", str(GPT_OSS.path), "--out", str(trace), "--overwrite", *MODEL, *limit)
    return trace


def _swept(
    report: Report,
    folder: Path,
    trace: Path,
    budgets: Sequence[str],
    caches: Sequence[str],
    allocations: Sequence[str],
) -> int:
    """Sweep the grid, watched; returns its points."""
    space = _space(budgets, caches, allocations, bounds=False)
    began = time.perf_counter()
    peak_bytes, is_shared_once = _sweep(folder, trace, "grid", space, "--fresh")
    wall_s = time.perf_counter() - began
    rows = _rows(folder)
    failed = [row for row in rows if row.error]
    if failed:
        raise SystemExit(f"{len(failed)} points failed; the first: {failed[0].error}")
    slow = sorted(rows, key=lambda row: -row.seconds)[:3]
    slowest = "; ".join(f"{row.label} {row.seconds:.1f} s" for row in slow)
    seconds = statistics.median(row.seconds for row in rows)
    what = "PSS" if is_shared_once else "RSS, shared pages counted in every process"
    report.note(
        f"{len(rows)} configurations ({len(caches)} caches × {len(allocations)} allocations × {len(budgets)} budgets), "
        f"{WORKERS} workers: {wall_s:.0f} s from the command to its end, {peak_bytes / 1e9:.2f} GB ({what}). Median "
        f"point {seconds:.2f} s, slowest: {slowest}."
    )
    report.numbers("sweep", {"points": len(rows), "wall_s": wall_s, "peak_bytes": peak_bytes})
    report.bar(f"sweep of {len(rows)} configurations", wall_s, WALL_BAR_S, "s", at_least=False)
    report.bar("peak memory of the sweep", peak_bytes / 1e9, MEMORY_BAR_GB, "GB", at_least=False)
    return len(rows)


def _space(
    budgets: Sequence[str], caches: Sequence[str], allocations: Sequence[str], *, bounds: bool
) -> str:
    lines = [
        f"budgets = {[float(budget) for budget in budgets]}",
        f"caches = {json.dumps(caches)}",
        f"allocations = {json.dumps(allocations)}",
        'predictors = ["none"]',
        'misses = ["load"]',
        'schedulers = ["fcfs"]',
        f"bounds = {json.dumps(bounds)}",
    ]
    return "\n".join(["[space]", *lines, "[search]", 'method = "grid"', ""])


def _sweep(folder: Path, trace: Path, name: str, space: str, *more: str) -> tuple[int, bool]:
    """Run the command; returns its peak memory, and whether shared pages were counted once."""
    path = folder / f"{name}.toml"
    path.write_text(space, encoding="utf-8")
    out = ("--out", str(folder / "sweep"), "--space", str(path))
    machine = ("--gpu", GPU, "--link", LINK, "--workers", str(WORKERS))
    return _run("sweep", str(trace), *out, *machine, *more)


def _run(*arguments: str) -> tuple[int, bool]:
    """One command of the toolkit in a child process, its memory watched."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "expertflow.tracer", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT / ".typing")},
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        watch = _Watch(child.pid)
        code = child.wait()
        watch.stop()
        said.seek(0)
        if code:
            raise SystemExit(f"{arguments[0]} ended with {code}: {said.read()[-2000:]}")
    return watch.peak_bytes, watch.is_shared_once


class _Watch:
    """Samples the memory of a process and all its descendants until stopped."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes, self.is_shared_once = 0, True
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End sampling."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.is_set():
            self.peak_bytes = max(self.peak_bytes, sum(map(self._bytes, _tree(self._pid))))
            self._ended.wait(_SAMPLE_S)

    def _bytes(self, pid: int) -> int:
        """Memory of a process; of pages it shares, its part (PSS)."""
        found = _kilobytes(pid, "smaps_rollup", "Pss:")
        if found is None and (found := _kilobytes(pid, "status", "VmRSS:")) is not None:
            self.is_shared_once = False
        return 1024 * (found or 0)


def _kilobytes(pid: int, file: str, field: str) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text(encoding="ascii").splitlines()
    except OSError:  # it has ended, or the kernel does not say
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), None)


def _tree(root: int) -> list[int]:
    """A process and its descendants."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        # The name, in brackets, may hold anything; the parent is the second field after it.
        parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(
            int(path.parent.name)
        )
    found = [root]
    for pid in found:
        found += parents.get(pid, [])
    return found


def _rows(folder: Path) -> list[Row]:
    import pyarrow.parquet as pq

    return rows_of(pq.ParquetFile(folder / "sweep" / RESULTS).read())


# --- what it says --------------------------------------------------------------------------------


def _bounds(trace: Path, rows: Sequence[Row], budgets: Sequence[str]) -> dict[str, Bounds]:
    """Bounds of each budget: Belady's cache in one pool, which beats it in any other division."""
    judge = Opening(trace=trace, gpu=GPU).judge()
    return {budget: _bound(judge, rows, budget) for budget in budgets}


def _bound(judge: Judge, rows: Sequence[Row], budget: str) -> Bounds:
    (row,) = (r for r in rows if float(r.budget) == float(budget) and _is_bound(r))
    spec = judge.spec(row.point)
    return judge.forecaster.predict(spec).bounds


def _is_bound(row: Row) -> bool:
    return (row.cache, row.allocation, row.predictor) == ("belady", "global", "none")


def _lines(rows: Sequence[Row], budget: str, bounds: Bounds) -> list[Line]:
    """The best of each cache that can be deployed, quickest first."""
    best: dict[str, Row] = {}
    for row in rows:
        if float(row.budget) != float(budget) or row.is_bound:
            continue
        if row.cache not in best or _speed(row) > _speed(best[row.cache]):
            best[row.cache] = row
    return [_line(row, budget, bounds) for row in sorted(best.values(), key=lambda r: -_speed(r))]


def _line(row: Row, budget: str, bounds: Bounds) -> Line:
    hit_rate = row.decode_hit_rate or 0.0
    return Line(
        budget=budget,
        slots=row.slots,
        cache=row.cache,
        allocation=row.allocation,
        hit_rate=hit_rate,
        bytes_per_token=row.bytes_per_token or 0.0,
        tokens_per_s=_speed(row),
        share_of_belady_hits=hit_rate / bounds.belady_hit_rate,
        share_of_belady_speed=_speed(row) / bounds.belady_tokens_per_s,
        share_of_link_bound=_speed(row) / bounds.link_tokens_per_s,
    )


def _speed(row: Row) -> float:
    return row.tokens_per_s or 0.0


def _bounds_table(rows: Sequence[Row], budgets: Sequence[str], bounds: dict[str, Bounds]) -> Table:
    lines: list[tuple[str, ...]] = []
    for budget in budgets:
        (row,) = (r for r in rows if float(r.budget) == float(budget) and _is_bound(r))
        found = bounds[budget]
        lines.append(
            (
                f"{float(budget):.2%} ({row.slots})",
                f"{found.belady_hit_rate:.1%}",
                f"{(row.bytes_per_token or 0.0) / 1e6:.0f}",
                f"{found.belady_tokens_per_s:.1f}",
                f"{found.link_tokens_per_s:.1f}",
                f"{found.all_resident_tokens_per_s:.0f}",
            )
        )
    head = (
        "budget (slots)", "Belady hits", "Belady MB/token", "Belady tokens/s", "link bound tokens/s",
        "all resident tokens/s",
    )  # fmt: skip
    title = (
        "What nobody can beat without prefetch: Belady's cache in one pool; its copies alone, fully overlapped (link "
        f"bound). Declared {GPU}, link {LINK}."
    )
    return Table(title, head, lines)


def _table(lines: Sequence[Line]) -> Table:
    rows = [
        (
            f"{float(line.budget):.1%} ({line.slots})",
            line.cache,
            line.allocation,
            f"{line.hit_rate:.1%}",
            f"{line.bytes_per_token / 1e6:.0f}",
            f"{line.tokens_per_s:.1f}",
            f"{line.share_of_belady_hits:.0%}",
            f"{line.share_of_belady_speed:.0%}",
            f"{line.share_of_link_bound:.0%}",
        )
        for line in lines
    ]
    head = (
        "budget (slots)", "cache", "best allocation", "hits", "MB/token", "tokens/s", "of Belady's hits",
        "of Belady's speed", "of the link bound",
    )  # fmt: skip
    return Table("Caches under the allocation that serves each best, quickest first.", head, rows)


def _finding(lines: Sequence[Line], bounds: dict[str, Bounds]) -> str:
    """Two sentences, every number and name in them from the rows."""
    winners: list[Line] = []
    behind: dict[str, list[float]] = {"lru": [], "static": []}
    closed: list[float] = []
    for budget, bound in bounds.items():
        here = {line.cache: line for line in lines if line.budget == budget}
        best = max(here.values(), key=lambda line: line.tokens_per_s)
        winners.append(best)
        for name, gaps in behind.items():
            gaps.append(1 - here[name].tokens_per_s / best.tokens_per_s)
        gap = bound.belady_tokens_per_s - here["lru"].tokens_per_s
        closed.append((best.tokens_per_s - here["lru"].tokens_per_s) / gap if gap > 0 else 0.0)
    wins: dict[str, list[str]] = {}
    for line in winners:
        wins.setdefault(f"{line.cache} ({line.allocation})", []).append(f"{float(line.budget):.4g}")
    named = ", ".join(f"{name} at {' '.join(where)}" for name, where in wins.items())
    shares = [line.share_of_belady_hits for line in winners]
    speeds = [line.share_of_belady_speed for line in winners]
    links = [line.share_of_link_bound for line in winners]
    return (
        f"Finding. Of the policies that can be deployed the quickest by share of experts in slots is {named}, and "
        f"under their own best allocations LRU is {_span(behind['lru'])} slower and static placement "
        f"{_span(behind['static'])}. The best gets {_span(shares)} of the hits of Belady's cache, {_span(speeds)} of "
        f"its speed and {_span(links)} of the link bound, and goes {_span(closed)} of the way from LRU to Belady."
    )


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0%}", f"{max(values):.0%}"
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()

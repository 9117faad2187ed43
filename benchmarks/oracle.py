"""Hit counts of the compiled engine against libCacheSim's, an independent implementation, on real routing.

    pip install libcachesim          # GPL-3.0: by hand, for this script and its test only
    python benchmarks/oracle.py [--quick] [--json] [--write]

libCacheSim sees single accesses, so each access is an event of its own here: what is compared is who is evicted.
FIFO, LRU, LFU (counts since admission, ties evict the least recently used) and Belady with forced admission, which
is `belady_forced`; one pool for all layers, and one per layer.

`belady_forced` starts with the experts that are demanded first in its slots, libCacheSim starts empty. Until as many
different experts as there are slots have been demanded neither evicts anything, and then both hold the same ones: the
two differ by exactly one miss for each of them, which is taken off.

Events, whose experts hit or miss together and age together, are compared for LRU: with a reference of a few lines, and
with libCacheSim on a trace that says the same in single accesses (`as_accesses`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
from bench_common import (
    TRACES,
    Report,
    Source,
    Table,
    accesses_of,
    events_of,
    options_of,
    parser,
    present,
    shape_of,
    skip,
)
from expertflow.simulator import engines
from expertflow.simulator.costs import free_machine
from expertflow.simulator.curves import global_curve
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.workload import Workload

POLICIES = {"fifo": "FIFO", "lru": "LRU", "lfu": "LFU", "belady_forced": "Belady"}
"""Our caches and what libCacheSim calls them."""
SHARES = {
    "global": (0.125, 0.25, 0.375, 0.5, 0.625, 0.75),
    "layer": (0.0625, 0.125, 0.25, 0.375, 0.5, 0.75),
}
"""Slots as shares of all experts. Below an eighth one token's experts already fill a global pool."""
QUICK_ACCESSES = 50_000
_RUNNER = Path(__file__).resolve().parent / "libcachesim_runner.py"
_RECORD = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])
_TIMEOUT_S = 1800


@dataclass(frozen=True, slots=True)
class Cell:
    """One comparison: hits of ours and of libCacheSim."""

    trace: str
    pool: str
    policy: str
    slots: int
    accesses: int
    ours: int
    theirs: int

    @property
    def is_equal(self) -> bool:
        """Whether both counted the same hits."""
        return self.ours == self.theirs


def main() -> None:
    """Compare everything and print what was found."""
    options = options_of(parser(__doc__))
    if find_spec("libcachesim") is None:
        skip("libcachesim is not installed (pip install libcachesim)")
    sources = present(TRACES)
    if not sources:
        skip("no routing to replay")
    limit = QUICK_ACCESSES if options.quick else None
    cells: list[Cell] = []
    atomic: list[Cell] = []
    for source in sources:
        ids = prefix(source.ids(), limit)
        cells += compare(source, ids)
        atomic += compare_events(source, ids)
    report = Report("oracle.py", options)
    report.table(_summary("Single accesses", cells))
    report.table(_summary("Whole events under LRU, one pool", atomic))
    everything = [*cells, *atomic]
    equal = sum(cell.is_equal for cell in everything)
    for cell in everything:
        if not cell.is_equal:
            report.note(f"UNEQUAL: {cell}")
    report.numbers("cells", [asdict(cell) for cell in everything])
    what = f"hit counts equal to libCacheSim's, of {len(everything)}"
    report.bar(what, equal, len(everything), "counts", at_least=True, always=True)
    report.finish()


def prefix(ids: np.ndarray, accesses: int | None) -> np.ndarray:
    """The first tokens of a trace: at most so many accesses."""
    return ids if accesses is None else ids[: max(1, accesses // (ids.shape[1] * ids.shape[2]))]


def compare(source: Source, ids: np.ndarray) -> list[Cell]:
    """Single accesses: every policy at every size, for one pool and for a pool per layer."""
    workload = accesses_of(ids, source.num_experts)
    found: list[Cell] = []
    for scope, shares in SHARES.items():
        wanted = [
            (policy, slots)
            for policy in POLICIES
            for slots in sizes(shares, scope, workload.num_layers, source.num_experts)
        ]
        theirs = libcachesim_hits(pools_of(workload, scope), wanted)
        for (policy, slots), hits in zip(wanted, theirs, strict=True):
            ours = our_hits(workload, policy, slots, scope)
            found.append(Cell(source.name, scope, policy, slots, ids.size, ours, hits))
    return found


def compare_events(source: Source, ids: np.ndarray) -> list[Cell]:
    """Whole events under LRU: the engine, the one-pass curve and libCacheSim on the same events."""
    workload = events_of(ids, source.num_experts)
    slots = sizes(SHARES["global"], "global", workload.num_layers, source.num_experts)
    curve = global_curve(workload)
    theirs = libcachesim_hits([as_accesses(workload)], [("lru", size) for size in slots])
    cells: list[Cell] = []
    for size, hits in zip(slots, theirs, strict=True):
        ours = our_hits(workload, "lru", size, "global")
        atomic = hits - ids.size  # the second access of each expert always hits
        by_curve = int(curve[size])
        cells.append(Cell(source.name, "global", "engine", size, ids.size, ours, atomic))
        cells.append(Cell(source.name, "global", "one-pass", size, ids.size, by_curve, atomic))
    return cells


def sizes(shares: Sequence[float], scope: str, num_layers: int, num_experts: int) -> list[int]:
    """Slots in all: the same number in each layer if each has a pool of its own."""
    if scope == "layer":
        return [max(1, round(share * num_experts)) * num_layers for share in shares]
    return [max(1, round(share * num_experts * num_layers)) for share in shares]


def our_hits(workload: Workload, policy: str, slots: int, scope: str) -> int:
    """Hits of the compiled engine that starts empty."""
    shape = shape_of(workload.num_layers, workload.num_experts, 1)
    allocation = "equal" if scope == "layer" else "global"
    spec = make_spec(slots=slots, cache=policy, allocation=allocation)
    totals, engine = engines.run(workload, spec, shape, free_machine(shape))
    if engine != "compiled":
        raise SystemExit("this compares the compiled engine: pip install numba")
    hits = int(totals.steps.hits.sum())
    return hits - warmed(workload, slots, scope) if policy == "belady_forced" else hits


def warmed(workload: Workload, slots: int, scope: str) -> int:
    """Experts that a clairvoyant cache holds before the first event."""
    pools = pools_of(workload, scope)
    return sum(min(slots // len(pools), len(np.unique(keys))) for keys in pools)


def pools_of(workload: Workload, scope: str) -> list[np.ndarray]:
    """What each pool is asked for, in order."""
    keys = workload.keys()
    if scope == "global":
        return [keys]
    layer = np.repeat(workload.layer, np.diff(workload.ptr))
    return [keys[layer == number] for number in range(workload.num_layers)]


# --- events --------------------------------------------------------------------------------------


def direct_lru(events: Sequence[Sequence[int]], slots: int) -> int:
    """Hits of an event-atomic LRU, written as one would do it by hand; events fit the slots.

    Experts that are there when an event begins hit. Afterwards the event's experts are the most recent, in order of
    their numbers, and the least recent make room.
    """
    recent, hits = [], 0
    for event in events:
        hits += sum(expert in recent for expert in event)
        recent = [expert for expert in recent if expert not in event] + sorted(event)
        recent = recent[-slots:]
    return hits


def as_accesses(workload: Workload) -> np.ndarray:
    """Single accesses whose sequential LRU hits are the event-atomic ones, and one more hit for each demand.

    An LRU holds the most recent experts, so an event that asks for its most recent first asks for all that are there
    before the first that is not: no miss can push out one that should have hit. Asking for all once more, by
    number, leaves them in the order in which events leave theirs.
    """
    keys, ptr = workload.keys(), workload.ptr
    event = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
    order = np.argsort(keys, kind="stable")
    before = np.full(len(keys), -1)
    again = keys[order[1:]] == keys[order[:-1]]
    before[order[1:][again]] = event[order[:-1][again]]
    by_recency = np.lexsort((-keys, -before, event))
    doubled = np.concatenate((keys[by_recency], keys))
    return doubled[np.argsort(np.concatenate((event, event)), kind="stable")]


# --- libCacheSim ---------------------------------------------------------------------------------


def libcachesim_hits(pools: Sequence[np.ndarray], wanted: Sequence[tuple[str, int]]) -> list[int]:
    """Hits of libCacheSim, summed over pools that share the slots evenly: one number per (policy, slots)."""
    jobs = [(POLICIES[policy], slots // len(pools)) for policy, slots in wanted]
    by_pool = libcachesim(pools, jobs)
    return [sum(int(answers[place]["hits"]) for answers in by_pool) for place in range(len(wanted))]


def libcachesim(
    pools: Sequence[np.ndarray], jobs: Sequence[tuple[str, int]]
) -> list[list[dict[str, float]]]:
    """What libCacheSim, in a child process, says of each pool's accesses to each job (policy, slots)."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        lines: list[str] = []
        for number, keys in enumerate(pools):
            path = str(Path(folder) / f"{number}.oracleGeneral.bin")
            records(keys).tofile(path)
            for policy, slots in jobs:
                lines.append(json.dumps({"path": path, "policy": policy, "slots": slots}))
        done = subprocess.run(
            [sys.executable, str(_RUNNER)],
            input="\n".join(lines),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(answers) != len(lines):
        raise RuntimeError(f"libCacheSim ended with {done.returncode}: {done.stderr[-500:]}")
    return [answers[first : first + len(jobs)] for first in range(0, len(answers), len(jobs))]


def records(keys: np.ndarray) -> np.ndarray:
    """Accesses in libCacheSim's oracleGeneral format; `next` is what its Belady looks at."""
    found = np.zeros(len(keys), _RECORD)
    found["time"] = np.arange(len(keys)) // 1000
    found["object"], found["size"] = keys, 1
    order = np.argsort(keys, kind="stable")
    again = keys[order[1:]] == keys[order[:-1]]
    found["next"] = -1
    found["next"][order[:-1][again]] = order[1:][again]
    return found


def _summary(title: str, cells: Sequence[Cell]) -> Table:
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.trace, cell.pool), []).append(cell)
    policies = list(dict.fromkeys(cell.policy for cell in cells))
    rows: list[tuple[object, ...]] = []
    for (trace, pool), group in groups.items():
        rates = [_range([cell for cell in group if cell.policy == name]) for name in policies]
        slots = sorted({cell.slots for cell in group})
        equal = sum(cell.is_equal for cell in group)
        what = (trace, pool, f"{group[0].accesses:,}", ", ".join(map(str, slots)))
        rows.append((*what, *rates, f"{equal} of {len(group)}"))
    head = ("trace", "pool", "accesses", "slots", *(f"{name} hits" for name in policies), "equal")
    return Table(f"{title}: hit rates from the smallest size to the largest.", head, rows)


def _range(cells: Sequence[Cell]) -> str:
    return f"{cells[0].ours / cells[0].accesses:.1%} – {cells[-1].ours / cells[-1].accesses:.1%}"


if __name__ == "__main__":
    main()

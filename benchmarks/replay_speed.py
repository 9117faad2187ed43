"""How fast the compiled engine replays: curves, one capacity, time with prefetch, and how cost grows.

    python benchmarks/replay_speed.py [--only curve,single,timed,growth] [--quick] [--json] [--write]

curve   LRU hits at every capacity in one pass; bar 25 M accesses/s on one core.
single  LRU at one capacity on the same accesses as libCacheSim (pip install libcachesim); bar 5 times its speed.
timed   times, link and prefetch at 16 layers, top-8 of 64; bar 6 s per million tokens, and 25 times the reference
        engine on a prefix, on which both must give the same floats.
growth  four sizes each of tokens and of layers; bar ±25 % around cost in proportion.

Everything is CPU time of one process, the median of three runs after one that compiles. Routing beside the real
traces is synthetic: skewed, 30 % of a token's experts kept from the token before. It serves for speed, not for hit
rates.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
import bench_common as common
from bench_common import Report, Table, cpu_s, events_of, shape_of

if find_spec("numba") is None:
    common.skip("the compiled engine needs numba (pip install 'expertflow-trace[fast]')")

import numba
from expertflow.simulator import engines
from expertflow.simulator.account import totals_of
from expertflow.simulator.compiled import curves as compiled_curves
from expertflow.simulator.compiled.testing import require_equal
from expertflow.simulator.costs import CostModel
from expertflow.simulator.curves import global_curve, layer_curves
from expertflow.simulator.engine import simulate
from expertflow.simulator.hardware import machine_of
from expertflow.simulator.policy.spec import PolicySpec, make_spec
from expertflow.simulator.workload import Workload
from expertflow.tracer.store import NO_EXPERT
from expertflow.tracer.types import ModelShape
from oracle import libcachesim, our_hits

CURVE_BAR, SINGLE_BAR, TIMED_BAR_S, ENGINE_BAR, GROWTH_BAR = 25.0, 5.0, 6.0, 25.0, 0.25
LAYERS, EXPERTS, TOP_K, SLOTS = 16, 64, 8, 512
EXPERT_BYTES = 12_582_912  # OLMoE-1B-7B in 16 bits, which has this shape: 3 × 2048 × 1024 × 2
GPU, LINK = "rtx4090", "pcie4x16"
KEPT, TRUE_AHEAD = 0.3, 0.8
SHARES = (0.25, 0.5, 0.75)
PREDICTORS: tuple[tuple[str, dict[str, int]], ...] = (
    ("oracle", {"horizon": 1}),
    ("gate_lookahead", {}),
)


def main() -> None:
    """Measure what was asked for."""
    made = common.parser(__doc__)
    made.add_argument("--only", default="curve,single,timed,growth", help="parts, by commas")
    options = common.options_of(made)
    parts = {"curve": curve, "single": single, "timed": timed, "growth": growth}
    asked = [name.strip() for name in options.only.split(",")]
    if unknown := set(asked) - set(parts):
        made.error(f"no part {', '.join(sorted(unknown))}; choose from {', '.join(parts)}.")
    if options.write and set(asked) != set(parts):
        made.error("--write needs all parts.")
    report = Report("replay_speed.py", options)
    for name in asked:
        parts[name](report, options.quick)
    report.finish()


# --- (a) curves ----------------------------------------------------------------------------------


def curve(report: Report, quick: bool) -> None:
    """Accesses per second of the one-pass curves."""
    rows: list[tuple[str, ...]] = []
    for name, ids, num_experts in _routing(quick):
        workload = events_of(ids, num_experts)
        accesses = len(workload.experts)
        for pool, function in (("global", global_curve), ("by layer", layer_curves)):
            rate = accesses / cpu_s(lambda f=function, w=workload: f(w)) / 1e6
            capacities = num_experts * (workload.num_layers if pool == "global" else 1)
            rows.append((name, pool, f"{accesses / 1e6:.1f}", str(capacities), f"{rate:.1f}"))
            report.bar(f"one-pass curve, {name}, {pool}", rate, CURVE_BAR, "M/s", at_least=True)
    head = ("trace", "pool", "M accesses", "capacities", "M accesses/s")
    report.table(Table("LRU hits at every capacity in one pass.", head, rows))


# --- (b) one capacity ----------------------------------------------------------------------------


def single(report: Report, quick: bool) -> None:
    """LRU at one capacity beside libCacheSim's on the same accesses."""
    if find_spec("libcachesim") is None:
        report.note("skipped: one capacity beside libCacheSim (pip install libcachesim).")
        return
    rows: list[tuple[str, ...]] = []
    ratios: list[float] = []
    for name, ids, num_experts in _routing(quick):
        accesses, events = common.accesses_of(ids, num_experts), events_of(ids, num_experts)
        total = num_experts * accesses.num_layers
        sizes = [round(share * total) for share in SHARES]
        for slots, other_s in zip(sizes, _libcachesim_s(accesses.keys(), sizes), strict=True):
            other = ids.size / other_s / 1e6
            found = {
                what: ids.size / cpu_s(run) / 1e6
                for what, run in _ways(accesses, events, slots).items()
            }
            ratio = max(found.values()) / other
            ratios.append(ratio)
            hit_rate = our_hits(accesses, "lru", slots, "global") / ids.size
            rates = (f"{found[what]:.1f}" if what in found else "–" for what in _COLUMNS)
            rows.append(
                (name, str(slots), f"{hit_rate:.1%}", f"{other:.1f}", *rates, f"{ratio:.1f}")
            )
    head = ("trace", "slots", "hits", "libCacheSim", *_COLUMNS, "best / libCacheSim")
    report.table(Table("LRU at one capacity, one pool: M accesses/s.", head, rows))
    report.note(
        "`engine` carries clock, link and copies, on a machine where all is free; `events` replays the same accesses "
        "as the toolkit does, all experts of a layer at once; `curve` answers for every capacity; `hits` counts hits "
        "and nothing else. libCacheSim maps its trace from memory."
    )
    what = "LRU at one capacity / libCacheSim, median"
    report.bar(what, statistics.median(ratios), SINGLE_BAR, "×", at_least=True)


_COLUMNS = ("engine", "engine, events", "curve", "hits", "hits, events")


def _ways(accesses: Workload, events: Workload, slots: int) -> dict[str, Callable[[], object]]:
    ways: dict[str, Callable[[], object]] = {
        "engine": lambda: our_hits(accesses, "lru", slots, "global"),
        "engine, events": lambda: our_hits(events, "lru", slots, "global"),
        "curve": lambda: global_curve(accesses),
    }
    for name, workload in (("hits", accesses), ("hits, events", events)):
        keys, counted = workload.keys(), np.ones(workload.num_events, bool)
        total = workload.num_layers * workload.num_experts
        given = (workload.ptr, keys, counted, total, slots)
        if compiled_curves.lru_hits(*given) != global_curve(workload)[slots]:
            raise SystemExit(f"lru_hits is not the curve at {slots} slots")
        ways[name] = lambda given=given: compiled_curves.lru_hits(*given)
    return ways


def _libcachesim_s(keys: np.ndarray, sizes: list[int]) -> Iterator[float]:
    """Median CPU seconds of three runs per size, each after one that does not count."""
    answers = libcachesim([keys], [("LRU", slots) for slots in sizes for _ in range(4)])[0]
    for place in range(len(sizes)):
        mine = answers[4 * place + 1 : 4 * place + 4]
        yield statistics.median(answer["cpu_s"] for answer in mine)


# --- (c) timed, with prefetch --------------------------------------------------------------------


def timed(report: Report, quick: bool) -> None:
    """Seconds per million tokens with times, link and prefetch; the reference engine on a prefix."""
    rows: list[tuple[str, ...]] = []
    for tokens in (20_000,) if quick else (250_000, 1_000_000):
        given = _timed_workload(tokens, LAYERS)
        for allocation in ("global", "equal"):
            for name, spec in _specs(allocation):
                per_million, row = _timed_row(given, spec)
                rows.append((f"{tokens:,}", allocation, name, *row))
                what = (
                    f"timed replay of {tokens:,} tokens, {name}, {allocation}, per million tokens"
                )
                report.bar(what, per_million, TIMED_BAR_S, "s", at_least=False)
    head = ("tokens", "pool", "predictor", "hits", "prefetches per layer", "s per M tokens")
    title = (
        f"Timed replay with prefetch: {LAYERS} layers, top-{TOP_K} of {EXPERTS}, LRU, {SLOTS} slots, declared {GPU} "
        f"and {LINK}, look-ahead ids right in {TRUE_AHEAD:.0%} of layers."
    )
    report.table(Table(title, head, rows))
    _beside_the_reference(report, quick)


def _timed_row(
    given: tuple[Workload, ModelShape, CostModel], spec: PolicySpec
) -> tuple[float, tuple[str, ...]]:
    workload, shape, costs = given
    tokens = len(workload.steps)
    per_million = cpu_s(lambda: engines.run(workload, spec, shape, costs)) / tokens * 1e6
    totals, _ = engines.run(workload, spec, shape, costs)
    prefetches = totals.prefetch.issued / workload.num_events
    hits = totals.steps.hits.sum() / len(workload.experts)
    return per_million, (f"{hits:.1%}", f"{prefetches:.2f}", f"{per_million:.2f}")


def _beside_the_reference(report: Report, quick: bool) -> None:
    """Ratio of the two engines on the same tokens, and the equality of all that they say."""
    tokens = 200 if quick else 2_000
    workload, shape, costs = _timed_workload(tokens, LAYERS)
    rows: list[tuple[str, ...]] = []
    for name, spec in _specs("global"):
        require_equal(workload, spec, shape, costs)  # floats, hits, evictions and single copies
        slow_s = cpu_s(
            lambda s=spec: totals_of(simulate(workload, s, shape, costs)), 1 if quick else 3
        )
        quick_s = cpu_s(lambda s=spec: engines.run(workload, s, shape, costs), 9)
        ratio = slow_s / quick_s
        rows.append(
            (name, f"{tokens:,}", f"{slow_s:.2f}", f"{quick_s * 1e3:.1f}", f"{ratio:.0f}", "yes")
        )
        report.bar(f"compiled / reference engine, {name}", ratio, ENGINE_BAR, "×", at_least=True)
    head = ("predictor", "tokens", "reference s", "compiled ms", "ratio", "same floats")
    report.table(Table("The same replay on both engines, one pool.", head, rows))


def _specs(allocation: str) -> Iterator[tuple[str, PolicySpec]]:
    for name, params in PREDICTORS:
        spec = make_spec(
            slots=SLOTS, cache="lru", allocation=allocation, predictor=name, predictor_params=params
        )
        yield name, spec


# --- (d) growth ----------------------------------------------------------------------------------


def growth(report: Report, quick: bool) -> None:
    """Cost over four sizes of tokens and four of layers."""
    unit = 5_000 if quick else 60_000
    by_tokens = [(unit * factor, LAYERS) for factor in (1, 2, 4, 8)]
    by_layers = [(unit, layers) for layers in (8, 16, 32, 64)]
    for axis, points in (("tokens", by_tokens), ("layers", by_layers)):
        per_event: list[float] = []
        rows: list[list[str]] = []
        for tokens, layers in points:
            workload, shape, costs = _timed_workload(tokens, layers)
            spec = make_spec(slots=layers * EXPERTS // 2, cache="lru", predictor="gate_lookahead")
            seconds = cpu_s(lambda: engines.run(workload, spec, shape, costs))  # noqa: B023 - called here
            per_event.append(seconds / (tokens * layers))
            rows.append([f"{tokens:,}", str(layers), f"{seconds:.2f}"])
        middle = math.sqrt(max(per_event) * min(per_event))
        for row, found in zip(rows, per_event, strict=True):
            row += [f"{found * 1e9:.0f}", f"{found / middle - 1:+.0%}"]
        head = ("tokens", "layers", "s", "ns per layer event", "from the middle")
        title = (
            f"Cost over {axis}: timed replay with gate look-ahead, half of the experts in slots."
        )
        report.table(Table(title, head, rows))
        worst = max(abs(found / middle - 1) for found in per_event)
        what = f"cost per token and layer over {axis}, worst distance from the middle"
        report.bar(what, worst, GROWTH_BAR, "", at_least=False)


# --- routing -------------------------------------------------------------------------------------


def _routing(quick: bool) -> Iterator[tuple[str, np.ndarray, int]]:
    """Real routing where it is at hand, and synthetic."""
    for source in common.present([common.GPT_OSS]):
        ids = source.ids()
        yield source.name, ids[: 5_000 if quick else None], source.num_experts
    tokens = 5_000 if quick else 150_000
    yield f"synthetic {LAYERS}×{EXPERTS}, top-{TOP_K}", sticky_routing(tokens, LAYERS), EXPERTS


def sticky_routing(tokens: int, layers: int, seed: int = 0) -> np.ndarray:
    """Skewed routing that keeps some of each token's experts for the next: [tokens, layers, TOP_K]."""
    dice = np.random.default_rng(seed)
    weight = np.exp(dice.normal(size=(layers, EXPERTS)))
    shares = np.cumsum(weight, axis=1) / weight.sum(axis=1, keepdims=True)
    ids = np.empty((tokens, layers, TOP_K), np.uint8)
    _draw(ids, shares, KEPT, seed)
    return ids


@numba.njit
def _draw(ids: np.ndarray, shares: np.ndarray, kept: float, seed: int) -> None:
    np.random.seed(seed)
    tokens, layers, top_k = ids.shape
    token_of = np.full((layers, shares.shape[1]), -1)
    for token in range(tokens):
        for layer in range(layers):
            found = 0
            for k in range(top_k):
                if token and np.random.random() < kept:
                    ids[token, layer, found] = ids[token - 1, layer, k]
                    token_of[layer, ids[token, layer, found]] = token
                    found += 1
            while found < top_k:
                expert = np.searchsorted(shares[layer], np.random.random())
                if expert < shares.shape[1] and token_of[layer, expert] != token:
                    token_of[layer, expert] = token
                    ids[token, layer, found] = expert
                    found += 1


def _timed_workload(tokens: int, layers: int) -> tuple[Workload, ModelShape, CostModel]:
    """Synthetic routing with look-ahead ids, and a declared machine. Large sizes repeat a part."""
    part = min(tokens, 250_000)
    ids = np.tile(sticky_routing(part, layers), (-(-tokens // part), 1, 1))[:tokens]
    ahead = np.full(ids.shape, NO_EXPERT, np.uint16)
    ahead[:, :-1] = ids[:, 1:]
    # Where the look-ahead errs it says what the token before was routed to.
    errs = np.random.default_rng(1).random((tokens, layers)) >= TRUE_AHEAD
    errs[0] = errs[:, -1] = False
    ahead[errs] = np.roll(ahead, 1, axis=0)[errs]
    shape = shape_of(layers, EXPERTS, TOP_K, EXPERT_BYTES)
    costs = machine_of(shape, GPU, LINK).costs
    return events_of(ids, EXPERTS, ahead), shape, costs


if __name__ == "__main__":
    main()

"""What a decision costs: microseconds per layer event, for each cache, top-8 of 256 slots.

    python benchmarks/decision_cost.py [--json]

Routing is drawn with skew and stickiness; demand loads only; the decision log is on, as in a real run. The
ratio is to looking the event's experts up in a plain dict, timed in the same run, so that numbers of
different machines can be compared. Python's cycle collector is off, as in timeit; the last column is with it
on, walking the growing log. The budget is 50 µs per event.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if __package__ is None and "expertflow" not in sys.modules:  # from a checkout, not installed
    sys.path.append(str(Path(__file__).resolve().parent.parent / ".typing"))

from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.policy.future import Future
from expertflow.simulator.policy.log import Entry
from expertflow.simulator.policy.registry import caches
from expertflow.simulator.policy.spec import make_spec
from expertflow.tracer.types import ExpertKey

LAYERS, EXPERTS, TOP_K, SLOTS, EVENTS = 4, 256, 8, 256, 10_000
BUDGET_US = 50.0

Events = Sequence[tuple[int, list[int]]]


def main() -> None:
    """Time every cache and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many is reported")
    options = parser.parse_args()
    events = draw(EVENTS)
    baseline_us = min(time_lookups(events) for _ in range(options.repeats))
    rows: list[dict[str, object]] = []
    for allocation in ("global", "equal"):
        for name in caches.names():
            repeats = range(options.repeats)
            spent_us, hit_rate = min(time_cache(name, allocation, events) for _ in repeats)
            collected_us, _ = min(
                time_cache(name, allocation, events, collect=True) for _ in repeats
            )
            rows.append(
                {
                    "cache": name,
                    "allocation": allocation,
                    "us_per_event": round(spent_us, 2),
                    "times_a_dict": round(spent_us / baseline_us, 1),
                    "us_with_collector": round(collected_us, 2),
                    "hit_rate": round(hit_rate, 4),
                    "within_budget": spent_us <= BUDGET_US,
                }
            )
    if options.json:
        setting = {"slots": SLOTS, "top_k": TOP_K, "experts": EXPERTS, "layers": LAYERS}
        document = {
            **setting,
            "events": EVENTS,
            "dict_us_per_event": round(baseline_us, 3),
            "budget_us": BUDGET_US,
            "rows": rows,
        }
        print(json.dumps(document, indent=2))
        return
    print(f"top-{TOP_K} of {SLOTS} slots, {EVENTS} events; a dict takes {baseline_us:.2f} µs\n")
    print("| cache | slots | µs per event | × a dict | hits | within 50 µs | with collector |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['cache']} | {row['allocation']} | {row['us_per_event']} | "
            f"{row['times_a_dict']} | {row['hit_rate']} | {'yes' if row['within_budget'] else 'NO'} | "
            f"{row['us_with_collector']} |"
        )


def draw(count: int) -> Events:
    """Layer events of one token each: popular experts, of which 40 % stay from token to token."""
    dice = np.random.default_rng(0)
    popularity = dice.normal(size=(LAYERS, EXPERTS))
    before = [np.empty(0, dtype=int)] * LAYERS
    events: list[tuple[int, list[int]]] = []
    for number in range(count):
        layer = number % LAYERS
        score = popularity[layer] + dice.gumbel(size=EXPERTS)
        kept = before[layer][dice.random(len(before[layer])) < 0.4]
        score[kept] += 100.0
        before[layer] = np.argpartition(-score, TOP_K)[:TOP_K]
        events.append((layer, sorted(before[layer].tolist())))
    return events


def time_lookups(events: Events) -> float:
    """Microseconds per event of the least there is to do: find the experts in a dict."""
    places = {
        ExpertKey(layer, expert): expert for layer in range(LAYERS) for expert in range(EXPERTS)
    }
    found = 0
    began = time.perf_counter()
    for layer, experts in events:
        for expert in experts:
            found += ExpertKey(layer, expert) in places
    spent_s = time.perf_counter() - began
    assert found == TOP_K * len(events)
    return 1e6 * spent_s / len(events)


def time_cache(
    name: str, allocation: str, events: Events, *, collect: bool = False
) -> tuple[float, float]:
    """Microseconds per event of the decision core with one cache, and its hit rate."""
    popularity = [[0] * EXPERTS for _ in range(LAYERS)]
    for layer, experts in events[: len(events) // 2]:
        for expert in experts:
            popularity[layer][expert] += 1
    spec = make_spec(slots=SLOTS, cache=name, allocation=allocation, popularity=popularity)
    keys = [tuple(ExpertKey(layer, e) for e in experts) for layer, experts in events]
    log: list[Entry] = []
    core = spec.build(
        tiny_shape(LAYERS, EXPERTS, TOP_K),
        future=Future(keys) if "future" in spec.needs() else None,
        log=log,
    )
    core.warm()
    hits = 0
    gc.collect()
    if not collect:
        gc.disable()
    began = time.perf_counter()
    for step, (layer, experts) in enumerate(events):
        hits += core.demand(step, layer, experts).hits
        core.release(step, layer)
    spent_s = time.perf_counter() - began
    gc.enable()
    return 1e6 * spent_s / len(events), hits / (TOP_K * len(events))


if __name__ == "__main__":
    main()

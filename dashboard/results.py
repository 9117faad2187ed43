"""Every result in a folder under a name of its own, wherever it was found; and what differs between some of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ..simulator.result import Result
from ..tracer.records import to_json
from .data import Catalog

_OUTCOMES: Final = frozenset(
    {
        "tokens_per_s", "ttft_s", "tpot_s", "ttft", "tpot", "hit_rate", "late_rate", "miss_rate", "bytes_per_token",
        "stall_s", "link_busy_share", "slots_ratio", "peak_device_bytes", "memory", "time", "prefill", "decode",
        "prefetch", "bounds", "warnings", "same_tokens", "log_replays", "worth", "arrivals", "label", "format",
        "accuracy", "regrouping",
    }
)  # fmt: skip
"""Fields of a result that say what came out, not what was set."""


def named_results(catalog: Catalog) -> dict[str, Result]:
    """All results by name: single files, candidates of tunings, both sides of verdicts."""
    found: dict[str, Result] = {}
    for name, result in _all(catalog):
        unique, number = name, 2
        while unique in found:
            unique, number = f"{name} ({number})", number + 1
        found[unique] = result
    return found


def _all(catalog: Catalog) -> Iterator[tuple[str, Result]]:
    for verdict in catalog.verdicts:
        for run in verdict.value.runs:
            yield f"{run.label}, predicted ({verdict.name})", run.predicted
            if run.measured:
                yield f"{run.label}, measured ({verdict.name})", median(run.measured)
    for single in catalog.results:
        yield f"{single.value.label}, {single.value.source} ({single.name})", single.value
    for tuning in catalog.tunings:
        for result in (*tuning.value.candidates, *tuning.value.bounds):
            yield f"{result.label}, predicted ({tuning.name})", result


def median(repeats: Sequence[Result]) -> Result:
    """The repeat in the middle by speed (the slower of two)."""
    middle = statistics.median_low(result.tokens_per_s for result in repeats)
    return next(result for result in repeats if result.tokens_per_s == middle)


def settings(result: Result) -> dict[str, str]:
    """What was set or given, by dotted name: policy, machine, link, trace, versions."""
    document = {name: value for name, value in to_json(result).items() if name not in _OUTCOMES}
    return dict(flatten(document))


def flatten(value: Mapping[str, Any], prefix: str = "", limit: int = 200) -> list[tuple[str, str]]:
    """Nested keys joined by dots, and their values as text of at most `limit` characters."""
    out: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            out += flatten(item, f"{prefix}{key}.", limit)
        else:
            text = item if isinstance(item, str) else json.dumps(item)
            out.append((f"{prefix}{key}", text if len(text) <= limit else text[: limit - 1] + "…"))
    return out


def differing(chosen: Mapping[str, Result]) -> dict[str, dict[str, str]]:
    """Settings that are not the same in all: by setting, then by name of the result."""
    tables = {name: settings(result) for name, result in chosen.items()}
    keys = dict.fromkeys(key for table in tables.values() for key in table)
    rows = {key: {name: table.get(key, "–") for name, table in tables.items()} for key in keys}
    return {key: row for key, row in rows.items() if len(set(row.values())) > 1}


def unlike(chosen: Mapping[str, Result]) -> list[str]:
    """Why results should not be held against each other without a thought."""
    names = {
        "trace_id": "of different traces",
        "model_id": "of different models",
        "device": "on different devices",
        "link": "behind different links",
        "link_origin": "behind links of different origin (measured, emulated, declared)",
        "batch_size": "with different batches",
    }
    return [
        text
        for field, text in names.items()
        if len({getattr(result, field) for result in chosen.values()}) > 1
    ]

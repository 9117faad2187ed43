"""A sweep as lines for people."""

from __future__ import annotations

from collections.abc import Mapping

from ..tracer.quantities import format_bytes, format_seconds
from .sweep_folder import SweepFile
from .sweep_row import OBJECTIVES, Row

SHOWN = 20
"""Lines of a list that a terminal gets; the rest is in the files."""

Lines = list[tuple[str, str]]


def front_lines(document: SweepFile, rows: Mapping[str, Row]) -> Lines:
    """What nothing else beats, by label; what comes out equal is counted, the simplest is shown."""
    is_one_link = len(document.machine.links) == 1
    objectives = document.search["objectives"]
    groups: dict[tuple[object, ...], list[Row]] = {}
    for key in document.pareto:
        values = tuple(getattr(rows[key], name) for name in objectives)
        groups.setdefault(values, []).append(rows[key])
    found: Lines = []
    for row, *equals in list(groups.values())[:SHOWN]:
        where = "" if is_one_link else f"; link {row.link}"
        lossy = "" if row.is_lossless else "; LOSSY: may change the text"
        others = f"; as good: {len(equals)} more" if equals else ""
        text = f"{_values(row, objectives)}; {_traffic(row)}{where}{lossy}{others}"
        found.append((row.label, text))
    if len(groups) > SHOWN:
        found.append(("…", f"{len(groups) - SHOWN} more in the files"))
    return found


def best_lines(document: SweepFile, rows: Mapping[str, Row]) -> Lines:
    """The best per budget by the first objective, next to the bound and with r; of a range, the best of all."""
    is_one_link = len(document.machine.links) == 1
    objective = document.search["objectives"][0]
    found: Lines = []
    groups = document.best
    if isinstance(document.space["budgets"], Mapping):
        sign = 1.0 if OBJECTIVES[objective] == "maximize" else -1.0
        groups = sorted(groups, key=lambda g: -sign * getattr(rows[g.best], objective))[:1]
    for group in groups[:SHOWN]:
        row = rows[group.best]
        name = group.budget if "slot" in group.budget else f"{group.budget} ({group.slots} slots)"
        if not is_one_link:
            name += f", {group.link}"
        text = f"{row.label}: {value_text(row, objective)}"
        if group.bound:
            text += f" (who knows the future: {value_text(rows[group.bound], objective)})"
        if row.slots_ratio is not None:
            floor = " — no cache can hit by recency" if row.slots_ratio >= 1 else ""
            text += f"; r = {row.slots_ratio:.2f}{floor}"
        found.append((name, text))
    if len(groups) > SHOWN:
        found.append(("…", f"{len(groups) - SHOWN} more in the files"))
    return found


def value_text(row: Row, objective: str) -> str:
    """One column with its unit."""
    value = getattr(row, objective)
    if objective == "tokens_per_s":
        return f"{value:.1f} tokens/s"
    name = objective.removesuffix("_s").replace("_", " ")
    if objective == "peak_device_bytes":
        return f"peak {format_bytes(value)}"
    if objective == "bytes_per_token":
        return f"{format_bytes(value)} per token"
    if objective.endswith("_s"):
        return f"{name} {format_seconds(value)}"
    return f"{name} {value:.1%}" if isinstance(value, float) else f"{value} {name}"


def _values(row: Row, objectives: list[str]) -> str:
    return ", ".join(value_text(row, name) for name in objectives)


def _traffic(row: Row) -> str:
    return (
        f"decode hits {row.decode_hit_rate:.1%}, {format_bytes(row.bytes_per_token or 0)} per token"
    )

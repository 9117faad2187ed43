"""One line of a sweep's results, and its columns in Parquet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_type_hints

import pyarrow as pa

from ..tracer.records import to_json
from .policy.spec import AS_ROUTED, Member, PolicySpec
from .result import Result
from .space import DEFAULTS, Point

OBJECTIVES = {
    "tokens_per_s": "maximize",
    "decode_hit_rate": "maximize",
    "prefill_hit_rate": "maximize",
    "ttft_mean_s": "minimize",
    "ttft_p95_s": "minimize",
    "tpot_mean_s": "minimize",
    "tpot_p95_s": "minimize",
    "bytes_per_token": "minimize",
    "stall_s": "minimize",
    "link_busy_share": "minimize",
    "peak_device_bytes": "minimize",
    "slots": "minimize",
}
"""Columns that a sweep may aim at, and which way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One configuration and what was predicted for it; numbers are None where `error` says why.

    `params` is JSON text: the parameters asked for, by family. `seconds` is what the prediction took.
    """

    key: str
    policy_hash: str
    label: str
    cache: str
    allocation: str
    predictor: str
    scheduler: str
    misses: str
    params: str
    budget: str
    slots: int
    link: str
    link_origin: str
    declared_link: str | None
    is_bound: bool
    is_lossless: bool
    tokens_per_s: float | None = None
    ttft_mean_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    ttft_p99_s: float | None = None
    tpot_mean_s: float | None = None
    tpot_p50_s: float | None = None
    tpot_p95_s: float | None = None
    tpot_p99_s: float | None = None
    prefill_hit_rate: float | None = None
    prefill_late_rate: float | None = None
    prefill_miss_rate: float | None = None
    decode_hit_rate: float | None = None
    decode_late_rate: float | None = None
    decode_miss_rate: float | None = None
    bytes_per_token: float | None = None
    stall_s: float | None = None
    link_busy_share: float | None = None
    peak_device_bytes: int | None = None
    slots_ratio: float | None = None
    seconds: float = 0.0
    engine: str = ""
    error: str = ""
    routing: str = AS_ROUTED.name

    @property
    def point(self) -> Point:
        """The configuration it belongs to."""
        params = json.loads(self.params)
        return Point(
            budget=self.budget,
            slots=self.slots,
            link=self.declared_link,
            members={
                kind: Member(name=getattr(self, kind), params=params.get(kind, {}))
                for kind in DEFAULTS
            },
        )


def row_of(point: Point, spec: PolicySpec, result: Result, *, seconds: float, engine: str) -> Row:
    """The line of a configuration that could be predicted."""
    measured: dict[str, Any] = {
        "tokens_per_s": result.tokens_per_s,
        "bytes_per_token": result.bytes_per_token,
        "stall_s": result.stall_s,
        "link_busy_share": result.link_busy_share,
        "peak_device_bytes": result.peak_device_bytes,
        "slots_ratio": result.slots_ratio,
    }
    for name, times in (("ttft", result.ttft), ("tpot", result.tpot)):
        for part in ("mean", "p50", "p95", "p99"):
            measured[f"{name}_{part}_s"] = getattr(times, part)
    for name, phase in (("prefill", result.prefill), ("decode", result.decode)):
        for part in ("hit_rate", "late_rate", "miss_rate"):
            measured[f"{name}_{part}"] = getattr(phase, part)
    return Row(
        **_configuration(point),
        **measured,
        policy_hash=spec.behaviour_hash(),
        label=result.label,
        is_lossless=spec.is_lossless,
        link=result.link,
        link_origin=result.link_origin,
        seconds=seconds,
        engine=engine,
    )


def failed_row(point: Point, error: str, *, link: str, link_origin: str, seconds: float) -> Row:
    """The line of a configuration that could not be predicted."""
    names = " + ".join(str(member) for member in point.members.values())
    return Row(
        **_configuration(point),
        policy_hash="",
        label=f"{names} @ {point.slots} slots",
        is_lossless=False,
        link=link,
        link_origin=link_origin,
        seconds=seconds,
        error=error,
    )


def table_of(rows: Iterable[Row]) -> pa.Table:
    """Rows as an Arrow table."""
    return pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=SCHEMA)


def rows_of(table: pa.Table) -> list[Row]:
    """Rows of an Arrow table. Raises ValueError or TypeError if it holds something else."""
    if table.schema.names == SCHEMA.names[:-1]:  # older than routings
        table = table.append_column(
            SCHEMA.field("routing"), pa.array([AS_ROUTED.name] * table.num_rows, pa.string())
        )
    if table.schema.names != SCHEMA.names:
        raise ValueError("its columns are not those of a sweep")
    return [Row(**values) for values in table.to_pylist()]


def _configuration(point: Point) -> dict[str, Any]:
    params = {kind: to_json(m.params) for kind, m in point.members.items() if m.params}
    return {
        "key": point.key,
        **{kind: member.name for kind, member in point.members.items()},
        "params": json.dumps(params, sort_keys=True),
        "budget": point.budget,
        "slots": point.slots,
        "declared_link": point.link,
        "is_bound": point.is_bound,
    }


def _schema() -> pa.Schema:
    types = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    columns = []
    for name, hint in get_type_hints(Row).items():
        plain = next(kind for kind in (bool, int, float, str) if kind in _alternatives(hint))
        columns.append(pa.field(name, types[plain], nullable=plain is not hint))
    return pa.schema(columns)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", (hint,))


SCHEMA = _schema()

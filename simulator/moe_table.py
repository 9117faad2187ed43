"""Measured times of MoE layers on GPUs, from tables that others publish.

Two formats are read: that of aiconfigurator-core (NVIDIA, Apache-2.0; one row per kernel, shape and number of
tokens) and that of LLMServingSim (MIT; tokens, activated experts, microseconds of one layer).
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ..tracer.errors import InputError, ResourceError, unknown_name
from ..tracer.types import ModelShape, Phase
from .costs import Linear
from .hardware_profiles import BITS_PER_WEIGHT
from .least_squares import non_negative

INSTALLED = "aiconfigurator-core"
"""In place of a path: the tables inside the installed package of this name."""

_DECODE_TOKENS = 256
"""Rows up to here stand for decoding; prefill is fitted to all rows, since prompts come in every size."""
_SAME = 0.05
"""Layers nearer than this (see LayerShape.distance) are one: padding and biases differ that much."""
_SIMPLE = ("tokens", "activated_experts", "time_us")
_FULL = (
    "device", "moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts",
    "moe_tp_size", "moe_ep_size", "distribution", "latency",
)  # fmt: skip
_KERNEL_DTYPES = {
    "bfloat16": ("bfloat16",),
    "float16": ("bfloat16", "float16"),
    "float8_e4m3fn": ("fp8", "fp8_block"),
    "fp8": ("fp8", "fp8_block"),
    "nvfp4": ("nvfp4",),
    "mxfp4": ("w4a16_mxfp4",),
    "int4": ("int4_wo",),
}


_Rows = Mapping[str, np.ndarray]
"""Columns by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """The sizes that a MoE layer's time depends on. `expert_weights` counts the weights of one expert."""

    hidden_size: int
    expert_weights: float
    top_k: int
    num_experts: int

    @classmethod
    def of(cls, shape: ModelShape) -> LayerShape:
        """The layer of a model. Raises UsageError if its number format is not known."""
        return cls(
            hidden_size=shape.hidden_size,
            expert_weights=expert_weights(shape),
            top_k=shape.top_k,
            num_experts=shape.num_experts,
        )

    def distance(self, other: LayerShape) -> float:
        """The sum of |log ratio| over their sizes; unknown ones count nothing."""
        pairs = (
            (self.hidden_size, other.hidden_size),
            (self.expert_weights, other.expert_weights),
            (self.top_k, other.top_k),
            (self.num_experts, other.num_experts),
        )
        return sum(abs(math.log(a / b)) for a, b in pairs if a > 0 and b > 0)

    @property
    def text(self) -> str:
        """The layer in words."""
        return f"hidden size {self.hidden_size}, top {self.top_k} of {self.num_experts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeTable:
    """Measured seconds of one MoE layer by tokens and distinct experts.

    `tokens_scale` and `distinct_scale` carry times over to the asked-for layer where the table holds
    another one: ratios of arithmetic per token and of bytes per expert.
    """

    tokens: tuple[float, ...]
    distinct: tuple[float, ...]
    seconds: tuple[float, ...]
    source: str
    notes: tuple[str, ...] = ()
    tokens_scale: float = 1.0
    distinct_scale: float = 1.0

    def fit(self, phase: Phase) -> Linear:
        """Seconds by the features of `PhaseCosts.experts`; those after distinct are not charged.

        Non-negative weights on the physical scale; rows count by their relative error, so that twenty
        thousand tokens do not drown out one.
        """
        tokens, seconds = np.asarray(self.tokens), np.asarray(self.seconds)
        features = np.column_stack([np.ones(len(tokens)), tokens, np.asarray(self.distinct)])
        if phase == "decode" and (tokens <= _DECODE_TOKENS).any():
            is_in = tokens <= _DECODE_TOKENS
            features, seconds = features[is_in], seconds[is_in]
        relative = features / seconds[:, None]
        weights = non_negative(relative, np.ones(len(seconds)))
        residual = float(np.median(np.abs(relative @ weights - 1)))
        scaled = weights * [1.0, self.tokens_scale, self.distinct_scale]
        return Linear((*scaled.tolist(), 0.0, 0.0, 0.0), residual)


def expert_weights(shape: ModelShape) -> float:
    """Number of weights in one expert. Raises UsageError if the number format is not known."""
    if shape.dtype not in BITS_PER_WEIGHT:
        raise unknown_name("number format", shape.dtype, BITS_PER_WEIGHT)
    return shape.expert_bytes * 8 / BITS_PER_WEIGHT[shape.dtype]


def read_moe_table(path: Path | str, *, device: str, shape: ModelShape) -> MoeTable:
    """Read the rows for `device` (words of its name) and the layer nearest to that of `shape`.

    `path` is a CSV (`.gz` allowed), a Parquet file, or INSTALLED. A table that names no device is taken as it
    is. Raises InputError saying what the table holds instead, ResourceError if the package is absent.
    """
    if str(path) == INSTALLED:
        rows, source = _installed(device), INSTALLED
    else:
        rows, source = _read(Path(path)), Path(path).name
    if set(_FULL) <= set(rows):
        return _kernels(rows, source, device, shape)
    if set(_SIMPLE) <= set(rows):
        return _simple(rows, source)
    raise InputError(
        f"{source} has the columns {', '.join(rows)}; expected {', '.join(_SIMPLE)} (LLMServingSim) or "
        f"{', '.join(_FULL)} (aiconfigurator-core)."
    )


def _read(path: Path) -> _Rows:
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else pa_csv.read_csv(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        words = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"{path} cannot be read as a table ({words}); expected a .csv, a .csv.gz or a .parquet."
        ) from None
    return _arrays(table)


def _arrays(table: pa.Table) -> _Rows:
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def _installed(device: str) -> _Rows:
    spec = importlib.util.find_spec("aiconfigurator_core")
    roots = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    pattern = "systems/data/*/moe/*/*/moe_perf.parquet"
    files = [file for root in roots for file in sorted(root.glob(pattern))]
    if not files:
        raise ResourceError(
            f"{INSTALLED} is not installed here, or holds no tables. Run: pip install {INSTALLED}; "
            "or give the path of a table."
        )
    names = list(_FULL)
    tables = [pq.read_table(file, columns=names).combine_chunks() for file in files]
    # Other devices leave one row behind, so that an error can say which there are.
    kept = [
        table if _is_device(_arrays(table)["device"], device).any() else table.slice(0, 1)
        for table in tables
    ]
    return _arrays(pa.concat_tables(kept, promote_options="permissive"))


def _is_device(names: np.ndarray, device: str) -> np.ndarray:
    """Whole words only: A10 is no A100."""
    pattern = re.compile(rf"(?<!\w){re.escape(device)}(?!\w)", re.IGNORECASE)
    is_match = {name: bool(pattern.search(str(name))) for name in set(names.tolist())}
    return np.asarray([is_match[name] for name in names.tolist()], dtype=bool)


def _simple(rows: _Rows, source: str) -> MoeTable:
    tokens, distinct, micros = (_numbers(rows, name, source) for name in _SIMPLE)
    return MoeTable(
        tokens=tuple(tokens.tolist()),
        distinct=tuple(distinct.tolist()),
        seconds=tuple((micros * 1e-6).tolist()),
        source=source,
        notes=(
            f"Experts: measured times of {source}, which names neither device nor model; they are "
            "taken as those of this GPU and this layer.",
        ),
    )


def _kernels(rows: _Rows, source: str, device: str, shape: ModelShape) -> MoeTable:
    mine = LayerShape.of(shape)
    rows = _select(rows, (rows["moe_tp_size"] == 1) & (rows["moe_ep_size"] == 1))
    known = rows["device"]
    rows = _select(rows, _is_device(known, device))
    _require_rows(rows, source, f"device {device!r}", known)
    known = rows["moe_dtype"]
    rows = _select(rows, np.isin(known, _KERNEL_DTYPES.get(shape.dtype, (shape.dtype,))))
    _require_rows(rows, source, f"number format {shape.dtype!r} on {device}", known)
    # An even load is the only one whose distinct experts follow from the number of tokens.
    known = rows["distribution"]
    rows = _select(rows, known == "balanced")
    _require_rows(rows, source, "distribution 'balanced'", known)
    theirs, rows = _nearest(rows, mine)
    is_same = theirs.distance(mine) <= _SAME
    tokens, seconds = _fastest(rows, source)
    ratio = 1.0 if is_same else mine.expert_weights / theirs.expert_weights
    return MoeTable(
        tokens=tuple(tokens.tolist()),
        distinct=tuple(np.minimum(theirs.num_experts, theirs.top_k * tokens).tolist()),
        seconds=tuple(seconds.tolist()),
        source=source,
        notes=_kernel_notes(rows, source, len(tokens), mine, None if is_same else theirs),
        tokens_scale=1.0 if is_same else ratio * mine.top_k / theirs.top_k,
        distinct_scale=ratio,
    )


def _select(rows: _Rows, is_in: np.ndarray) -> _Rows:
    return {name: values[is_in] for name, values in rows.items()}


def _require_rows(rows: _Rows, source: str, what: str, known: np.ndarray) -> None:
    if not len(rows["latency"]):
        names = ", ".join(sorted({str(name) for name in known.tolist()})) or "none"
        raise InputError(f"{source} has no rows for {what}; it has {names}.")


def _nearest(rows: _Rows, mine: LayerShape) -> tuple[LayerShape, _Rows]:
    """The layer of the table that is nearest to ours, and its rows."""
    sizes = np.column_stack(
        [rows[name] for name in ("hidden_size", "inter_size", "topk", "num_experts")]
    )

    def layer(hidden: int, inter: int, top_k: int, experts: int) -> LayerShape:
        # Experts there are gated: three matrices each.
        return LayerShape(
            hidden_size=hidden,
            expert_weights=3 * hidden * inter,
            top_k=top_k,
            num_experts=experts,
        )

    found = np.unique(sizes, axis=0).tolist()
    chosen = min(found, key=lambda row: layer(*row).distance(mine))
    return layer(*chosen), _select(rows, (sizes == chosen).all(axis=1))


def _fastest(rows: _Rows, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of tokens, and the seconds of the fastest kernel at each; the table has milliseconds."""
    tokens, place = np.unique(_numbers(rows, "num_tokens", source), return_inverse=True)
    seconds = np.full(len(tokens), np.inf)
    np.minimum.at(seconds, place, _numbers(rows, "latency", source) * 1e-3)
    return tokens, seconds


def _kernel_notes(
    rows: _Rows, source: str, sizes: int, mine: LayerShape, other: LayerShape | None
) -> tuple[str, ...]:
    devices = ", ".join(sorted({str(name) for name in rows["device"].tolist()}))
    notes = [
        f"Experts: measured times of {source}, {devices}, the fastest kernel at each of {sizes} numbers "
        "of tokens; the table's load is even, so its distinct experts are min(experts, k × tokens)."
    ]
    if other is not None:
        notes.append(
            f"The table has no layer of this model's sizes ({mine.text}); the nearest ({other.text}) was "
            "scaled by arithmetic per token and bytes per expert."
        )
    return tuple(notes)


def _numbers(rows: _Rows, column: str, source: str) -> np.ndarray:
    try:
        values = rows[column].astype(np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise InputError(f"{source}: column {column} must hold numbers above 0, and at least one.")
    return values

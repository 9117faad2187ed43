"""Predicted next to measured: one panel per quantity, one row per configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...simulator.result import Check, VerifiedRun
from .. import theme, words
from .names import short_names

COLUMNS = 2


def checks_frame(runs: Sequence[VerifiedRun]) -> pd.DataFrame:
    """One row per configuration and quantity."""
    rows = [
        {
            "configuration": run.label,
            "quantity": c.quantity,
            "unit": c.unit,
            "predicted": c.predicted,
            "measured": c.measured,
            "gap": c.gap,
            "tolerance": c.tolerance,
            "noise": c.noise,
            "passed": c.passed,
            "judged": c.is_judged,
            "cause": c.cause,
        }
        for run in runs
        for c in run.checks
    ]
    return pd.DataFrame(rows)


def checks(runs: Sequence[VerifiedRun]) -> go.Figure:
    """Predicted (hollow) next to measured (solid) with the tolerance as a band around measured."""
    quantities = list(dict.fromkeys(c.quantity for run in runs for c in run.checks))
    if not quantities:
        return theme.finish(go.Figure(), ["Nothing was checked"], height=60)
    rows = math.ceil(len(quantities) / COLUMNS)
    panel = 24 + 32 * len(runs)
    gap = 92
    height = rows * panel + (rows - 1) * gap
    fig = make_subplots(
        rows=rows,
        cols=COLUMNS,
        shared_yaxes=True,
        subplot_titles=[_panel_title(quantity, runs) for quantity in quantities],
        horizontal_spacing=0.06,
        vertical_spacing=gap / height,
    )
    for index, quantity in enumerate(quantities):
        _add_panel(fig, quantity, runs, row=index // COLUMNS + 1, column=index % COLUMNS + 1)
    theme.finish(fig, checks_finding(runs), height=height, above=24)
    fig.update_yaxes(autorange="reversed", type="category", showgrid=False)
    fig.update_annotations(font_size=13)
    return fig


def checks_finding(runs: Sequence[VerifiedRun]) -> tuple[str, str]:
    """The chart's title: how many checks held, and how to read the marks."""
    every = [c for run in runs for c in run.checks if c.is_judged]
    passed = sum(c.passed for c in every)
    count = f"{passed} of {len(every)} checks are within tolerance"
    return count, "Hollow: predicted. Solid: measured. Band: tolerance around measured. ✗: outside"


def _panel_title(quantity: str, runs: Sequence[VerifiedRun]) -> str:
    found = [c for run in runs for c in run.checks if c.quantity == quantity]
    failed = sum(map(words.is_outside, found))
    name = escape(words.label(quantity))
    return f"{name}: {failed} outside" if failed else name


def _add_panel(
    fig: go.Figure, quantity: str, runs: Sequence[VerifiedRun], *, row: int, column: int
) -> None:
    every = [escape(name) for name in short_names([run.label for run in runs], 30)]
    # By place, not by label: two runs may carry the same one.
    places = [i for i, run in enumerate(runs) if any(c.quantity == quantity for c in run.checks)]
    names = [every[i] for i in places]
    checked = [next(c for c in runs[i].checks if c.quantity == quantity) for i in places]
    scale, unit = axis_unit(checked)
    is_first = row == 1 and column == 1
    fig.add_trace(_band(names, checked, scale, in_legend=is_first), row=row, col=column)
    for kind in ("measured", "predicted"):
        marks = _marks(kind, names, checked, scale, unit, in_legend=is_first)
        fig.add_trace(marks, row=row, col=column)
    fig.update_xaxes(title_text=unit, range=_range(checked, scale), row=row, col=column)


def _band(names: list[str], found: list[Check], scale: float, *, in_legend: bool) -> go.Scatter:
    x: list[float | None] = []
    y: list[str | None] = []
    for name, c in zip(names, found, strict=True):
        half = band_half_width(c)
        x += [(c.measured - half) * scale, (c.measured + half) * scale, None]
        y += [name, name, None]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={"width": 16, "color": theme.tint(theme.MEANING["other"], 0.35)},
        name="tolerance",
        showlegend=in_legend,
        legendgroup="tolerance",
        hoverinfo="skip",
    )


def _marks(
    kind: str, names: list[str], found: list[Check], scale: float, unit: str, *, in_legend: bool
) -> go.Scatter:
    is_hollow = kind == "predicted"
    colour = theme.MEANING["compute"]
    quantity = escape(words.label(found[0].quantity))
    return go.Scatter(
        x=[(c.predicted if is_hollow else c.measured) * scale for c in found],
        y=names,
        mode="markers+text" if is_hollow else "markers",
        marker={
            "symbol": "circle-open" if is_hollow else "circle",
            "size": 14 if is_hollow else 9,
            "color": colour,
            "line": {"width": 2.5, "color": colour},
        },
        # Rows are shared by the panels of a line, so the failing mark sits at the point.
        text=["✗" if words.is_outside(c) else "" for c in found] if is_hollow else None,
        textposition="top center",
        cliponaxis=False,
        textfont={"color": theme.MEANING["wait"], "size": 16},
        customdata=[[words.gap(c, c.gap), words.gap(c, c.tolerance, sign=False)] for c in found],
        name=kind,
        showlegend=in_legend,
        legendgroup=kind,
        hovertemplate=f"%{{y}}<br>{quantity} {kind}: %{{x:.4g}} {unit}<br>"
        "gap %{customdata[0]}, allowed ±%{customdata[1]}<extra></extra>",
    )


def _range(found: Sequence[Check], scale: float) -> list[float]:
    """From the leftmost to the rightmost thing drawn, with a margin."""
    ends = [c.measured + sign * band_half_width(c) for c in found for sign in (-1, 1)]
    ends += [c.predicted for c in found]
    low, high = min(ends) * scale, max(ends) * scale
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - margin, high + margin]


def band_half_width(check: Check) -> float:
    """Half of the tolerance band, in the unit of the values."""
    return check.tolerance if words.is_absolute(check) else check.tolerance * abs(check.measured)


def axis_unit(found: Sequence[Check]) -> tuple[float, str]:
    """Factor and unit name of a panel's axis, from its largest value."""
    sample = max(found, key=lambda c: abs(c.measured))
    text = words.amount(sample, sample.measured)
    if text.endswith(" %"):
        return 100.0, "%"
    for unit, factor in (
        ("GiB", 2.0**-30),
        ("MiB", 2.0**-20),
        ("KiB", 2.0**-10),
        ("µs", 1e6),
        ("ms", 1e3),
    ):
        if text.endswith(f" {unit}"):
            return factor, unit
    return 1.0, text.rpartition(" ")[2] if " " in text else sample.unit

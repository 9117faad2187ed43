"""The lanes of a run in time, and the passes of a run at a glance."""

from __future__ import annotations

from html import escape
from typing import Any, Final

import numpy as np
import plotly.graph_objects as go

from .. import theme, words
from ..frames import Frame
from ..timeline import COMPUTE, COPY, WAIT, Timeline

LANES: Final = (COMPUTE, COPY, WAIT)
CAUSES: Final[dict[str, str]] = {
    "experts": theme.MEANING["compute"],
    "attention, norms, router": "#6FA3CC",
    "host: read-back, policy, look-ahead": theme.MEANING["other"],
    "demand": theme.MEANING["demand"],
    "prefetch": theme.MEANING["prefetch"],
    "late prefetch": theme.MEANING["prefetch"],
    "warm": theme.MEANING["hit"],
    "for loads": theme.MEANING["wait"],
    "for experts on the CPU": theme.MEANING["miss"],
}
_NAMES: Final = {
    "demand": "copy on demand",
    "prefetch": "copy ahead of time",
    "late prefetch": "copy ahead, but late",
    "warm": "copy before the first pass",
    "for loads": "waiting for loads",
    "for experts on the CPU": "waiting for the CPU",
}
MOST_PASSES: Final = 400
"""Bars in the overview of passes; neighbours are put together beyond."""


def lanes(found: Timeline, first: int, last: int) -> go.Figure:
    """Bars of one window; times in milliseconds from its start. Simulated bars are outlined, recorded ones filled."""
    fig = go.Figure()
    zero = float(found.bars["start_s"].min()) if len(found.bars) else 0.0
    for cause, colour in CAUSES.items():
        rows = found.bars[found.bars["cause"] == cause]
        if len(rows):
            fig.add_trace(_bars(rows, cause, colour, zero, is_recorded=found.is_recorded))
    theme.finish(fig, lanes_finding(found, first, last), height=250, above=14, legend_rows=2)
    fig.update_layout(barmode="overlay", bargap=0.25)
    fig.update_xaxes(title_text="milliseconds from the start of the window", rangemode="tozero")
    fig.update_yaxes(
        categoryorder="array",
        categoryarray=list(reversed(LANES)),
        showgrid=False,
        fixedrange=True,
        range=[-0.5, 2.5],
    )
    _mark_passes(fig, found, zero)
    return fig


def _bars(rows: Frame, cause: str, colour: str, zero: float, *, is_recorded: bool) -> go.Bar:
    detail = [_detail(row) for row in rows.itertuples()]
    return go.Bar(
        y=rows["lane"],
        x=(rows["end_s"] - rows["start_s"]) * 1e3,
        base=(rows["start_s"] - zero) * 1e3,
        orientation="h",
        name=_NAMES.get(cause, cause),
        customdata=np.stack([rows["step"], rows["layer"]], axis=1),
        text=detail,
        textposition="none",
        marker={
            "color": colour if is_recorded else theme.tint(colour, 0.35),
            "line": {"color": colour, "width": 1},
            "pattern": {
                "shape": "x" if cause == "late prefetch" else "",
                "fgcolor": theme.MEANING["wait"],
                "size": 6,
                "solidity": 0.4,
            },
        },
        hovertemplate=f"{_NAMES.get(cause, cause)}<br>%{{text}}<extra></extra>",
    )


def _detail(row: Any) -> str:
    text = f"pass {row.step}, layer {row.layer}"
    if row.expert >= 0:
        text += f", expert {row.expert} ({words.size(row.bytes)})"
    # Not from the axis: there a bar’s value is where it ends.
    return f"{text}<br>{words.seconds(row.end_s - row.start_s)}"


def _mark_passes(fig: go.Figure, found: Timeline, zero: float) -> None:
    """A line where each pass begins, with its number where there is room."""
    shown = found.passes[found.passes["step"].isin(found.bars["step"].unique())]
    every = max(1, len(shown) // 14)
    for place, row in enumerate(shown.itertuples()):
        at = (float(row.start_s) - zero) * 1e3  # type: ignore[arg-type]
        fig.add_vline(x=at, line={"color": theme.tint(theme.MEANING["other"], 0.5), "width": 1})
        if place % every == 0:
            fig.add_annotation(
                x=at,
                y=1,
                yref="paper",
                yanchor="bottom",
                xanchor="left",
                text=f"{row.step}",
                showarrow=False,
                font={"size": 11},
            )


def lanes_finding(found: Timeline, first: int, last: int) -> tuple[str, str]:
    """How much of the window is waiting."""
    kind = "Recorded (solid)" if found.is_recorded else "SIMULATED (outlined)"
    detail = f"{kind}. Lines: where a pass begins, with its number. Pick a bar to explain its pass"
    shown = found.passes[found.passes["step"].between(first, last)]
    total = float(shown["total_s"].sum())
    if not total:
        return "Nothing ran in this window", detail
    waited = float(shown["stall_s"].sum())
    return (
        f"Passes {first} to {last}: {words.seconds(total)}, of which {words.percent(waited / total, 0)} "
        "is waiting for experts",
        detail,
    )


def passes(found: Frame, first: int, last: int, *, is_recorded: bool) -> go.Figure:
    """Time of every pass, waiting apart; the window is shaded."""
    step, rest, stall = _grouped(found)
    fig = go.Figure()
    for name, values, colour in (
        ("computing and all else", rest, theme.MEANING["compute"]),
        ("waiting for experts", stall, theme.MEANING["wait"]),
    ):
        fig.add_bar(
            x=step,
            y=values * 1e3,
            name=name,
            marker={
                "color": colour if is_recorded else theme.tint(colour, 0.4),
                "line": {"color": colour, "width": 0.5},
            },
            hovertemplate=f"pass %{{x}}: {name} %{{y:.3g}} ms<extra></extra>",
        )
    fig.add_vrect(
        x0=first - 0.5,
        x1=last + 0.5,
        fillcolor=theme.tint(theme.MEANING["other"], 0.25),
        line_width=0,
        layer="below",
    )
    theme.finish(fig, passes_finding(found), height=150)
    fig.update_layout(barmode="stack", bargap=0)
    fig.update_xaxes(title_text="pass")
    fig.update_yaxes(title_text="ms per pass", rangemode="tozero")
    return fig


def passes_finding(found: Frame) -> tuple[str, str]:
    """The pass that waits most."""
    detail = "The window below is shaded. Prompts make the tall bars"
    if not len(found) or not found["stall_s"].sum():
        return "No pass waits for experts", detail
    worst = found.loc[found["stall_s"].idxmax()]
    return (
        f"Pass {int(worst['step'])} ({escape(str(worst['phase']))}) waits longest: "
        f"{words.seconds(float(worst['stall_s']))}",
        detail,
    )


def _grouped(found: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step, seconds beside waiting, and seconds of waiting: means of neighbours where there are too many."""
    size = -(-len(found) // MOST_PASSES) if len(found) else 1
    group = np.arange(len(found)) // size
    means = found[["step", "total_s", "stall_s"]].groupby(group).mean()
    stall = means["stall_s"].to_numpy()
    return means["step"].to_numpy(), np.maximum(means["total_s"].to_numpy() - stall, 0), stall

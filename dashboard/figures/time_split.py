"""Where the wall time went, predicted above measured, part by part."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd
import plotly.graph_objects as go

from ...simulator.result import Result, VerifiedRun
from .. import theme, words
from .names import short_names


@dataclass(frozen=True, slots=True)
class Part:
    """One field of `TimeSplit`, its name for readers and its colour."""

    field: str
    name: str
    colour: str


PARTS = (
    Part("experts_s", "experts", theme.MEANING["compute"]),
    Part("mixer_s", "attention, norms, router", "#6FA3CC"),
    Part("stall_s", "waiting for loads", theme.MEANING["wait"]),
    Part("readback_s", "routing read-back", theme.MEANING["miss"]),
    Part("decision_s", "policy decision", theme.MEANING["demand"]),
    Part("lookahead_s", "look-ahead", theme.MEANING["prefetch"]),
    Part("schedule_s", "regrouping batches", "#8E6BB0"),
    Part("other_s", "other", theme.MEANING["other"]),
)


def time_split_frame(runs: Sequence[VerifiedRun]) -> pd.DataFrame:
    """One row per configuration, source and part, in seconds; measured: mean of the repeats."""
    names = short_names([run.label for run in runs], 34)
    rows = [
        {
            "configuration": name,
            "source": source,
            "part": part.name,
            "seconds": statistics.fmean(getattr(r.time, part.field) for r in results),
        }
        for run, name in zip(runs, names, strict=True)
        for source, results in _sources(run)
        for part in PARTS
    ]
    return pd.DataFrame(rows, columns=["configuration", "source", "part", "seconds"])


def time_split(runs: Sequence[VerifiedRun]) -> go.Figure:
    """Stacked bars in seconds, two per configuration: predicted hatched, measured solid."""
    frame = time_split_frame(runs)
    fig = go.Figure()
    for part in PARTS:
        rows = frame[frame["part"] == part.name]
        if not any(second > 0 for second in rows["seconds"]):
            continue
        fig.add_bar(
            y=[
                [escape(name) for name in rows["configuration"]],
                list(rows["source"]),
            ],
            x=rows["seconds"],
            name=part.name,
            orientation="h",
            marker={
                "color": part.colour,
                "line": {"color": part.colour, "width": 1.5},
                "pattern": {
                    "shape": ["/" if source == "predicted" else "" for source in rows["source"]],
                    "fillmode": "overlay",
                    "fgcolor": part.colour,
                    "bgcolor": theme.CLEAR,
                    "solidity": 0.35,
                    "size": 6,
                },
            },
            hovertemplate=f"%{{y}}<br>{part.name}: %{{x:.3g}} s<extra></extra>",
        )
    theme.finish(fig, time_split_finding(runs), height=20 + 68 * max(len(runs), 1), legend_rows=2)
    fig.update_layout(barmode="stack", bargap=0.25)
    fig.update_xaxes(title_text="seconds of the whole run", ticksuffix=" s", rangemode="tozero")
    fig.update_yaxes(autorange="reversed", showgrid=False)
    return fig


def time_split_finding(runs: Sequence[VerifiedRun]) -> tuple[str, str]:
    """The chart's title: the share of measured time spent waiting."""
    detail = "Hatched: predicted. Solid: measured, mean of the repeats"
    measured = [r for run in runs for r in run.measured if r.time.total_s > 0]
    if not measured:
        return "Where the time goes", detail
    shares = [r.time.stall_s / r.time.total_s for r in measured]
    low, high = words.percent(min(shares), 0), words.percent(max(shares), 0)
    spread = low if low == high else f"{low.removesuffix(' %')} to {high}"
    return f"Waiting for experts takes {spread} of the measured time", detail


def _sources(run: VerifiedRun) -> list[tuple[str, tuple[Result, ...]]]:
    pairs = [("predicted", (run.predicted,)), ("measured", run.measured)]
    return [(source, results) for source, results in pairs if results]

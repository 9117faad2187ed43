"""What tuning tried: predicted speed of every candidate, and what became of its demands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go

from ...simulator.result import Result
from .. import theme, words
from .names import short, short_names

MAX_BARS = 12
"""Bars a reader can still compare; the table has the rest."""


def candidates_frame(candidates: Sequence[Result]) -> pd.DataFrame:
    """One row per candidate, best first, with the numbers people choose by."""
    rows = [
        {
            "rank": rank,
            "policy": r.label,
            "tokens_per_s": r.tokens_per_s,
            "ttft_s": r.ttft_s,
            "tpot_s": r.tpot_s,
            "hit_rate": r.decode.hit_rate,
            "late_rate": r.decode.late_rate,
            "miss_rate": r.decode.miss_rate,
            "bytes_per_token": r.bytes_per_token,
            "stall_s": r.stall_s,
            "slots": r.slots,
            "slots_ratio": r.slots_ratio,
            "peak_device_bytes": r.peak_device_bytes,
        }
        for rank, r in enumerate(candidates, start=1)
    ]
    return pd.DataFrame(rows)


def speed(
    candidates: Sequence[Result],
    *,
    chosen: str = "",
    bounds: Mapping[str, float] | None = None,
    measured: Mapping[str, float] | None = None,
) -> go.Figure:
    """Tokens per second: predictions as outlines, bounds in grey, measurements as solid marks.

    `measured` holds tokens per second by the candidate's label.
    """
    shown = shortlist(candidates, chosen)
    colour = theme.MEANING["compute"]
    labels = bar_labels(shown, chosen)
    fig = go.Figure(
        go.Bar(
            y=labels,
            x=[r.tokens_per_s for r in shown],
            orientation="h",
            name="predicted",
            marker={
                "color": [theme.tint(colour, 0.25 if r.label == chosen else 0.1) for r in shown],
                "line": {"color": colour, "width": 2},
            },
            text=[_speed_text(r, measured or {}) for r in shown],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}<br>predicted %{x:.4g} tokens/s<extra></extra>",
        )
    )
    _add_bounds(fig, bounds or {})
    _add_measured(fig, shown, labels, measured or {})
    theme.finish(fig, speed_finding(shown, chosen), height=20 + 30 * _rows(fig))
    fig.update_xaxes(title_text="generated tokens per second", rangemode="tozero")
    fig.update_yaxes(autorange="reversed", showgrid=False)
    return fig


def shortlist(candidates: Sequence[Result], chosen: str) -> list[Result]:
    """The candidates a chart shows: the best, the chosen one, and the slowest to compare with."""
    if len(candidates) <= MAX_BARS:
        return list(candidates)
    keep = set(range(MAX_BARS - 1)) | {len(candidates) - 1}
    keep |= {i for i, r in enumerate(candidates) if r.label == chosen}
    return [r for i, r in enumerate(candidates) if i in keep]


def speed_finding(shown: Sequence[Result], chosen: str) -> tuple[str, str]:
    """The chart's title: how far the chosen policy is from the slowest one."""
    detail = "Outlined: predicted. Solid: measured. Grey: bounds nobody can run"
    if any(r.link_origin == "emulated" for r in shown):
        detail = f"EMULATED link. {detail}"
    pick = next((r for r in shown if r.label == chosen), None)
    if pick is None or len(shown) < 2:
        return "Predicted speed by policy", detail
    slowest = min(shown, key=lambda r: r.tokens_per_s)
    return (
        f"{escape(short(chosen))}: {words.times(pick.tokens_per_s, slowest.tokens_per_s)} "
        "the slowest candidate",
        detail,
    )


def outcomes(candidates: Sequence[Result], *, chosen: str = "") -> go.Figure:
    """Hit, late and miss shares of each candidate's decode demands, stacked to 100 %."""
    shown = shortlist(candidates, chosen)
    fig = go.Figure()
    for kind, values in (
        ("hit", [r.decode.hit_rate for r in shown]),
        ("late", [r.decode.late_rate for r in shown]),
        ("miss", [r.decode.miss_rate for r in shown]),
    ):
        colour = theme.MEANING[kind]
        fig.add_bar(
            y=bar_labels(shown, chosen),
            x=[value * 100 for value in values],
            name=kind,
            orientation="h",
            marker={"color": theme.tint(colour, 0.12), "line": {"color": colour, "width": 1.5}},
            text=[f"{kind} {value * 100:.0f} %" if value >= 0.08 else "" for value in values],
            textposition="inside",
            # Left to itself, Plotly picks a text colour as if the fill were not see-through.
            insidetextfont={"color": colour},
            textangle=0,
            insidetextanchor="middle",
            hovertemplate=f"%{{y}}<br>{kind}: %{{x:.1f}} % of demands<extra></extra>",
        )
    title = ("What a layer finds when it asks for an expert", "Decode, predicted; late: on its way")
    theme.finish(fig, title, height=20 + 30 * len(shown))
    fig.update_layout(barmode="stack")
    fig.update_xaxes(title_text="share of demanded experts", ticksuffix=" %", range=[0, 100])
    fig.update_yaxes(autorange="reversed", showgrid=False)
    return fig


def bar_labels(shown: Sequence[Result], chosen: str) -> list[str]:
    """The candidates' names on an axis, the chosen one in bold."""
    names = [escape(name) for name in short_names([r.label for r in shown])]
    return [
        f"<b>{name} (chosen)</b>" if r.label == chosen else name
        for r, name in zip(shown, names, strict=True)
    ]


def _add_bounds(fig: go.Figure, bounds: Mapping[str, float]) -> None:
    known = {name: value for name, value in bounds.items() if value > 0}
    if not known:
        return
    grey = theme.MEANING["other"]
    fig.add_bar(
        y=[f"<i>bound: {escape(short(name))}</i>" for name in known],
        x=list(known.values()),
        orientation="h",
        name="bound",
        marker={"color": theme.tint(grey, 0.15), "line": {"color": grey, "width": 1.5}},
        text=[f"\u2003{words.rate(value)}" for value in known.values()],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}<br>%{x:.4g} tokens/s<extra></extra>",
    )
    fig.update_layout(barmode="overlay")


def _add_measured(
    fig: go.Figure, shown: Sequence[Result], labels: list[str], measured: Mapping[str, float]
) -> None:
    known = [
        (name, measured[r.label])
        for r, name in zip(shown, labels, strict=True)
        if r.label in measured
    ]
    if not known:
        return
    fig.add_scatter(
        y=[name for name, _ in known],
        x=[speed for _, speed in known],
        mode="markers",
        name="measured",
        marker={"symbol": "diamond", "size": 12, "color": theme.MEANING["compute"]},
        hovertemplate="%{y}<br>measured %{x:.4g} tokens/s<extra></extra>",
    )


def _speed_text(result: Result, measured: Mapping[str, float]) -> str:
    """Spaces first: a measurement's mark may stand at the end of the bar."""
    text = f"\u2003{words.rate(result.tokens_per_s)}"
    found = measured.get(result.label)
    return text if found is None else f"{text}, measured {words.rate(found)}"


def _rows(fig: go.Figure) -> int:
    return len({label for trace in fig.data for label in (getattr(trace, "y", None) or ())})

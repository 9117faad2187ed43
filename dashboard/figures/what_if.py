"""One predicted configuration next to others: where its time goes, and what more memory or link would bring."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go

from ...simulator.result import Result
from .. import theme, words
from .names import short_names
from .time_split import PARTS

_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Of bandwidths, in GB/s."""


def split_frame(results: Sequence[Result]) -> pd.DataFrame:
    """One row per configuration and part of the time, in seconds per generated token."""
    rows = [
        {
            "policy": result.label,
            "source": result.source,
            "part": part.name,
            "seconds_per_token": _per_token(result, part.field),
        }
        for result in results
        for part in PARTS
    ]
    return pd.DataFrame(rows, columns=["policy", "source", "part", "seconds_per_token"])


def _per_token(result: Result, field: str) -> float:
    total = result.time.total_s
    tokens = result.tokens_per_s * (result.arrivals.span_s if result.arrivals else total)
    return getattr(result.time, field) / tokens if tokens else 0.0


def split(results: Sequence[Result], names: Sequence[str] = ()) -> go.Figure:
    """Stacked bars in milliseconds per token; predicted hatched, measured solid. `names` instead of their labels."""
    names = [escape(name) for name in names or short_names([r.label for r in results])]
    fig = go.Figure()
    for part in PARTS:
        values = [_per_token(result, part.field) * 1e3 for result in results]
        if not any(value > 0 for value in values):
            continue
        fig.add_bar(
            y=names,
            x=values,
            name=part.name,
            orientation="h",
            marker={
                "color": part.colour,
                "line": {"color": part.colour, "width": 1.5},
                "pattern": {
                    "shape": ["/" if r.source == "predicted" else "" for r in results],
                    "fillmode": "overlay",
                    "fgcolor": part.colour,
                    "bgcolor": theme.CLEAR,
                    "solidity": 0.35,
                    "size": 6,
                },
            },
            hovertemplate=f"%{{y}}<br>{part.name}: %{{x:.3g}} ms per token<extra></extra>",
        )
    theme.finish(fig, split_finding(results), height=24 + 34 * len(results), legend_rows=2)
    fig.update_layout(barmode="stack")
    fig.update_xaxes(title_text="milliseconds per generated token", rangemode="tozero")
    fig.update_yaxes(autorange="reversed", showgrid=False)
    return fig


def split_finding(results: Sequence[Result]) -> tuple[str, str]:
    """What the first configuration waits for."""
    detail = "Hatched: predicted. Solid: measured. Prompts included"
    if not results or not results[0].time.total_s:
        return "Where the time goes", detail
    first = results[0]
    share = first.time.stall_s / first.time.total_s
    return f"Waiting for experts takes {words.percent(share, 0)} of the time", detail


def line_frame(points: Sequence[tuple[float, Result]], axis: str) -> pd.DataFrame:
    """One row per value on the axis."""
    rows = [
        {axis: x, "tokens_per_s": r.tokens_per_s, "decode_hit_rate": r.decode.hit_rate}
        for x, r in points
    ]
    return pd.DataFrame(rows, columns=[axis, "tokens_per_s", "decode_hit_rate"])


def over_memory(points: Sequence[tuple[float, Result]], chosen: Result, share: float) -> go.Figure:
    """Predicted tokens/s of the policy over the share of experts resident."""
    points = [(x * 100, result) for x, result in points]
    fig = _line(points, (share * 100, chosen), "%{x:.1f} % of the experts: %{y:.4g} tokens/s")
    theme.finish(fig, over_memory_finding(points, chosen), height=260, is_narrow=True)
    fig.update_xaxes(title_text="share of all experts resident", ticksuffix=" %", range=[0, 104])
    fig.update_yaxes(title_text="predicted tokens/s", rangemode="tozero")
    return fig


def over_memory_finding(points: Sequence[tuple[float, Result]], chosen: Result) -> tuple[str, str]:
    """How much of the speed of the largest size the chosen one has."""
    if not points:
        return "Over memory", ""
    top = points[-1][1].tokens_per_s
    share = words.percent(chosen.tokens_per_s / top if top else 0, 0)
    return f"{share} of the speed with all the memory", "This policy at other sizes, all else equal"


def over_link(
    points: Sequence[tuple[float, Result]], chosen: Result, bandwidth: float
) -> go.Figure:
    """Predicted tokens/s of the policy over the link's bandwidth, on a logarithmic axis."""
    fig = _line(points, (bandwidth, chosen), "%{x:.4g} GB/s: %{y:.4g} tokens/s")
    theme.finish(fig, over_link_finding(points, chosen), height=260, is_narrow=True)
    fig.update_xaxes(title_text="link, GB/s (logarithmic)", type="log", tickvals=_TICKS)
    fig.update_yaxes(title_text="predicted tokens/s", rangemode="tozero")
    return fig


def over_link_finding(points: Sequence[tuple[float, Result]], chosen: Result) -> tuple[str, str]:
    """What the fastest link would bring."""
    if not points:
        return "Over the link", ""
    bandwidth, fastest = points[-1]
    return (
        f"{words.times(fastest.tokens_per_s, chosen.tokens_per_s)} behind {bandwidth:.4g} GB/s",
        "This policy behind declared links, all else equal",
    )


def _line(
    points: Sequence[tuple[float, Result]], chosen: tuple[float, Result], hover: str
) -> go.Figure:
    colour = theme.MEANING["compute"]
    fig = go.Figure()
    fig.add_scatter(
        x=[x for x, _ in points],
        y=[result.tokens_per_s for _, result in points],
        name="this policy",
        mode="lines+markers",
        line={"color": colour, "width": 2.5},
        marker={"symbol": "circle-open", "size": 7},
        hovertemplate=f"{hover}<extra></extra>",
    )
    fig.add_scatter(
        x=[chosen[0]],
        y=[chosen[1].tokens_per_s],
        name="as set above",
        mode="markers",
        marker={"symbol": "star-open", "size": 15, "color": theme.MEANING["wait"]},
        hovertemplate=f"as set above<br>{hover}<extra></extra>",
    )
    return fig

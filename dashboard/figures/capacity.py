"""The capacity curve: what share of demanded experts each cache finds resident, by its size."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go

from ...simulator.result import CapacityPoint, Result
from .. import theme, words


def series(points: Sequence[CapacityPoint]) -> dict[str, list[CapacityPoint]]:
    """The lines of the curve by name, each in order of size, bounds last."""
    many = len({point.allocation for point in points if not point.is_bound}) > 1
    out: dict[str, list[CapacityPoint]] = {}
    for p in sorted(points, key=lambda p: (p.is_bound, p.share)):
        name = f"{p.cache} ({p.allocation})" if many and not p.is_bound else p.cache
        out.setdefault(name, []).append(p)
    return out


def capacity_frame(points: Sequence[CapacityPoint]) -> pd.DataFrame:
    """One row per cache and size; `series` names the line a point belongs to."""
    rows = [
        {
            "series": name,
            "cache": p.cache,
            "allocation": p.allocation,
            "slots": p.slots,
            "share": p.share,
            "hit_rate": p.hit_rate,
            "is_bound": p.is_bound,
        }
        for name, line in series(points).items()
        for p in line
    ]
    return pd.DataFrame(rows)


def floor_share(result: Result) -> float | None:
    """Share of experts where r = 1: below it a step needs more experts than a layer has slots."""
    if result.slots_ratio <= 0 or not result.total_experts:
        return None
    return min(result.slots_ratio * result.slots / result.total_experts, 1.0)


def capacity(
    points: Sequence[CapacityPoint],
    *,
    floor: float | None = None,
    budget: float | None = None,
) -> go.Figure:
    """Hit rate over share of experts resident, one line per cache; bounds dashed and grey.

    `floor` shades the sizes where r ≥ 1; `budget` marks the share the tuning had to fit in.
    """
    fig = go.Figure()
    for index, (name, line) in enumerate(series(points).items()):
        fig.add_trace(
            _bound_line(name, line) if line[0].is_bound else _cache_line(name, line, index)
        )
    theme.finish(fig, capacity_finding(points, budget), height=360)
    _mark_floor(fig, floor)
    _mark_budget(fig, budget)
    fig.update_xaxes(
        title_text="share of all experts resident on the device", ticksuffix=" %", range=[0, 102]
    )
    fig.update_yaxes(title_text="hit rate, decode", ticksuffix=" %", range=[0, 104])
    return fig


def capacity_finding(points: Sequence[CapacityPoint], budget: float | None) -> tuple[str, str]:
    """The curve's title: the best cache at the budget, and what is left to the bound."""
    detail = "Decode, loads on demand only; a hit is an expert resident when a layer asks for it"
    caches = [p for p in points if not p.is_bound]
    if not caches:
        return "No cache was evaluated", detail
    wanted = 0.5 if budget is None else budget
    at = min((p.share for p in caches), key=lambda share: abs(share - wanted))
    best = max((p for p in caches if p.share == at), key=lambda p: p.hit_rate)
    text = (
        f"With {words.percent(at, 0)} of the experts resident, {escape(best.cache)} "
        f"hits {words.percent(best.hit_rate, 0)}"
    )
    top = [p.hit_rate for p in points if p.is_bound and p.share == at]
    return f"{text}; perfect foresight {words.percent(max(top), 0)}" if top else text, detail


def _cache_line(name: str, line: Sequence[CapacityPoint], index: int) -> go.Scatter:
    colour = theme.SERIES[index % len(theme.SERIES)]
    return go.Scatter(
        x=[p.share * 100 for p in line],
        y=[p.hit_rate * 100 for p in line],
        customdata=[p.slots for p in line],
        name=escape(name),
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"symbol": f"{theme.SYMBOLS[index % len(theme.SYMBOLS)]}-open", "size": 8},
        hovertemplate=f"{escape(name)}: %{{y:.1f}} % hits<br>"
        "%{x:.1f} % resident (%{customdata} slots)<extra></extra>",
    )


def _bound_line(name: str, line: Sequence[CapacityPoint]) -> go.Scatter:
    return go.Scatter(
        x=[p.share * 100 for p in line],
        y=[p.hit_rate * 100 for p in line],
        customdata=[p.slots for p in line],
        name=f"{escape(name)} (bound: knows the future)",
        mode="lines",
        line={"color": theme.MEANING["other"], "width": 3, "dash": "dash"},
        hovertemplate=f"{escape(name)} bound: %{{y:.1f}} % hits<br>"
        "%{x:.1f} % resident (%{customdata} slots)<extra></extra>",
    )


def _mark_floor(fig: go.Figure, floor: float | None) -> None:
    if floor is None:
        return
    fig.add_vrect(
        x0=0, x1=floor * 100, fillcolor=theme.tint(theme.MEANING["miss"], 0.14), line_width=0
    )
    # Beside the band, not in it: a narrow band would cut the words off.
    fig.add_annotation(
        x=floor * 100,
        y=0.02,
        yref="paper",
        yanchor="bottom",
        xanchor="left" if floor < 0.6 else "right",
        text=f"r ≥ 1 below {words.percent(floor, 0)}: one step needs<br>"
        "more experts than a layer holds",
        align="left",
        showarrow=False,
    )


def _mark_budget(fig: go.Figure, budget: float | None) -> None:
    if budget is None:
        return
    fig.add_vline(x=budget * 100, line={"color": theme.MEANING["other"], "width": 1.5})
    fig.add_annotation(
        x=budget * 100,
        y=0.5 if budget > 0.8 else 0.3,
        yref="paper",
        xanchor="right" if budget > 0.8 else "left",
        text=f" budget: {words.percent(budget, 0)} ",
        showarrow=False,
    )

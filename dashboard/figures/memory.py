"""What memory buys: predicted speed and hit rate over the bytes that experts may take, cache by cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd
import plotly.graph_objects as go

from ...simulator.result import Result
from .. import theme, words
from ..frames import Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What is marked on the axis of memory, in slots; and the speeds that are lines across.

    `floor`: below it some event does not fit; `tight`: r = 1 there; `answer` is what was asked for, None if nothing
    reaches it.
    """

    expert_bytes: int
    floor: int
    tight: float
    resident_tokens_per_s: float
    wanted_tokens_per_s: float | None = None
    answer: int | None = None


def memory_frame(points: Sequence[tuple[str, Result]], expert_bytes: int) -> Frame:
    """One row per cache and size, with the numbers people choose by."""
    rows = [
        {
            "cache": name,
            "slots": r.slots,
            "share": r.slots / r.total_experts,
            "expert_bytes": r.slots * expert_bytes,
            "tokens_per_s": r.tokens_per_s,
            "decode_hit_rate": r.decode.hit_rate,
            "r": r.slots_ratio,
            "peak_device_bytes": r.peak_device_bytes,
            "is_bound": "belady" in name,
        }
        for name, r in points
    ]
    return pd.DataFrame(rows)


def best_frame(frame: Frame) -> Frame:
    """The fastest cache that can be deployed, by size."""
    usable = frame[~frame["is_bound"]]
    places = usable.groupby("slots")["tokens_per_s"].idxmax()
    return usable.loc[places].sort_values("slots").reset_index(drop=True)


def speed(frame: Frame, named: Sequence[str], marks: Marks) -> go.Figure:
    """Predicted tokens/s over memory."""
    fig = _lines(frame, named, "tokens_per_s", 1.0, "%{y:.4g} tokens/s")
    top = _unit(frame)[0] * marks.expert_bytes * frame["slots"].max()
    fig.add_scatter(
        x=[0, top],
        y=[marks.resident_tokens_per_s] * 2,
        name="everything resident (bound)",
        mode="lines",
        line={"color": theme.MEANING["other"], "width": 1.5, "dash": "dot"},
        hovertemplate="everything resident: %{y:.4g} tokens/s<extra></extra>",
    )
    theme.finish(fig, speed_finding(frame), height=380, legend_rows=2)
    _axes(fig, frame)
    fig.update_yaxes(title_text="predicted tokens/s", rangemode="tozero")
    _floor(fig, frame, marks)
    _answer(fig, frame, marks)
    return fig


def speed_finding(frame: Frame) -> tuple[str, str]:
    """Where more memory stops paying."""
    best = best_frame(frame)
    top = best["tokens_per_s"].max()
    enough = best[best["tokens_per_s"] >= 0.95 * top].iloc[0]
    return (
        f"95 % of the best predicted speed takes {words.size(enough['expert_bytes'])} for experts "
        f"({words.percent(enough['share'], 0)} of them), with {escape(enough['cache'])}",
        "Predicted, on demand only (no prefetch). Grey: the other caches that can be deployed",
    )


def hits(frame: Frame, named: Sequence[str], marks: Marks) -> go.Figure:
    """Decode hit rate over memory."""
    fig = _lines(frame, named, "decode_hit_rate", 100.0, "%{y:.1f} % hits")
    theme.finish(fig, hits_finding(frame, marks), height=340, legend_rows=2)
    _axes(fig, frame)
    fig.update_yaxes(title_text="hit rate, decode", ticksuffix=" %", range=[0, 104])
    _floor(fig, frame, marks)
    return fig


def hits_finding(frame: Frame, marks: Marks) -> tuple[str, str]:
    """What is left between the caches and the one that knows the future, at half of the experts."""
    slots = frame["slots"].iloc[(frame["share"] - 0.5).abs().argsort().iloc[0]]
    here = frame[frame["slots"] == slots]
    usable = here[~here["is_bound"]]
    best = usable.loc[usable["decode_hit_rate"].idxmax()]
    bound = here[here["is_bound"]]["decode_hit_rate"]
    text = (
        f"With {words.percent(best['share'], 0)} of the experts, {escape(best['cache'])} hits "
        f"{words.percent(best['decode_hit_rate'], 0)}"
    )
    if len(bound):
        text += f"; perfect foresight {words.percent(bound.max(), 0)}"
    return (
        text,
        "A hit: resident when a layer asks. Predicted for prompts the caches did not learn from",
    )


def _lines(frame: Frame, named: Sequence[str], column: str, factor: float, value: str) -> go.Figure:
    fig = go.Figure()
    scale, unit = _unit(frame)
    others = [c for c in dict.fromkeys(frame["cache"]) if c not in named and "belady" not in c]
    order = [*others, *(c for c in named if c in set(frame["cache"]))]
    for cache in [*order, *(c for c in dict.fromkeys(frame["cache"]) if "belady" in c)]:
        rows = frame[frame["cache"] == cache].sort_values("slots")
        index = list(named).index(cache) if cache in named else -1
        fig.add_scatter(
            x=rows["expert_bytes"] * scale,
            y=rows[column] * factor,
            customdata=rows[["slots", "share", "r"]].assign(share=rows["share"] * 100),
            name=_line_name(cache),
            showlegend=index >= 0 or "belady" in cache,
            mode="lines+markers" if index >= 0 else "lines",
            line=_line_style(cache, index),
            marker={"symbol": f"{theme.SYMBOLS[index % 6]}-open", "size": 8},
            hovertemplate=f"{escape(cache)}: {value}<br>%{{x:.4g}} {unit} = %{{customdata[0]}} slots, "
            "%{customdata[1]:.1f} % of the experts<br>r = %{customdata[2]:.2f}<extra></extra>",
        )
    return fig


def _line_name(cache: str) -> str:
    return f"{escape(cache)} (bound: knows the future)" if "belady" in cache else escape(cache)


def _line_style(cache: str, index: int) -> dict[str, object]:
    if "belady" in cache:
        return {"color": theme.MEANING["other"], "width": 3, "dash": "dash"}
    if index < 0:
        return {"color": theme.tint(theme.MEANING["other"], 0.45), "width": 1}
    return {"color": theme.SERIES[index % len(theme.SERIES)], "width": 2.5}


def _unit(frame: Frame) -> tuple[float, str]:
    return words.size_unit(float(frame["expert_bytes"].max()))


def _axes(fig: go.Figure, frame: Frame) -> None:
    scale, unit = _unit(frame)
    fig.update_xaxes(
        title_text=f"device memory for experts, {unit}",
        range=[0, float(frame["expert_bytes"].max()) * scale * 1.02],
    )


def _floor(fig: go.Figure, frame: Frame, marks: Marks) -> None:
    scale, _ = _unit(frame)
    end = marks.floor * marks.expert_bytes * scale
    fig.add_vrect(
        x0=0, x1=end, fillcolor=theme.tint(theme.MEANING["miss"], 0.14), line_width=0, layer="below"
    )
    is_right = marks.floor * marks.expert_bytes < 0.6 * float(frame["expert_bytes"].max())
    fig.add_annotation(
        x=end,
        y=0.02,
        yref="paper",
        yanchor="bottom",
        xanchor="left" if is_right else "right",
        align="left",
        showarrow=False,
        text=f" floor: {marks.floor} slots. Left of it some event<br> does not fit its layer’s slots "
        f"(r = 1 at {marks.tight:.0f} slots)",
    )


def _answer(fig: go.Figure, frame: Frame, marks: Marks) -> None:
    if marks.answer is None or marks.wanted_tokens_per_s is None:
        return
    scale, unit = _unit(frame)
    x = marks.answer * marks.expert_bytes * scale
    fig.add_scatter(
        x=[x],
        y=[marks.wanted_tokens_per_s],
        mode="markers+text",
        marker={"symbol": "star-open", "size": 15, "color": theme.MEANING["wait"]},
        text=[f"  {x:.4g} {unit}"],
        textposition="bottom right"
        if x < 0.8 * float(frame["expert_bytes"].max()) * scale
        else "bottom left",
        name="what you asked for",
        hovertemplate=f"asked for: %{{y:.4g}} tokens/s<br>needs %{{x:.4g}} {unit}<extra></extra>",
    )

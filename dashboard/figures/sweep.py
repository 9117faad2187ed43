"""What a sweep tried: the front, all of it at once, and which choice matters."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ...simulator.sweep_row import OBJECTIVES
from .. import theme, words
from ..frames import Frame

MOST_POINTS: Final = 4_000
MOST_LINES: Final = 240
"""Lines of parallel coordinates that an eye can follow."""
FACTORS: Final = (
    "slots",
    "link",
    "cache",
    "allocation",
    "predictor",
    "misses",
    "scheduler",
    "routing",
    "params",
)
"""What a sweep chooses between, as columns of its rows."""

_UNITS: Final[dict[str, tuple[float, str]]] = {
    "tokens_per_s": (1, "predicted tokens/s"),
    "decode_hit_rate": (100, "hit rate in decode, %"),
    "prefill_hit_rate": (100, "hit rate in prefill, %"),
    "ttft_mean_s": (1e3, "time to first token, mean, ms"),
    "ttft_p95_s": (1e3, "time to first token, p95, ms"),
    "tpot_mean_s": (1e3, "time per further token, mean, ms"),
    "tpot_p95_s": (1e3, "time per further token, p95, ms"),
    "bytes_per_token": (2**-20, "moved per token, MiB"),
    "stall_s": (1, "waiting for loads, s"),
    "link_busy_share": (100, "link busy, %"),
    "peak_device_bytes": (2**-20, "peak device memory, MiB"),
    "slots": (1, "slots"),
}


def axis_title(column: str) -> str:
    """A column with its unit."""
    return _UNITS.get(column, (1, column))[1]


def front_of(frame: Frame, x: str, y: str) -> Frame:
    """Rows that can be deployed and that no other beats in both columns, in order of x."""
    usable = frame[~frame["is_bound"]]
    signs = [1 if OBJECTIVES[name] == "minimize" else -1 for name in (x, y)]
    order = usable.assign(a=usable[x] * signs[0], b=usable[y] * signs[1]).sort_values(["a", "b"])
    best = order["b"].cummin()
    is_first = best.diff().fillna(-1) < 0
    return order[is_first].drop(columns=["a", "b"])


def drawn(frame: Frame, front: Frame, most: int = MOST_POINTS) -> Frame:
    """At most so many rows: the front and others evenly by speed."""
    if len(frame) <= most:
        return frame
    others = frame.drop(front.index).sort_values("tokens_per_s")
    places = np.linspace(0, len(others) - 1, max(2, most - len(front))).astype(int)
    return pd.concat([front, others.iloc[np.unique(places)]])


def pareto(frame: Frame, x: str, y: str) -> go.Figure:
    """All configurations, the front as a line, bounds as crosses. Everything here is predicted."""
    front = front_of(frame, x, y)
    shown = drawn(frame, front)
    fig = go.Figure()
    for name, rows, symbol, colour in _groups(shown[~shown["is_bound"]]):
        fig.add_trace(_points(rows, x, y, name, symbol, colour))
    bounds = shown[shown["is_bound"]]
    if len(bounds):
        fig.add_trace(
            _points(bounds, x, y, "bound: knows the future", "x-thin-open", theme.MEANING["other"])
        )
    fig.add_scatter(
        x=front[x] * _scale(x),
        y=front[y] * _scale(y),
        mode="lines",
        line={"color": theme.MEANING["other"], "width": 1.5, "shape": "hv", "dash": "dot"},
        name="front",
        hoverinfo="skip",
    )
    theme.finish(fig, pareto_finding(frame, x, y), height=440, legend_rows=3)
    fig.update_xaxes(title_text=axis_title(x))
    fig.update_yaxes(title_text=axis_title(y))
    return fig


def _groups(rows: Frame) -> list[tuple[str, Frame, str, str]]:
    """Rows by predictor: name, rows, symbol, colour. Those that reach least are one group, drawn below the others."""
    best = rows.groupby("predictor")["tokens_per_s"].max().sort_values(ascending=False)
    named = [name for name in best.index if name != "none"][:4]
    named = ["none", *named] if "none" in best.index else named
    found = [
        (
            "no prefetch" if name == "none" else f"prefetch: {name}",
            rows[rows["predictor"] == name],
            f"{theme.SYMBOLS[place]}-open",
            theme.SERIES[place],
        )
        for place, name in enumerate(named)
    ]
    rest = rows[~rows["predictor"].isin(named)]
    grey = theme.tint(theme.MEANING["other"], 0.5)
    return [*([("other prefetch", rest, "circle-open", grey)] if len(rest) else []), *found]


def _points(rows: Frame, x: str, y: str, name: str, symbol: str, colour: str) -> go.Scattergl:
    return go.Scattergl(
        x=rows[x] * _scale(x),
        y=rows[y] * _scale(y),
        mode="markers",
        name=escape(name),
        customdata=rows["key"],
        text=[escape(label) for label in rows["label"]],
        marker={"symbol": symbol, "size": 9, "color": colour, "line": {"width": 1.5}},
        hovertemplate=f"%{{text}}<br>{axis_title(x)}: %{{x:.4g}}<br>{axis_title(y)}: %{{y:.4g}}"
        "<extra></extra>",
    )


def _scale(column: str) -> float:
    return _UNITS.get(column, (1.0, ""))[0]


def pareto_finding(frame: Frame, x: str, y: str) -> tuple[str, str]:
    """How many of all are worth having."""
    detail = "Predicted. Dotted: the front, what no other beats in both"
    front = front_of(frame, x, y)
    usable = int((~frame["is_bound"]).sum())
    hidden = len(frame) - len(drawn(frame, front))
    more = f". {hidden:,} of the others are not drawn" if hidden else ""
    return f"{len(front)} of {usable:,} configurations are beaten by none in both", detail + more


def coordinates(frame: Frame) -> go.Figure:
    """Every configuration as a line over its choices and outcomes, coloured by speed."""
    shown = drawn(frame, frame.head(0), MOST_LINES)
    choices = [n for n in FACTORS if n in shown and n != "params" and shown[n].nunique() > 1]
    outcomes = ("decode_hit_rate", "bytes_per_token", "peak_device_bytes", "tokens_per_s")
    dimensions = [
        *(_dimension(shown, name) for name in choices),
        *({"label": _short(n), "values": (shown[n] * _scale(n)).tolist()} for n in outcomes),
    ]
    fig = go.Figure(
        go.Parcoords(
            dimensions=dimensions,
            line={
                "color": shown["tokens_per_s"],
                "colorscale": theme.SHARE_SCALE,
                "showscale": True,
                "colorbar": {"title": {"text": "tokens/s"}, "thickness": 14},
            },
            labelfont={"size": 12},
            tickfont={"size": 11},
            unselected={"line": {"opacity": 0.04}},
        )
    )
    theme.finish(fig, coordinates_finding(frame), height=440, above=44, legend_rows=0)
    fig.update_layout(margin={"l": 90, "r": 40})
    return fig


def _dimension(shown: Frame, name: str) -> dict[str, Any]:
    if name == "slots":
        return {"label": "slots", "values": shown[name].tolist()}
    names = list(dict.fromkeys(shown.sort_values("tokens_per_s")[name].astype(str)))
    codes = {value: code for code, value in enumerate(names)}
    return {
        "label": name,
        "values": [codes[str(value)] for value in shown[name]],
        "tickvals": list(codes.values()),
        "ticktext": [text if len(text) <= 14 else f"{text[:13]}…" for text in names],
    }


def _short(column: str) -> str:
    return {
        "decode_hit_rate": "hits, %",
        "bytes_per_token": "MiB/token",
        "peak_device_bytes": "peak MiB",
        "tokens_per_s": "tokens/s",
    }[column]


def coordinates_finding(frame: Frame) -> tuple[str, str]:
    """What the fastest tenth have in common."""
    hidden = len(frame) - MOST_LINES
    more = f"; {hidden:,} of {len(frame):,} are left out, evenly by speed" if hidden > 0 else ""
    detail = f"Predicted. Drag along an axis to keep some of the lines{more}"
    top = frame.nlargest(max(1, len(frame) // 10), "tokens_per_s")
    shared = [
        f"{name} {top[name].mode().iloc[0]}"
        for name in ("cache", "allocation", "predictor")
        if frame[name].nunique() > 1 and (top[name] == top[name].mode().iloc[0]).mean() >= 0.6
    ]
    if not shared:
        return "The fastest tenth have no choice in common", detail
    return f"Most of the fastest tenth have {escape(', '.join(shared))}", detail


def importance_frame(frame: Frame, objective: str) -> Frame:
    """Share of an objective's variance that each choice explains by itself; most first.

    The variance of the group means over the whole variance (first-order effects). What is left over comes from
    choices together.
    """
    values = frame[objective].astype(float)
    total = float(values.var(ddof=0))
    rows = []
    for name in FACTORS:
        if name not in frame or frame[name].nunique() < 2:
            continue
        means = frame.groupby(name)[objective].transform("mean")
        rows.append({"choice": name, "share": float(means.var(ddof=0)) / total if total else 0.0})
    found: Frame = pd.DataFrame(rows, columns=["choice", "share"])
    found = found[found["share"] >= 0.001]
    return found.sort_values("share", ascending=False, ignore_index=True)


def importance(frame: Frame, objective: str) -> go.Figure:
    """Bars of what each choice explains."""
    found = importance_frame(frame, objective)
    colour = theme.MEANING["compute"]
    fig = go.Figure(
        go.Bar(
            y=found["choice"],
            x=found["share"] * 100,
            orientation="h",
            marker={"color": theme.tint(colour, 0.25), "line": {"color": colour, "width": 1.5}},
            text=[words.percent(share, 0) for share in found["share"]],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: explains %{x:.1f} % by itself<extra></extra>",
        )
    )
    theme.finish(
        fig,
        importance_finding(frame, objective),
        height=30 + 32 * max(1, len(found)),
        legend_rows=0,
    )
    fig.update_xaxes(
        title_text=f"share of the variance of {axis_title(objective)}", ticksuffix=" %"
    )
    fig.update_xaxes(range=[0, 105])
    fig.update_yaxes(autorange="reversed", showgrid=False)
    return fig


def importance_finding(frame: Frame, objective: str) -> tuple[str, str]:
    """The choice that matters most."""
    detail = "Each choice by itself, over all that was tried; the rest comes from choices together"
    found = importance_frame(frame, objective)
    if not len(found) or not found["share"].iloc[0]:
        return "No choice makes a difference", detail
    return (
        f"{found['choice'].iloc[0]} matters most: it explains {words.percent(found['share'].iloc[0], 0)}",
        detail,
    )


def columns_of(frame: Frame) -> Sequence[str]:
    """Objectives that every row has a number for."""
    return [name for name in OBJECTIVES if name in frame and frame[name].notna().all()]

"""How a run goes: its rates over the last minutes, and what it holds on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...tracer.live import LivePoint
from .. import theme, words
from ..frames import Frame


@dataclass(frozen=True, slots=True)
class Rate:
    """A line of its own: title with the unit, field of a point, factor to that unit, colour; `top` if it is bounded."""

    title: str
    field: str
    factor: float
    colour: str
    text: Callable[[float], str]
    top: float | None = None


RATES = (
    Rate("tokens/s", "tokens_per_s", 1.0, theme.MEANING["compute"], words.rate),
    Rate("hits, %", "hit_rate", 100.0, theme.MEANING["hit"], words.percent, 104.0),
    Rate(
        "link, GB/s",
        "link_Bps",
        1e-9,
        theme.MEANING["demand"],
        lambda value: f"{value / 1e9:.3g} GB/s",
    ),
    Rate("waiting, %", "stall_share", 100.0, theme.MEANING["wait"], words.percent, 104.0),
)
_PANEL = 84
_GAP = 36
_MEMORY_NAMES = {
    "non_expert_weights": "other weights",
    "slots": "experts (slots)",
    "experts": "experts",
    "kv_cache": "KV cache",
    "activations": "working tensors",
    "staging": "staging",
    "predictor": "predictor",
}
_MEMORY_COLOURS = {
    "non_expert_weights": theme.MEANING["other"],
    "slots": theme.MEANING["hit"],
    "experts": theme.MEANING["hit"],
    "kv_cache": theme.MEANING["compute"],
    "activations": theme.MEANING["late"],
    "staging": theme.MEANING["prefetch"],
    "predictor": theme.MEANING["miss"],
}


def rates_frame(points: Sequence[LivePoint]) -> Frame:
    """One row per point, as recorded: seconds, tokens/s, shares, bytes per second."""
    names = ["at_s", *(rate.field for rate in RATES)]
    rows = [[getattr(point, name) for name in names] for point in points]
    return pd.DataFrame(rows, columns=names).astype(float)


def rates(points: Sequence[LivePoint]) -> go.Figure:
    """One panel per rate that the run has, over the seconds since it began; all measured."""
    frame = rates_frame(points)
    shown = shown_rates(points)
    height = len(shown) * _PANEL + (len(shown) - 1) * _GAP
    fig = make_subplots(
        rows=len(shown),
        cols=1,
        shared_xaxes=True,
        subplot_titles=[rate.title for rate in shown],
        vertical_spacing=_GAP / height if len(shown) > 1 else 0.0,
    )
    for row, rate in enumerate(shown, start=1):
        fig.add_trace(_line(frame, rate), row=row, col=1)
        top = rate.top or _headroom(frame[rate.field] * rate.factor)
        fig.update_yaxes(range=[0, top], nticks=4, row=row, col=1)
    theme.finish(fig, rates_finding(points), height=height, above=22, legend_rows=0)
    fig.update_layout(showlegend=False)
    fig.update_xaxes(title_text="seconds since the command began", row=len(shown), col=1)
    fig.update_annotations(font_size=13, x=0, xanchor="left")
    return fig


def shown_rates(points: Sequence[LivePoint]) -> list[Rate]:
    """Rates of which there is at least one value; speed always."""
    return [
        rate
        for rate in RATES
        if rate.field == "tokens_per_s"
        or any(getattr(point, rate.field) is not None for point in points)
    ]


def rates_finding(points: Sequence[LivePoint]) -> tuple[str, str]:
    """The latest speed, next to that of the stretch shown."""
    detail = "Measured, second by second; the latest minutes"
    if not points:
        return "No pass has ended yet", detail
    latest = points[-1].tokens_per_s
    middle = pd.Series([point.tokens_per_s for point in points]).median()
    return f"{words.rate(latest)} tokens/s now, median {words.rate(middle)}", detail


def memory_frame(memory: Mapping[str, int]) -> pd.DataFrame:
    """One row per class, in bytes."""
    rows = [{"class": _name(key), "bytes": size} for key, size in memory.items() if size > 0]
    return pd.DataFrame(rows, columns=["class", "bytes"])


def memory(classes: Mapping[str, int]) -> go.Figure:
    """One bar, class behind class."""
    total = float(sum(classes.values()))
    scale, unit = words.size_unit(total)
    fig = go.Figure()
    for key, size in classes.items():
        if size <= 0:
            continue
        fig.add_bar(
            y=["device"],
            x=[size * scale],
            name=_name(key),
            orientation="h",
            marker=theme.solid(_MEMORY_COLOURS.get(key, theme.MEANING["other"])),
            hovertemplate=f"{_name(key)}: {words.size(size)}<extra></extra>",
        )
    theme.finish(fig, memory_finding(classes), height=70, legend_rows=1)
    fig.update_layout(barmode="stack")
    fig.update_xaxes(title_text=f"bytes on the device, {unit}", rangemode="tozero")
    fig.update_yaxes(showticklabels=False, showgrid=False)
    return fig


def memory_finding(classes: Mapping[str, int]) -> tuple[str, str]:
    """The sum and the largest class."""
    total = sum(classes.values())
    largest = max(classes, key=lambda key: classes[key])
    share = classes[largest] / total if total else 0.0
    return (
        f"{words.size(total)} on the device, {words.percent(share, 0)} of it {_name(largest)}",
        "Weights and slots counted, working tensors and KV cache at their peak, as far as they are known",
    )


def _line(frame: Frame, rate: Rate) -> go.Scatter:
    return go.Scatter(
        x=frame["at_s"],
        y=frame[rate.field] * rate.factor,
        mode="lines",
        line={"color": rate.colour, "width": 2},
        fill="tozeroy",
        fillcolor=theme.tint(rate.colour, 0.12),
        customdata=[rate.text(value) for value in frame[rate.field]],
        hovertemplate="%{x:.0f} s: %{customdata}" + f"<extra>{rate.title.split(',')[0]}</extra>",
    )


def _headroom(values: Frame) -> float:
    top = float(values.max()) if len(values) else 0.0
    return top * 1.12 if top > 0 else 1.0


def _name(key: str) -> str:
    return _MEMORY_NAMES.get(key, words.label(key))

"""Two to four results next to each other, quantity by quantity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...simulator.result import Result
from .. import theme, words
from .names import short_names


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a panel shows: its title with the unit, the value in that unit, and as a person reads it."""

    title: str
    column: str
    value: Callable[[Result], float]
    text: Callable[[Result], str]


QUANTITIES = (
    Quantity(
        "tokens/s", "tokens_per_s", lambda r: r.tokens_per_s, lambda r: words.rate(r.tokens_per_s)
    ),
    Quantity(
        "time to first token, ms",
        "ttft_ms",
        lambda r: r.ttft_s * 1e3,
        lambda r: words.seconds(r.ttft_s),
    ),
    Quantity(
        "time per further token, ms",
        "tpot_ms",
        lambda r: r.tpot_s * 1e3,
        lambda r: words.seconds(r.tpot_s),
    ),
    Quantity(
        "hits in decode, %",
        "decode_hit_percent",
        lambda r: r.decode.hit_rate * 100,
        lambda r: words.percent(r.decode.hit_rate),
    ),
    Quantity(
        "moved per token, MiB",
        "mib_per_token",
        lambda r: r.bytes_per_token / 2**20,
        lambda r: words.size(r.bytes_per_token),
    ),
    Quantity(
        "peak device memory, MiB",
        "peak_mib",
        lambda r: r.peak_device_bytes / 2**20,
        lambda r: words.size(r.peak_device_bytes),
    ),
)
COLUMNS = 2


def compare_frame(chosen: Mapping[str, Result]) -> pd.DataFrame:
    """One row per result, one column per quantity."""
    rows = [
        {"result": name, "source": r.source, **{q.column: q.value(r) for q in QUANTITIES}}
        for name, r in chosen.items()
    ]
    return pd.DataFrame(rows)


def display_names(chosen: Mapping[str, Result]) -> list[str]:
    """Names short enough for an axis: policy and source, without the file."""
    shorts = short_names([r.label for r in chosen.values()], 30, number=False)
    names = [f"{name}, {r.source}" for name, r in zip(shorts, chosen.values(), strict=True)]
    return short_names(names, 44)


def compare(chosen: Mapping[str, Result]) -> go.Figure:
    """One panel per quantity, one bar per result; predicted outlined, measured filled, the first one is 1×."""
    rows = -(-len(QUANTITIES) // COLUMNS)
    panel, gap = 14 + 34 * len(chosen), 76
    height = rows * panel + (rows - 1) * gap
    fig = make_subplots(
        rows=rows,
        cols=COLUMNS,
        shared_yaxes=True,
        subplot_titles=[q.title for q in QUANTITIES],
        horizontal_spacing=0.05,
        vertical_spacing=gap / height,
    )
    names = [escape(name) for name in display_names(chosen)]
    for place, quantity in enumerate(QUANTITIES):
        row, column = divmod(place, COLUMNS)
        fig.add_trace(_panel(quantity, names, chosen), row=row + 1, col=column + 1)
        top = max(quantity.value(r) for r in chosen.values())
        fig.update_xaxes(range=[0, top * 1.42 or 1], row=row + 1, col=column + 1)
    theme.finish(fig, compare_finding(chosen), height=height, above=22, legend_rows=0)
    fig.update_layout(showlegend=False)
    fig.update_yaxes(autorange="reversed", type="category", showgrid=False)
    fig.update_xaxes(nticks=5)
    fig.update_xaxes(title_text="axes begin at 0; × is next to the first one", row=rows, col=1)
    fig.update_annotations(font_size=13)
    return fig


def _panel(quantity: Quantity, names: list[str], chosen: Mapping[str, Result]) -> go.Bar:
    results = list(chosen.values())
    first = quantity.value(results[0])
    # A forecast and its measurement share a colour.
    labels = list(dict.fromkeys(r.label for r in results))
    colours = [theme.SERIES[labels.index(r.label) % len(theme.SERIES)] for r in results]
    return go.Bar(
        y=names,
        x=[quantity.value(r) for r in results],
        orientation="h",
        marker={
            "color": [
                colour if r.source == "measured" else theme.tint(colour, 0.14)
                for r, colour in zip(results, colours, strict=True)
            ],
            "line": {"color": colours, "width": 2},
        },
        text=[
            f" {quantity.text(r)}"
            + ("" if place == 0 else f"  {words.times(quantity.value(r), first)}")
            for place, r in enumerate(results)
        ],
        textposition="outside",
        cliponaxis=False,
        hovertemplate=f"%{{y}}<br>{quantity.title}: %{{x:.4g}}<extra></extra>",
    )


def compare_finding(chosen: Mapping[str, Result]) -> tuple[str, str]:
    """The fastest of them."""
    detail = "Outlined: predicted. Solid: measured"
    if any(r.link_origin == "emulated" for r in chosen.values()):
        detail = f"EMULATED link. {detail}"
    fastest = max(chosen.values(), key=lambda r: r.tokens_per_s)
    slowest = min(chosen.values(), key=lambda r: r.tokens_per_s)
    (name,) = short_names([fastest.label], 40)
    return (
        f"{escape(name)} ({fastest.source}) is the fastest: "
        f"{words.times(fastest.tokens_per_s, slowest.tokens_per_s)} the slowest of them",
        detail,
    )

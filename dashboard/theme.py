"""One palette by meaning, and the one layout and configuration every figure gets.

Text, grid and background are left to Streamlit, which knows whether the reader uses the light or
the dark theme. Marks are drawn in mid-light colours that keep a contrast of 3:1 on both, and those
that stand side by side stay apart for colour-blind readers (tests/dashboard/test_theme.py).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Final

import plotly.graph_objects as go

MEANING: Final[dict[str, str]] = {
    "hit": "#0F9D8A",
    "late": "#C28800",
    "miss": "#A65AC8",
    "demand": "#B8860B",
    "prefetch": "#C56FA8",
    "compute": "#2A82C4",
    "wait": "#D55E00",
    "other": "#7C7F87",
}
"""What a colour says, everywhere in the dashboard."""

SERIES: Final[tuple[str, ...]] = (
    MEANING["compute"],
    MEANING["wait"],
    MEANING["hit"],
    MEANING["miss"],
    MEANING["late"],
    MEANING["prefetch"],
)
"""Colours for things that are merely different from each other, such as cache policies."""

DASHES: Final[tuple[str, ...]] = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS: Final[tuple[str, ...]] = ("circle", "square", "diamond", "triangle-up", "x", "cross")

SHARE_SCALE: Final = "Cividis"
"""Sequential scale for shares: monotone in lightness, made for colour-blind readers."""

DIVERGING_SCALE: Final = (
    (0.0, "#2A82C4"),
    (0.35, "#A9CBE3"),
    (0.5, "#E9E6E1"),
    (0.65, "#EBB58C"),
    (1.0, "#D55E00"),
)
"""Around a real zero: blue below, orange above; told apart by every eye."""

CLEAR: Final = "rgba(0,0,0,0)"

CONFIG: Final[dict[str, Any]] = {
    "showSendToCloud": False,
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
    "responsive": True,
}
"""For every figure: nothing here may offer to upload data to somebody else's machine."""

SELECTING: Final[dict[str, Any]] = {
    name: value for name, value in CONFIG.items() if name != "modeBarButtonsToRemove"
}
"""For figures in which marks can be picked: the tools for it stay."""


def tint(colour: str, alpha: float) -> str:
    """The same colour, see-through."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def hollow(colour: str, width: float = 2) -> dict[str, Any]:
    """Marker of a predicted value: an outline."""
    return {"color": tint(colour, 0.12), "line": {"color": colour, "width": width}}


def solid(colour: str) -> dict[str, Any]:
    """Marker of a measured value: filled."""
    return {"color": colour, "line": {"color": colour, "width": 2}}


def _broken(lines: Sequence[str]) -> list[str]:
    """Lines that fit half a page; the first one, which is bold, keeps its weight over the break."""
    first, *rest = lines
    head = "</b><br><b>".join(textwrap.wrap(first, 46))
    return [head, *(piece for line in rest for piece in textwrap.wrap(line, 62))]


def finish(
    fig: go.Figure,
    title: Sequence[str],
    *,
    height: int,
    above: int = 0,
    legend_rows: int = 1,
    is_narrow: bool = False,
) -> go.Figure:
    """Give a figure its finding, a line on how to read it, its size and legend; the same for all.

    `above` keeps room between the title and the plot, for panel titles. Lines of narrow figures are broken.
    """
    if is_narrow:
        title = _broken(title)
    text = f"<b>{title[0]}</b>" + "".join(
        f"<br><span style='font-size:0.82em;font-weight:400'>{line}</span>" for line in title[1:]
    )
    lines = len(title) + text.count("</b><br><b>")
    top, bottom = 14 + 22 * lines + above, 52 + 22 * legend_rows
    fig.update_layout(
        # Hung on the plot's upper edge: Streamlit moves titles that hang on the figure's edge.
        title={
            "text": text,
            "font": {"size": 16},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "paper",
            "yanchor": "bottom",
            # The anchor is the first line; the others hang below it.
            "pad": {"b": 22 * (lines - 1) + 10 + above},
        },
        height=height + top + bottom,
        margin={"l": 8, "r": 24, "t": top, "b": bottom},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        legend={
            "orientation": "h",
            "traceorder": "normal",
            "x": 0,
            "xanchor": "left",
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
        },
        hoverlabel={"align": "left"},
        bargap=0.3,
    )
    fig.update_xaxes(automargin=True, title_standoff=8)
    fig.update_yaxes(automargin=True, title_standoff=8)
    return fig

"""Figures as HTML that works without a network: plotly.js inside, nothing asked of anybody."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go

from . import theme

_HEAD = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body{{font-family:system-ui,sans-serif;margin:24px;max-width:1100px;color:#1C2127;background:#fff}}
.caption{{color:#5A6069;font-size:0.9em}}</style></head>
<body>
"""


def figure_html(fig: go.Figure, *, script: bool) -> str:
    """A figure on white as a piece of HTML; `script` puts plotly.js before it, once per page."""
    # A copy: the dashboard draws the same object on its own background.
    shown = go.Figure(fig)
    shown.update_layout(template="plotly_white", paper_bgcolor="#fff", plot_bgcolor="#fff")
    shown.update_layout(font={"family": "system-ui, sans-serif", "color": "#1C2127"})
    return shown.to_html(
        full_html=False, include_plotlyjs=script, include_mathjax=False, config=theme.CONFIG
    )


def page_of(fig: go.Figure, alt: str) -> str:
    """One figure as a page of its own, with what it shows in words."""
    body = figure_html(fig, script=True)
    return f'{_HEAD.format(title="ExpertFlow")}{body}<p class="caption">{escape(alt)}</p></body></html>\n'

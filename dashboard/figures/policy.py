"""What a policy does with its slots, and how firm its lead is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go

from ...simulator.result import Sensitivity
from .. import theme, words
from .names import short


def slots_frame(pools: Sequence[tuple[tuple[int, ...], int]]) -> pd.DataFrame:
    """One row per layer: its slots, and how many layers share them."""
    rows = [
        {"layer": layer, "slots": slots, "layers_sharing": len(layers)}
        for layers, slots in pools
        for layer in layers
    ]
    return pd.DataFrame(rows, columns=["layer", "slots", "layers_sharing"]).sort_values("layer")


def slots(pools: Sequence[tuple[tuple[int, ...], int]], experts: int) -> go.Figure:
    """Slots of each layer, with the number of its experts as a line."""
    frame = slots_frame(pools)
    fig = go.Figure(
        go.Bar(
            x=frame["layer"],
            y=frame["slots"],
            marker={
                "color": theme.tint(theme.MEANING["compute"], 0.25),
                "line": {"color": theme.MEANING["compute"], "width": 1.5},
            },
            name="slots",
            hovertemplate="layer %{x}: %{y} slots<extra></extra>",
        )
    )
    fig.add_scatter(
        x=[-0.5, len(frame) - 0.5],
        y=[experts] * 2,
        mode="lines",
        line={"color": theme.MEANING["other"], "dash": "dot", "width": 1.5},
        name="experts of the layer",
        hoverinfo="skip",
    )
    theme.finish(fig, slots_finding(pools, experts), height=220)
    fig.update_xaxes(title_text="MoE layer", dtick=1 if len(frame) <= 24 else None)
    fig.update_yaxes(title_text="slots", rangemode="tozero")
    return fig


def slots_finding(pools: Sequence[tuple[tuple[int, ...], int]], experts: int) -> tuple[str, str]:
    """Whether layers are treated alike."""
    detail = f"Of {experts} experts in each layer"
    if len(pools) == 1 and len(pools[0][0]) > 1:
        return (
            f"All layers share {pools[0][1]} slots",
            f"{detail}; the cache alone decides who gets them",
        )
    sizes = [size for _, size in pools]
    if min(sizes) == max(sizes):
        return f"Every layer has {sizes[0]} slots of its own", detail
    return f"Layers have {min(sizes)} to {max(sizes)} slots of their own", detail


def sensitivity_frame(found: Sequence[Sensitivity]) -> pd.DataFrame:
    """One row per change of the machine."""
    rows = [
        {
            "change": s.change,
            "chosen_tokens_per_s": s.chosen_tokens_per_s,
            "best": s.best,
            "best_tokens_per_s": s.best_tokens_per_s,
            "loss": s.loss,
        }
        for s in found
    ]
    return pd.DataFrame(rows)


def sensitivity(found: Sequence[Sensitivity]) -> go.Figure:
    """The chosen policy and the best one on machines a little different from the one assumed."""
    colour = theme.MEANING["compute"]
    names = [escape(s.change) for s in found]
    fig = go.Figure()
    fig.add_scatter(
        x=[s.best_tokens_per_s for s in found],
        y=names,
        mode="markers",
        name="the best policy there",
        marker={"symbol": "diamond-open", "size": 13, "color": theme.MEANING["wait"]},
        customdata=[escape(short(s.best)) for s in found],
        hovertemplate="%{y}: %{x:.4g} tokens/s with %{customdata}<extra></extra>",
    )
    fig.add_scatter(
        x=[s.chosen_tokens_per_s for s in found],
        y=names,
        mode="markers",
        name="the chosen policy",
        marker={"symbol": "circle-open", "size": 9, "color": colour, "line": {"width": 2}},
        hovertemplate="%{y}: %{x:.4g} tokens/s with the chosen policy<extra></extra>",
    )
    theme.finish(fig, sensitivity_finding(found), height=30 + 36 * len(found))
    fig.update_xaxes(title_text="predicted tokens/s", rangemode="tozero")
    fig.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return fig


def sensitivity_finding(found: Sequence[Sensitivity]) -> tuple[str, str]:
    """How much would be lost at worst."""
    detail = "Predicted. Where both marks coincide the choice still is the best"
    worst = max(found, key=lambda s: s.loss, default=None)
    if worst is None:
        return "No other machine was tried", detail
    if worst.loss < 0.005:
        return "The choice holds if link or computation are 10 % off", detail
    return f"At worst it loses {words.percent(worst.loss)} ({escape(worst.change)})", detail

"""Which experts the router chose: the heatmap of layers and experts, and how uneven it is."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .. import theme, words

Order = Literal["number", "share"]


def shares(counts: np.ndarray) -> np.ndarray:
    """Share of each layer's choices that went to each expert; rows without choices are zero."""
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)


def heatmap_frame(counts: np.ndarray) -> pd.DataFrame:
    """One row per layer and expert: choices and share of the layer's choices."""
    layers, experts = np.indices(counts.shape)
    return pd.DataFrame(
        {
            "layer": layers.ravel(),
            "expert": experts.ravel(),
            "choices": counts.ravel(),
            "share_of_layer": shares(counts).ravel(),
        }
    )


def heatmap(counts: np.ndarray, phase: str, order: Order = "number") -> go.Figure:
    """Layer × expert, coloured by share of the layer's choices.

    With `order="share"` every layer is sorted by itself, busiest expert first.
    """
    share = shares(counts)
    num_layers, num_experts = counts.shape
    ids = np.tile(np.arange(num_experts), (num_layers, 1))
    if order == "share":
        ids = np.argsort(-share, axis=1, kind="stable")
        share = np.take_along_axis(share, ids, axis=1)
    is_small = num_layers * num_experts <= 2_048
    fig = go.Figure(
        go.Heatmap(
            z=share * 100,
            customdata=ids,
            zmin=0,
            colorscale=theme.SHARE_SCALE,
            xgap=1 if is_small else 0,
            ygap=1 if is_small else 0,
            colorbar={"title": {"text": "share"}, "ticksuffix": " %", "thickness": 14, "len": 1},
            hovertemplate="layer %{y}, expert %{customdata}<br>"
            "%{z:.2f} % of the layer’s choices<extra></extra>",
        )
    )
    theme.finish(
        fig,
        heatmap_finding(counts, phase),
        height=int(np.clip(26 * num_layers, 150, 640)),
        legend_rows=0,
    )
    x_title = "expert" if order == "number" else "experts of each layer, busiest first (rank)"
    fig.update_xaxes(title_text=x_title, showgrid=False, zeroline=False)
    fig.update_yaxes(title_text="MoE layer", autorange="reversed", showgrid=False, zeroline=False)
    if num_layers <= 16:
        fig.update_yaxes(dtick=1)
    if num_experts <= 32:
        fig.update_xaxes(dtick=1 if num_experts <= 16 else 2)
    return fig


def heatmap_finding(counts: np.ndarray, phase: str) -> list[str]:
    """The heatmap's title: what it shows, computed."""
    share = shares(counts)
    where = "All phases" if phase == "all" else phase.capitalize()
    if not counts.any():
        return [f"{where}: no choices recorded"]
    layer, expert = np.unravel_index(int(share.argmax()), share.shape)
    even = 1 / counts.shape[1]
    idle = int((counts == 0).sum())
    unused = [f"{idle} of {counts.size} experts are never chosen"] if idle else []
    return [
        f"{where}: the busiest 10 % of experts take "
        f"{words.percent(share_of_busiest(counts, 0.1), 0)} of the choices",
        f"Even would be {words.percent(even)} each; most: layer {layer}, expert {expert} "
        f"with {words.percent(float(share.max()))} of its layer",
        *unused,
    ]


def share_of_busiest(counts: np.ndarray, part: float) -> float:
    """Share of all choices that the busiest `part` of the experts take."""
    frame = skew_frame(counts)
    return float(np.interp(part, frame["share_of_experts"], frame["share_of_choices"]))


def skew_frame(counts: np.ndarray) -> pd.DataFrame:
    """Cumulative share of choices over share of experts, busiest first, from (0, 0) to (1, 1)."""
    busiest = np.sort(counts.ravel())[::-1]
    total = max(int(busiest.sum()), 1)
    choices = np.concatenate([[0.0], np.cumsum(busiest) / total])
    return pd.DataFrame(
        {
            "share_of_experts": np.linspace(0, 1, len(choices)),
            "share_of_choices": choices,
        }
    )


def skew(by_phase: dict[str, np.ndarray]) -> go.Figure:
    """Share of choices taken by the busiest experts, one line per phase, and the even diagonal."""
    fig = go.Figure()
    for index, (phase, counts) in enumerate(by_phase.items()):
        frame = skew_frame(counts)
        fig.add_scatter(
            x=frame["share_of_experts"] * 100,
            y=frame["share_of_choices"] * 100,
            name=phase,
            mode="lines",
            line={"color": theme.SERIES[index], "dash": theme.DASHES[index], "width": 2.5},
            hovertemplate=f"{phase}: busiest %{{x:.1f}} % of experts<br>"
            "take %{y:.1f} % of the choices<extra></extra>",
        )
    fig.add_scatter(
        x=[0, 100],
        y=[0, 100],
        name="if all were chosen equally",
        mode="lines",
        line={"color": theme.MEANING["other"], "dash": "dot", "width": 1.5},
        hoverinfo="skip",
    )
    theme.finish(fig, skew_finding(by_phase), height=300)
    fig.update_xaxes(title_text="share of all experts, busiest first", ticksuffix=" %")
    fig.update_xaxes(range=[0, 100])
    fig.update_yaxes(title_text="share of choices", ticksuffix=" %", range=[0, 102])
    return fig


def skew_finding(by_phase: dict[str, np.ndarray]) -> tuple[str, str]:
    """The skew curve's title: what half of the experts cover."""
    halves = [
        f"{words.percent(share_of_busiest(counts, 0.5), 0)} in {phase}"
        for phase, counts in by_phase.items()
    ]
    return (
        "The busier half of the experts covers " + ", ".join(halves),
        "Of the router’s choices. The further above the diagonal, the more a cache can gain",
    )


def domain_distance(by_domain: dict[str, np.ndarray]) -> tuple[str, str, float] | None:
    """The two domains whose experts differ most, by total variation (0 the same, 1 disjoint)."""
    names = [name for name, counts in by_domain.items() if counts.any()]
    flat = {name: by_domain[name].ravel() / by_domain[name].sum() for name in names}
    pairs = [
        (a, b, float(np.abs(flat[a] - flat[b]).sum() / 2))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    ]
    return max(pairs, key=lambda pair: pair[2], default=None)

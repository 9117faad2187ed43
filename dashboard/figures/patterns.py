"""How choices hang together: reuse distance, layers in a row, experts in company, drift, domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .. import theme, words
from ..patterns import BINS, distance, lift, similar_order
from .bins import binned

SQUARE = 440
"""Height of a matrix of experts by experts, in pixels."""


def reuse_frame(counts: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """One row per phase and class of distances: share of the uses."""
    names = distance_names()
    rows = [
        {"phase": phase, "passes_since_last_use": name, "uses": int(n), "share": n / max(1, all_n)}
        for phase, found in counts.items()
        for all_n in (int(found.sum()),)
        for name, n in zip(names, found.tolist(), strict=True)
    ]
    return pd.DataFrame(rows)


def distance_names() -> list[str]:
    """The classes of reuse distances as people read them."""
    lows = [1, *(low + 1 for low in BINS[:-1])]
    pairs = zip(lows, BINS, strict=True)
    return [f"{a}" if a == b else f"{a}–{b}" for a, b in pairs] + [f"over {BINS[-1]}"]


def reuse(counts: Mapping[str, np.ndarray]) -> go.Figure:
    """Bars by class of reuse distance, one series per phase."""
    frame = reuse_frame(counts)
    fig = go.Figure()
    for index, phase in enumerate(counts):
        rows = frame[frame["phase"] == phase]
        colour = theme.SERIES[index]
        fig.add_bar(
            x=rows["passes_since_last_use"],
            y=rows["share"] * 100,
            name=phase,
            marker={"color": colour},
            text=[f"{share * 100:.0f} %" if share >= 0.005 else "" for share in rows["share"]],
            textposition="outside",
            cliponaxis=False,
            hovertemplate=f"{phase}: %{{y:.1f}} % of uses<br>%{{x}} passes after the last one"
            "<extra></extra>",
        )
    theme.finish(fig, reuse_finding(counts), height=280)
    fig.update_xaxes(title_text="passes since the layer last used the expert", type="category")
    fig.update_yaxes(title_text="share of uses", ticksuffix=" %", rangemode="tozero")
    return fig


def reuse_finding(counts: Mapping[str, np.ndarray]) -> tuple[str, str]:
    """How many uses come back at once."""
    detail = "A use: an expert demanded by a layer’s event. First uses are left out"
    texts = [
        f"{words.percent(found[0] / found.sum(), 0)} in {phase}"
        for phase, found in counts.items()
        if found.sum()
    ]
    if not texts:
        return "No expert is used twice", detail
    return "Used again in the very next pass: " + ", ".join(texts), detail


def layers_frame(by_layer: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """One row per phase and layer: share of a token's experts that its predecessor had too."""
    rows = [
        {"phase": phase, "layer": layer, "reuse": share}
        for phase, shares in by_layer.items()
        for layer, share in enumerate(shares)
    ]
    return pd.DataFrame(rows, columns=["phase", "layer", "reuse"])


def layers(by_layer: Mapping[str, Sequence[float]], chance: float) -> go.Figure:
    """Reuse from token to token by layer, with the line of chance."""
    fig = go.Figure()
    for index, (phase, shares) in enumerate(by_layer.items()):
        fig.add_scatter(
            x=list(range(len(shares))),
            y=[share * 100 for share in shares],
            name=phase,
            mode="lines+markers",
            line={"color": theme.SERIES[index], "dash": theme.DASHES[index], "width": 2.5},
            marker={"symbol": theme.SYMBOLS[index], "size": 8},
            hovertemplate=f"{phase}, layer %{{x}}: %{{y:.1f}} % of the experts again<extra></extra>",
        )
    count = max((len(shares) for shares in by_layer.values()), default=1)
    fig.add_scatter(
        x=[0, count - 1],
        y=[chance * 100] * 2,
        name="chance, even routing",
        mode="lines",
        line={"color": theme.MEANING["other"], "dash": "dot", "width": 1.5},
        hoverinfo="skip",
    )
    theme.finish(fig, layers_finding(by_layer, chance), height=280)
    fig.update_xaxes(title_text="MoE layer", dtick=1 if count <= 16 else None)
    fig.update_yaxes(title_text="experts kept from token to token", ticksuffix=" %")
    fig.update_yaxes(rangemode="tozero")
    return fig


def layers_finding(by_layer: Mapping[str, Sequence[float]], chance: float) -> tuple[str, str]:
    """Where reuse is highest."""
    detail = f"Neighbouring tokens of one sequence, same layer; chance: {words.percent(chance, 0)}"
    found = [(share, layer) for shares in by_layer.values() for layer, share in enumerate(shares)]
    if not found:
        return "No two neighbouring tokens were recorded", detail
    (low, at_low), (high, at_high) = min(found), max(found)
    return (
        f"Tokens keep {words.percent(low, 0)} (layer {at_low}) to {words.percent(high, 0)} "
        f"(layer {at_high}) of their predecessor’s experts",
        detail,
    )


def pairs_frame(counts: np.ndarray, rows: str, columns: str) -> pd.DataFrame:
    """A matrix of counts as one row per pair."""
    first, second = np.indices(counts.shape)
    return pd.DataFrame({rows: first.ravel(), columns: second.ravel(), "count": counts.ravel()})


def transitions(
    counts: np.ndarray, layer: int, foresight: tuple[float, float] | None, *, similar: bool = False
) -> go.Figure:
    """Share of an expert's tokens that go to each expert of the next layer."""
    order = _orders(counts, similar=similar)
    grouped, names_y = binned(counts[order[0]], 0)
    grouped, names_x = binned(grouped[:, order[1]], 1)
    share = grouped / np.maximum(grouped.sum(axis=1, keepdims=True), 1)
    # Each row adds up to top-k choices; relative to one token it is a share of tokens.
    fig = go.Figure(
        _matrix(
            share * 100,
            _named(names_x, order[1]),
            _named(names_y, order[0]),
            title="share",
            colorscale=theme.SHARE_SCALE,
            zmin=0,
            hover=f"expert %{{y}} of layer {layer} → expert %{{x}} of layer {layer + 1}<br>"
            "%{z:.1f} % of what follows<extra></extra>",
        )
    )
    theme.finish(
        fig, transitions_finding(layer, foresight), height=SQUARE, is_narrow=True, legend_rows=0
    )
    _label_experts(fig, f"expert of layer {layer + 1}", f"expert of layer {layer}")
    return fig


def transitions_finding(layer: int, foresight: tuple[float, float] | None) -> tuple[str, str]:
    """What knowing this layer tells about the next."""
    detail = "Rows add up to 100 %. Judged on sequences that the counts were not learned from"
    if foresight is None:
        return f"From layer {layer} to layer {layer + 1}", "Rows add up to 100 %"
    known, popular = (words.percent(share, 0) for share in foresight)
    return (
        f"Layer {layer} foretells {known} of layer {layer + 1}’s experts; popularity alone {popular}",
        detail,
    )


def company(counts: np.ndarray, layer: int, *, similar: bool = False) -> go.Figure:
    """How much more often than by chance two experts are chosen for the same token: log2, blue less, orange more."""
    order, _ = _orders(lift(counts) if similar else counts, similar=similar)
    small, names = binned(counts[np.ix_(order, order)], 0)
    small, _ = binned(small, 1)
    times = lift(small)
    # Never together counts as the darkest blue; blank is what cannot be told.
    values = np.log2(np.maximum(times, 2.0**-3))
    reach = float(np.nanmax(np.abs(values), initial=1.0))
    fig = go.Figure(
        _matrix(
            np.clip(values, -3, 3),
            _named(names, order),
            _named(names, order),
            title="times<br>chance",
            colorscale=theme.DIVERGING_SCALE,
            zmin=-min(reach, 3),
            zmax=min(reach, 3),
            customdata=times,
            hover=f"layer {layer}: experts %{{y}} and %{{x}}<br>together %{{customdata:.2f}} times as "
            "often as by chance<extra></extra>",
        )
    )
    ticks = [n for n in (-3, -2, -1, 0, 1, 2, 3) if abs(n) <= min(reach, 3)]
    fig.update_traces(
        colorbar={"tickvals": ticks, "ticktext": [f"{2.0**n:g}×" for n in ticks]},
    )
    theme.finish(fig, company_finding(counts, layer), height=SQUARE, is_narrow=True, legend_rows=0)
    _label_experts(fig, "expert", "expert")
    return fig


def company_finding(counts: np.ndarray, layer: int) -> tuple[str, str]:
    """The pair that is chosen together most above chance."""
    detail = "Chance: what the popularity of both would give. Blank: too rare to tell"
    found = np.where(counts >= 5, lift(counts), np.nan)
    if not np.isfinite(found).any():
        return f"Layer {layer}: too few tokens to tell which experts go together", detail
    one, other = np.unravel_index(int(np.nanargmax(found)), found.shape)
    return (
        f"Layer {layer}: experts {min(one, other)} and {max(one, other)} are chosen together "
        f"{found[one, other]:.1f}× as often as by chance",
        detail,
    )


def drift(counts: np.ndarray, layer: int) -> go.Figure:
    """Share of each expert over the recording, in equal parts of it."""
    grouped, names = binned(counts, 1)
    share = grouped / np.maximum(grouped.sum(axis=1, keepdims=True), 1)
    windows = len(counts)
    fig = go.Figure(
        _matrix(
            share.T * 100,
            [f"{(n + 0.5) / windows * 100:.4g}" for n in range(windows)],
            names,
            title="share",
            colorscale=theme.SHARE_SCALE,
            zmin=0,
            hover=f"layer {layer}, expert %{{y}}: %{{z:.1f}} % of the choices<br>%{{x}} % into the "
            "recording<extra></extra>",
        )
    )
    theme.finish(
        fig,
        drift_finding(counts, layer),
        height=int(np.clip(12 * len(names), 280, 620)),
        legend_rows=0,
    )
    fig.update_xaxes(title_text="place in the recording", ticksuffix=" %", showgrid=False)
    fig.update_xaxes(type="linear", zeroline=False)
    fig.update_yaxes(title_text="expert", autorange="reversed", showgrid=False)
    fig.update_yaxes(type="category", nticks=18)
    return fig


def drift_finding(counts: np.ndarray, layer: int) -> tuple[str, str]:
    """How far the first half of the recording is from the second, and what noise alone would give."""
    middle = len(counts) // 2
    detail = "Total variation: 0 the same experts, 1 none in common; noise: every other part"
    if middle < 1:
        return f"Layer {layer}: too short a recording to drift", detail
    halves = distance(counts[:middle].sum(axis=0), counts[middle:].sum(axis=0))
    noise = distance(counts[::2].sum(axis=0), counts[1::2].sum(axis=0))
    verdict = "drifts" if halves > 1.5 * noise else "does not drift beyond noise"
    return f"Layer {layer} {verdict}: halves differ by {halves:.2f}, noise {noise:.2f}", detail


def domains_frame(counts: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """One row per pair of groups: the distance between their experts."""
    rows = [
        {"first": one, "second": other, "distance": distance(counts[one], counts[other])}
        for one in counts
        for other in counts
    ]
    return pd.DataFrame(rows, columns=["first", "second", "distance"])


def domains(counts: Mapping[str, np.ndarray], within: float | None) -> go.Figure:
    """Distance between the experts of every two groups (domains, phases), as a matrix with numbers."""
    names = list(counts)
    found = domains_frame(counts)["distance"].to_numpy().reshape(len(names), len(names))
    shown = [escape(name) for name in names]
    fig = go.Figure(
        _matrix(
            found,
            shown,
            shown,
            title="distance",
            colorscale=theme.SHARE_SCALE,
            zmin=0,
            zmax=max(0.5, float(found.max(initial=0))),
            hover="%{y} and %{x}: %{z:.2f}<extra></extra>",
        )
    )
    fig.update_traces(texttemplate="%{z:.2f}", textfont={"size": 13})
    theme.finish(fig, domains_finding(counts, within), height=60 + 46 * len(names), legend_rows=0)
    fig.update_xaxes(
        title_text="total variation, mean over layers", showgrid=False, type="category"
    )
    fig.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return fig


def domains_finding(counts: Mapping[str, np.ndarray], within: float | None) -> tuple[str, str]:
    """The two groups that differ most."""
    frame = domains_frame(counts)
    noise = "" if within is None else f"; two halves of one domain differ by {within:.2f}"
    detail = f"0: the same experts, 1: none in common{noise}"
    if len(counts) < 2:
        return "Nothing to compare", detail
    far = frame.loc[frame["distance"].idxmax()]
    return (
        f"{escape(far['first'])} and {escape(far['second'])} differ most: {far['distance']:.2f}",
        detail,
    )


def _matrix(
    z: np.ndarray, x: Sequence[str], y: Sequence[str], *, title: str, hover: str, **more: Any
) -> go.Heatmap:
    return go.Heatmap(
        z=z,
        x=list(x),
        y=list(y),
        colorbar={
            "title": {"text": title},
            "ticksuffix": " %" if title == "share" else "",
            "thickness": 14,
            "len": 1,
        },
        hovertemplate=hover,
        **more,
    )


def _label_experts(fig: go.Figure, x: str, y: str) -> None:
    fig.update_xaxes(title_text=x, showgrid=False, zeroline=False, type="category", nticks=18)
    fig.update_yaxes(title_text=y, showgrid=False, zeroline=False, type="category", nticks=18)
    fig.update_yaxes(autorange="reversed")


def _orders(matrix: np.ndarray, *, similar: bool) -> tuple[np.ndarray, np.ndarray]:
    """By number; or rows by likeness of what they hold, columns by where they are needed most."""
    plain = np.arange(len(matrix))
    if not similar:
        return plain, plain
    if np.allclose(matrix, matrix.T, equal_nan=True):
        order = similar_order(matrix)
        return order, order
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    rows = similar_order(shares @ shares.T)
    place = (shares[rows] * np.arange(len(rows))[:, None]).sum(axis=0)
    columns = np.argsort(place / np.maximum(shares[rows].sum(axis=0), 1e-12), kind="stable")
    return rows, columns


def _named(names: Sequence[str], order: np.ndarray) -> list[str]:
    """Ids of the experts in their new order; places where several stand together keep their places' names."""
    if len(names) == len(order):
        return [str(number) for number in order.tolist()]
    return list(names)

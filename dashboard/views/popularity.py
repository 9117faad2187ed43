"""The heatmap of layers by experts and its controls, as two pages show them."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from .. import parts, words
from ..data import ALL
from ..figures import routing as figures
from ..routing import RoutingSummary


def controls(summary: RoutingSummary) -> tuple[str, str, figures.Order]:
    """Phase, domain and order of experts, as chosen; all of them live in the address."""
    phases = [*summary.phases(), ALL]
    places = st.columns([2, 2, 2])
    with places[0]:
        phase = st.segmented_control(
            "Phase",
            phases,
            default="decode" if "decode" in phases else phases[0],
            required=True,
            key="phase",
            bind="query-params",
        )
    with places[1]:
        order = st.segmented_control(
            "Order of experts",
            ["number", "share"],
            default="number",
            required=True,
            format_func=lambda o: {"number": "by number", "share": "busiest first"}[o],
            key="order",
            bind="query-params",
        )
    domain: str | None = ALL
    if len(summary.domains) > 1:
        with places[2]:
            options = [ALL, *summary.domains]
            domain = st.selectbox(
                "Domain",
                options,
                format_func=lambda name: name or "unlabelled",
                key="domain",
                bind="query-params",
            )
    return phase or ALL, domain or ALL, "share" if order == "share" else "number"


def heatmap(summary: RoutingSummary, phase: str, domain: str, order: figures.Order) -> None:
    """Which experts each layer chooses."""
    counts = summary.select(phase, domain)
    alt = "Heatmap of MoE layers by experts. " + ". ".join(figures.heatmap_finding(counts, phase))
    parts.chart(
        figures.heatmap(counts, phase, order),
        figures.heatmap_frame(counts),
        name="routing",
        alt=alt,
    )
    if summary.padding_rows:
        share = words.percent(summary.padding_rows / summary.rows)
        st.caption(f"{share} of the rows are padding; padding loads experts too, so it is counted.")


def skew(summary: RoutingSummary, domain: str) -> None:
    """How uneven the choices are, by phase."""
    by_phase = {phase: summary.select(phase, domain) for phase in summary.phases()}
    by_phase = {phase: counts for phase, counts in by_phase.items() if counts.any()}
    frames = [figures.skew_frame(counts).assign(phase=phase) for phase, counts in by_phase.items()]
    if not frames:
        return
    parts.chart(
        figures.skew(by_phase),
        pd.concat(frames, ignore_index=True),
        name="skew",
        alt="Cumulative share of choices by share of experts. "
        + ". ".join(figures.skew_finding(by_phase)),
    )

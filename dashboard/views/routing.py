"""Routing: which experts are chosen, when they come back, and who goes with whom."""

from __future__ import annotations

from typing import Final

import streamlit as st

from ...tracer.schema import Manifest
from .. import parts, patterns, words
from ..data import ALL, Catalog, Found, Problem, subjects
from ..figures import patterns as figures
from ..routing import RoutingSummary, routing_summary
from . import popularity

QUESTION: Final = "How predictable is this model’s choice of experts, and so what can a cache or a predictor gain?"


def render(catalog: Catalog) -> None:
    """Draw the page for whatever the catalog holds."""
    parts.header("Routing", QUESTION)
    parts.problems(catalog.problems)
    found = [subject for subject in subjects(catalog) if subject.trace]
    if not found:
        parts.empty("There is no trace in this folder yet.", parts.FILL_TRACE)
        return
    trace = parts.choose_subject(found).trace
    assert trace is not None
    summary = routing_summary(trace)
    if isinstance(summary, Problem):
        parts.problems([summary])
        return
    st.header("Which experts, how often")
    phase, domain, order = popularity.controls(summary)
    popularity.heatmap(summary, phase, domain, order)
    popularity.skew(summary, domain)
    sample = patterns.sample_of(trace)
    if isinstance(sample, Problem):
        parts.problems([sample])
        return
    if not sample.is_whole:
        st.info(
            f"What follows rests on {sample.rows:,} of {sample.total_rows:,} rows, taken evenly over the "
            "recording; the figures above count all of them."
        )
    _in_words(trace)
    _reuse(trace, sample)
    _groups(trace, summary)
    _pairs(sample)


def _in_words(trace: Found[Manifest]) -> None:
    """What `expertflow-trace info` says of the routing."""
    stats = patterns.stats_of(trace)
    if isinstance(stats, Problem):
        parts.problems([stats])
        return
    st.header("In words")
    st.markdown(
        "\n".join(f"- **{words.plain(f.about)}**: {words.plain(f.text)}" for f in stats.findings)
    )


def _reuse(trace: Found[Manifest], sample: patterns.Sample) -> None:
    st.header("When an expert comes back")
    counts = {phase: patterns.reuse_distances(sample, phase) for phase in ("prefill", "decode")}
    counts = {phase: found for phase, found in counts.items() if found.sum()}
    finding = figures.reuse_finding(counts)
    parts.chart(
        figures.reuse(counts),
        figures.reuse_frame(counts),
        name="reuse",
        alt="Share of uses by passes since the expert’s last use. " + ". ".join(finding),
    )
    stats = patterns.stats_of(trace)
    if isinstance(stats, Problem):
        parts.problems([stats])
        return
    by_layer = {
        p.phase: p.reuse_by_layer for p in (stats.prefill, stats.decode) if p.reuse_by_layer
    }
    if not by_layer:
        return
    parts.chart(
        figures.layers(by_layer, stats.reuse_chance),
        figures.layers_frame(by_layer),
        name="reuse-by-layer",
        alt="Share of experts kept from token to token, by layer. "
        + ". ".join(figures.layers_finding(by_layer, stats.reuse_chance)),
    )


def _groups(trace: Found[Manifest], summary: RoutingSummary) -> None:
    counts = {name or "unlabelled": summary.select(ALL, name) for name in summary.domains}
    if len(counts) < 2:
        counts = {phase: summary.select(phase, ALL) for phase in summary.phases()}
    counts = {name: found for name, found in counts.items() if found.any()}
    if len(counts) < 2:
        return
    st.header("Do other texts need other experts?")
    stats = patterns.stats_of(trace)
    within = None if isinstance(stats, Problem) else stats.within_domain
    parts.chart(
        figures.domains(counts, within),
        figures.domains_frame(counts),
        name="domains",
        alt="Distance between the experts of every two groups. "
        + ". ".join(figures.domains_finding(counts, within)),
    )
    phases = {phase: summary.select(phase, ALL) for phase in summary.phases()}
    if len(phases) == 2 and "prefill" not in counts:
        far = patterns.distance(phases["prefill"], phases["decode"])
        st.caption(f"Prefill and decode differ by {far:.2f}.")


def _pairs(sample: patterns.Sample) -> None:
    st.header("One layer, closely")
    places = st.columns([3, 2])
    with places[0]:
        layer = st.slider(
            "MoE layer",
            0,
            max(1, sample.layers - 1),
            value=0,
            key="layer",
            bind="query-params",
            disabled=sample.layers < 2,
        )
    with places[1]:
        order = st.segmented_control(
            "Order of rows and columns",
            ["number", "similar"],
            default="number",
            required=True,
            format_func=lambda o: {"number": "by number", "similar": "similar together"}[o],
            key="pairs",
            bind="query-params",
        )
    layer = min(layer, sample.layers - 1)
    similar = order == "similar"
    left, right = st.columns(2)
    with left:
        _transitions(sample, layer, similar=similar)
    with right:
        counts = patterns.company(sample, layer)
        parts.chart(
            figures.company(counts, layer, similar=similar),
            figures.pairs_frame(counts, "expert", "other_expert"),
            name="company",
            alt="How often two experts are chosen for the same token, relative to chance. "
            + ". ".join(figures.company_finding(counts, layer)),
        )
    counts = patterns.drift(sample, layer)
    parts.chart(
        figures.drift(counts, layer),
        figures.pairs_frame(counts, "part", "expert"),
        name="drift",
        alt="Share of each expert over the recording. "
        + ". ".join(figures.drift_finding(counts, layer)),
    )


def _transitions(sample: patterns.Sample, layer: int, *, similar: bool) -> None:
    if layer + 1 >= sample.layers:
        st.info(f"Layer {layer} is the last one: {words.plain('no layer follows it.')}")
        return
    counts = patterns.transitions(sample, layer)
    known = patterns.foresight(sample, layer)
    parts.chart(
        figures.transitions(counts, layer, known, similar=similar),
        figures.pairs_frame(counts, "expert", "expert_of_next_layer"),
        name="transitions",
        alt="Which experts of the next layer follow each expert. "
        + ". ".join(figures.transitions_finding(layer, known)),
    )

"""What-if: another budget, link, batch or policy, answered by the simulator as the sliders move."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import streamlit as st

from ...simulator.hardware import parse_link
from ...simulator.hardware_profiles import LINKS
from ...simulator.result import Result
from ...tracer.errors import ExpertFlowError
from ...tracer.schema import Manifest
from .. import parts, predictions, words
from ..data import Catalog, Found
from ..figures import candidates as candidate_figures
from ..figures import what_if as figures
from ..predictions import OWN, Desk, MachineChoice, Question
from . import desk as desks

QUESTION: Final = "What would another budget, link, batch or policy bring?"
_PLAIN_LINKS: Final = ("0.5GB/s+10us", "1GB/s+10us", "2GB/s+10us", "4GB/s+10us", "100GB/s+10us")
BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
SHARES: Final = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_INVENTED: Final = ("synthetic", "oracle")
_NOTES: Final = {
    "synthetic": "invented, as good as you say below",
    "oracle": "a bound: it is never wrong, and cannot be deployed",
}


def render(catalog: Catalog) -> None:
    """Draw the page for whatever the catalog holds."""
    parts.header("What-if", QUESTION)
    parts.problems(catalog.problems)
    if (chosen := desks.choose(catalog)) is None:
        return
    _, trace = chosen
    machine = desks.choose_machine(catalog, trace)
    if machine is None or (desk := desks.ready(trace, machine)) is None:
        return
    question = _controls(desk)
    try:
        result = predictions.ask(desk, question, with_bounds=True)
        others = _others(desk, question)
    except ExpertFlowError as error:
        st.error(words.plain(str(error)))
        return
    _tiles(result, others)
    _in_words(result, question)
    desks.origin(desk, result)
    _charts(desk, question, result, others)
    _command(trace, machine, question)


def _controls(desk: Desk) -> Question:
    left, middle, right = st.columns(3)
    experts = desk.shape_experts
    with left:
        share = st.slider(
            "Memory for experts, share of all",
            1,
            100,
            value=50,
            format="%d%%",
            key="budget",
            bind="query-params",
        )
        slots = max(1, round(share * experts / 100))
        st.caption(
            f"{slots} of {experts} experts, {words.size(slots * desk.whole.shape.expert_bytes)}"
        )
    with middle:
        link = st.select_slider("Link", link_names(), value=OWN, key="link", bind="query-params")
        st.caption(words.plain(link_label(link or OWN, desk)))
    with right:
        most = len(desk.judge.forecaster.workload.prompt_tokens)
        batches = [batch for batch in BATCHES if batch <= max(1, most)]
        batch = st.select_slider(
            "Batch",
            ["recorded", *(str(batch) for batch in batches)],
            value="recorded",
            key="batch",
            bind="query-params",
        )
        st.caption(
            f"the recorded batches of {desk.whole.workload.batch_size}"
            if batch == "recorded"
            else "so many requests at a time, made of the recorded ones"
        )
    question = _policy(desk)
    return replace(
        question,
        slots=slots,
        link=link or OWN,
        batch=int(batch) if (batch or "").isdigit() else None,
    )


def _policy(desk: Desk) -> Question:
    left, middle, right = st.columns(3)
    caches = predictions.members(desk, "cache")
    allocations = predictions.members(desk, "allocation")
    usable = [name for name in predictions.members(desk, "predictor") if name != "none"]
    options = ["none", *usable, *_INVENTED]
    with left:
        cache = st.selectbox(
            "Cache: who is evicted",
            caches,
            index=caches.index("lru"),
            key="cache",
            bind="query-params",
        )
    with middle:
        allocation = st.selectbox(
            "Allocation: slots by layer",
            allocations,
            index=allocations.index("equal"),
            key="allocation",
            bind="query-params",
        )
    with right:
        predictor = st.selectbox(
            "Predictor: who is prefetched",
            options,
            key="predictor",
            bind="query-params",
        )
        if predictor in _NOTES:
            st.caption(_NOTES[predictor])
    params = _quality() if predictor == "synthetic" else ()
    return Question(
        slots=1,
        cache=cache or "lru",
        allocation=allocation or "equal",
        predictor=predictor or "none",
        params=params,
    )


def _quality() -> tuple[tuple[str, float], ...]:
    """How good an invented predictor is, and what it costs."""
    places = st.columns(4)
    with places[0]:
        recall = st.slider("Recall, %", 0, 100, value=80, step=5, key="recall", bind="query-params")
    with places[1]:
        precision = st.slider(
            "Precision, %", 5, 100, value=80, step=5, key="precision", bind="query-params"
        )
    with places[2]:
        latency = st.slider(
            "Its own time per layer, µs",
            0,
            1000,
            value=0,
            step=20,
            key="latency",
            bind="query-params",
        )
    with places[3]:
        horizon = st.slider("Layers ahead", 1, 4, value=1, key="horizon", bind="query-params")
    st.caption(
        "SYNTHETIC predictor: made of the future and of chance, to see what such accuracy would be worth before "
        "anyone trains one. Nobody can deploy it."
    )
    return (
        ("recall", recall / 100),
        ("precision", precision / 100),
        ("latency_s", latency * 1e-6),
        ("horizon", horizon),
    )


def link_names() -> list[str]:
    """The machine's own link, then declared ones from slow to fast."""
    declared = sorted({*_PLAIN_LINKS, *LINKS}, key=lambda name: parse_link(name).bandwidth_Bps)
    return [OWN, *declared]


def link_label(name: str, desk: Desk) -> str:
    """A link in words: its speed and where its numbers come from."""
    if name == OWN:
        return f"the machine’s own: {desk.whole.link}, {words.origin(desk.whole.link_origin)}"
    return f"{parse_link(name).bandwidth_Bps / 1e9:.3g} GB/s, {words.origin('declared')}"


def _others(desk: Desk, question: Question) -> list[Result]:
    """What everything is compared with, under the same conditions: nothing kept, LRU, static, and no prefetch."""
    plain = replace(question, allocation="equal", predictor="none", params=())
    found = [replace(plain, cache=cache) for cache in ("none", "lru", "static")]
    if question.predictor != "none":
        found.insert(0, replace(question, predictor="none", params=()))
    distinct = [other for other in dict.fromkeys(found) if other != question]
    return [predictions.ask(desk, other) for other in distinct]


def _tiles(result: Result, others: Sequence[Result]) -> None:
    base = next((r for r in others if r.policy["cache"] == "none"), None)
    tiles = [
        ("Predicted tokens/s", words.rate(result.tokens_per_s), _against(result, base)),
        (
            "First token, mean",
            words.seconds(result.ttft_s),
            f"p95 {words.seconds(result.ttft.p95)}",
        ),
        (
            "Each further token",
            words.seconds(result.tpot_s),
            f"p95 {words.seconds(result.tpot.p95)}",
        ),
        (
            "Hits in decode",
            words.percent(result.decode.hit_rate),
            f"late {words.percent(result.decode.late_rate)}",
        ),
        (
            "Moved per token",
            words.size(result.bytes_per_token),
            f"link busy {words.percent(result.link_busy_share, 0)}",
        ),
        (
            "Peak device memory",
            words.size(result.peak_device_bytes),
            f"slots {words.size(result.memory.slots)}",
        ),
    ]
    with st.container(horizontal=True):
        for name, value, note in tiles:
            st.metric(
                name, value, note, delta_color="off", delta_arrow="off", border=True, width=300
            )


def _against(result: Result, base: Result | None) -> str:
    if base is None:
        return "the baseline itself"
    return f"{words.times(result.tokens_per_s, base.tokens_per_s)} loading on demand"


def _in_words(result: Result, question: Question) -> None:
    lines: list[str] = []
    if result.worth is not None:
        lines.append(result.worth.finding)
    if result.prefetch.issued:
        found = result.prefetch
        lines.append(
            f"{found.issued:,} prefetches: {found.useful:,} in time, {found.late:,} late, {found.wasted:,} wasted, "
            f"{found.harmful:,} harmful, {found.cancelled:,} cancelled."
        )
    ratio = result.slots_ratio
    verdict = (
        "a cache can hit."
        if ratio < 1
        else "one event overflows the slots, no cache can hit by recency."
    )
    lines.append(
        f"r = {ratio:.2f} distinct experts per decode event and slot of a layer: {verdict}"
    )
    if result.bounds.link_tokens_per_s:
        lines.append(
            f"It reaches {words.percent(result.bounds.share_of_best, 0)} of what the link allows; everything resident "
            f"would give {words.rate(result.bounds.all_resident_tokens_per_s)} tokens/s."
        )
    if question.predictor in _INVENTED:
        lines.append("A policy with this predictor cannot be deployed: it knows the future.")
    st.markdown(words.plain(" ".join(lines)))


def _charts(desk: Desk, question: Question, result: Result, others: Sequence[Result]) -> None:
    compared = [result, *others]
    bounds = {
        "Belady": result.bounds.belady_tokens_per_s,
        "all experts resident": result.bounds.all_resident_tokens_per_s,
    }
    parts.chart(
        candidate_figures.speed(compared, chosen=result.label, bounds=bounds),
        candidate_figures.candidates_frame(compared),
        name="what-if-speed",
        alt="Predicted tokens per second of this configuration and of plain ones. "
        + ". ".join(candidate_figures.speed_finding(compared, result.label)),
    )
    parts.chart(
        figures.split(compared),
        figures.split_frame(compared),
        name="what-if-time",
        alt="Milliseconds per token by part. " + ". ".join(figures.split_finding(compared)),
    )
    left, right = st.columns(2)
    with left:
        _over_memory(desk, question, result)
    with right:
        _over_link(desk, question, result)


def _over_memory(desk: Desk, question: Question, result: Result) -> None:
    sizes = sorted({max(1, round(share * desk.shape_experts)) for share in SHARES})
    points = [
        (slots / desk.shape_experts, predictions.ask(desk, replace(question, slots=slots)))
        for slots in sizes
    ]
    parts.chart(
        figures.over_memory(points, result, question.slots / desk.shape_experts),
        figures.line_frame(points, "share_resident"),
        name="what-if-memory",
        alt="Predicted tokens per second over the share of experts resident. "
        + ". ".join(figures.over_memory_finding(points, result)),
    )


def _over_link(desk: Desk, question: Question, result: Result) -> None:
    names = [name for name in link_names() if name != OWN]
    points = [
        (parse_link(name).bandwidth_Bps / 1e9, predictions.ask(desk, replace(question, link=name)))
        for name in names
    ]
    own = (
        desk.whole.shape.expert_bytes / desk.whole.costs.copy_s / 1e9
        if desk.whole.costs.copy_s
        else 0.0
    )
    here = own if question.link == OWN else parse_link(question.link).bandwidth_Bps / 1e9
    parts.chart(
        figures.over_link(points, result, here),
        figures.line_frame(points, "link_gb_per_s"),
        name="what-if-link",
        alt="Predicted tokens per second over the link’s bandwidth. "
        + ". ".join(figures.over_link_finding(points, result)),
    )


def _command(trace: Found[Manifest], machine: MachineChoice, question: Question) -> None:
    st.caption(
        "The same in a terminal. It replays all batches, not the judging half alone, so its numbers differ a little:"
    )
    st.code(
        command(parts.shell_path(trace.path), machine, question), language="bash", wrap_lines=True
    )


def command(trace: str, machine: MachineChoice, question: Question) -> str:
    """The command line that predicts a question's configuration."""
    words_of = ["expertflow-trace", "simulate", trace, "--budget", f"{question.slots}slots"]
    words_of += ["--cache", question.cache, "--allocation", question.allocation]
    words_of += ["--predictor", question.predictor]
    for name, value in question.params:
        words_of += ["--predictor-param", f"{name}={value:g}"]
    if machine.kind == "file" and machine.path is not None:
        words_of += ["--machine", parts.shell_path(machine.path)]
    if machine.kind == "gpu":
        words_of += ["--gpu", machine.name]
    if question.link != OWN:
        words_of += ["--link", shlex.quote(question.link)]
    if question.batch:
        words_of += ["--arrivals", f"closed:{question.batch}"]
    return " ".join(words_of)

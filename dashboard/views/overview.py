"""Overview: which experts the model needs, and what keeping some of them would bring."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd
import streamlit as st

from ...simulator.result import Result, Tuning, Verdict
from ...tracer.schema import Manifest
from .. import parts, words
from ..data import (
    Catalog,
    Found,
    Problem,
    SequenceSummary,
    Subject,
    sequence_summary,
    subjects,
)
from ..figures import candidates as candidate_figures
from ..figures import capacity as capacity_figures
from ..routing import routing_summary
from . import popularity

QUESTION: Final = (
    "Which experts does this model need, and what would keeping some of them on the device bring?"
)
_BASELINES: Final = frozenset({"none", "on-demand", "on demand", "on_demand", "demand", "stream"})


_TILE_WIDTH: Final = 272
"""Wide enough for a speed; tiles wrap where three do not fit beside each other."""


def _number(label: str, form: str, help_text: str | None = None) -> Any:
    return st.column_config.NumberColumn(label, format=form, width="small", help=help_text)


_COLUMNS: Final[Mapping[str, Any]] = {
    "policy": st.column_config.TextColumn("policy", width="medium", pinned=True),
    "tokens_per_s": _number("tokens/s", "%.2f", "Generated tokens over the whole time."),
    "ttft_ms": _number("TTFT, ms", "%.0f", "Time to the first token."),
    "tpot_ms": _number("TPOT, ms", "%.1f", "Time per further token."),
    "hit_rate": _number("hit", "percent", "Decode: resident when demanded."),
    "late_rate": _number("late", "percent", "Decode: on its way when demanded."),
    "miss_rate": _number("miss", "percent", "Decode: neither."),
    "mib_per_token": _number("MiB/token", "%.2f", "Expert bytes moved per token."),
    "slots_ratio": _number("r", "%.2f", "Distinct experts per decode step over slots per layer."),
    "peak_mib": _number("peak MiB", "%.0f", "Peak device memory, all classes."),
}


def render(catalog: Catalog) -> None:
    """Draw the page for whatever the catalog holds."""
    parts.header("Overview", QUESTION)
    parts.problems(catalog.problems)
    found = subjects(catalog)
    if not found:
        parts.empty("There is no trace in this folder yet.", parts.FILL_TRACE)
        return
    subject = parts.choose_subject(found)
    if subject.trace:
        _trace_card(subject.trace)
    else:
        st.info("The trace these results were made from is not in this folder.")
    tuning = _choose_tuning(subject.tunings)
    if tuning:
        _headline(subject, tuning)
    if subject.trace:
        _routing(subject.trace)
    if tuning:
        _capacity(tuning)
        _candidates(subject, tuning)
    else:
        st.header("Capacity and policies")
        parts.empty("This trace has not been tuned yet.", parts.FILL_TUNING)
    _results(subject)
    _policies(catalog, subject)


def _choose_tuning(found: Sequence[Found[Tuning]]) -> Tuning | None:
    if len(found) < 2:
        return found[0].value if found else None
    names = {f"{tuning.value.budget} ({tuning.name})": tuning.value for tuning in found}
    name = st.selectbox("Budget tuned for", list(names), key="tuning", bind="query-params")
    return names.get(name or "", found[0].value)


def _trace_card(trace: Found[Manifest]) -> None:
    manifest, shape, hardware = trace.value, trace.value.shape, trace.value.hardware
    summary = sequence_summary(trace)
    link = hardware.link
    experts = (
        f"{shape.num_moe_layers} layers × {shape.num_experts} experts, {shape.top_k} per token"
    )
    with st.container(border=True):
        st.markdown(f"**Trace {words.plain(trace.name)}**")
        parts.emulated_note("emulated" in (link.origin, hardware.origin))
        parts.facts(
            [
                ("Model", f"{shape.model_id} ({shape.architecture}, {shape.dtype})"),
                ("Experts", f"{experts}, {words.size(shape.expert_bytes)} each"),
                ("All experts", words.size(shape.expert_bytes * shape.total_experts)),
                ("Device", f"{hardware.name} ({hardware.device})"),
                ("Link", f"{link.name}: {words.origin(link.origin)}"),
                *_sequence_facts(summary),
                ("Driven", _run_text(manifest)),
                ("Recorded", ", ".join(manifest.recorded)),
                ("Made", f"{manifest.provenance.created}, {manifest.provenance.text} text"),
            ]
        )
    if isinstance(summary, Problem):
        parts.problems([summary])
    notes = list(manifest.warnings)
    if manifest.salvaged:
        notes.insert(0, "Salvaged from a run that was cut short: its end is missing.")
    for note in notes:
        st.warning(words.plain(note))


def _sequence_facts(summary: SequenceSummary | Problem) -> list[tuple[str, str]]:
    if isinstance(summary, Problem):
        return [("Sequences", "could not be read")]
    domains = [domain or "unlabelled" for domain in summary.domains]
    tokens = f"{summary.prompt_tokens:,} fed in, {summary.generated_tokens:,} generated"
    return [
        ("Sequences and tokens", f"{summary.sequences:,} sequences; {tokens}"),
        ("Domains", ", ".join(domains) or "none"),
    ]


def _run_text(manifest: Manifest) -> str:
    run = manifest.run
    return f"batches of {run.batch_size}, up to {run.max_new_tokens} new tokens, {run.residency}"


def _headline(subject: Subject, tuning: Tuning) -> None:
    """Three tiles: the baseline, the chosen policy as predicted, and as measured."""
    chosen = next((r for r in tuning.candidates if r.label == tuning.chosen), None)
    start = baseline(tuning)
    parts.emulated_note(any(r.link_origin == "emulated" for r in (start, chosen) if r))
    with st.container(horizontal=True):
        if start:
            name = "Baseline" if _is_baseline(start) else "Slowest candidate"
            _speed_tile(f"{name}, predicted", start, start.tokens_per_s)
        if chosen:
            old = start.tokens_per_s if start else None
            _speed_tile("Chosen, from the trace", chosen, chosen.tokens_per_s, old, "of that")
            _measured_tile(subject, chosen)
    for note in chosen.warnings if chosen else ():
        st.warning(words.plain(note))


def _measured_tile(subject: Subject, chosen: Result) -> None:
    pair = verified_speeds(chosen, subject.verdicts)
    if pair is not None:
        # The trace's forecast knows nothing of the runtime's own overhead; verify calibrates it.
        calibrated, value = pair
        _speed_tile("Chosen, by verify", chosen, calibrated, note="calibrated forecast")
        _speed_tile("Chosen, measured", chosen, value, calibrated, "of verify's forecast")
        return
    value = measured_speeds([chosen], subject.verdicts, subject.results).get(chosen.label)
    if value is None:
        st.metric("Chosen, measured", "not yet", border=True, width=_TILE_WIDTH, height="stretch")
        st.caption(f"Measure it: `{parts.FILL_VERDICT}`")
    else:
        _speed_tile(
            "Chosen, measured", chosen, value, chosen.tokens_per_s, "of the trace's forecast"
        )


def _speed_tile(
    name: str,
    result: Result,
    value: float,
    old: float | None = None,
    against: str = "",
    note: str = "to compare with",
) -> None:
    times = f"{words.times(value, old)} {against}" if old else note
    with st.container(width=_TILE_WIDTH):
        st.metric(
            name,
            f"{words.rate(value)} tokens/s",
            delta=times,
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
        )
        st.caption(words.plain(result.label))


def baseline(tuning: Tuning) -> Result | None:
    """The candidate that keeps nothing or loads on demand only; else the slowest one."""
    for result in tuning.candidates:
        if _is_baseline(result):
            return result
    return min(tuning.candidates, key=lambda r: r.tokens_per_s, default=None)


def _is_baseline(result: Result) -> bool:
    names = {result.label.lower(), result.policy.get("cache", "").lower()}
    return bool(names & _BASELINES) and result.policy.get("predictor", "none") == "none"


def measured_speeds(
    candidates: Sequence[Result],
    verdicts: Sequence[Found[Verdict]],
    results: Sequence[Found[Result]],
) -> dict[str, float]:
    """Mean measured tokens/s by label, of the candidates that ran under the same conditions."""
    seen: dict[tuple[Any, ...], list[float]] = {}
    for run in (run for verdict in verdicts for run in verdict.value.runs):
        speeds = [result.tokens_per_s for result in run.measured]
        seen.setdefault(_conditions(run.predicted), []).extend(speeds)
    for result in (found.value for found in results):
        if result.source == "measured":
            seen.setdefault(_conditions(result), []).append(result.tokens_per_s)
    pairs = ((r.label, seen.get(_conditions(r))) for r in candidates)
    return {label: statistics.fmean(speeds) for label, speeds in pairs if speeds}


def verified_speeds(
    chosen: Result, verdicts: Sequence[Found[Verdict]]
) -> tuple[float, float] | None:
    """Predicted and measured tokens/s of a policy in the verdicts, medians over its repeats."""
    for run in (run for verdict in verdicts for run in verdict.value.runs):
        if _conditions(run.predicted) == _conditions(chosen):
            for check in run.checks:
                if check.quantity == "tokens_per_s":
                    return check.predicted, check.measured
    return None


def _conditions(result: Result) -> tuple[Any, ...]:
    """What two runs must share to be compared: the same policy on another link is another run."""
    return (result.policy_hash, result.slots, result.link, result.batch_size)


def _routing(trace: Found[Manifest]) -> None:
    st.header("Which experts it needs")
    summary = routing_summary(trace)
    if isinstance(summary, Problem):
        parts.problems([summary])
        return
    popularity.heatmap(summary, *popularity.controls(summary))


def _capacity(tuning: Tuning) -> None:
    st.header("What room for experts brings")
    if not tuning.curve:
        st.info("This tuning recorded no capacity curve.")
        return
    some = next((r for r in tuning.candidates if r.slots < r.total_experts), None)
    floor = capacity_figures.floor_share(some) if some else None
    budget = some.slots / some.total_experts if some else None
    fig = capacity_figures.capacity(tuning.curve, floor=floor, budget=budget)
    alt = "Hit rate over share of experts resident. " + ". ".join(
        capacity_figures.capacity_finding(tuning.curve, budget)
    )
    parts.chart(fig, capacity_figures.capacity_frame(tuning.curve), name="capacity", alt=alt)


def _candidates(subject: Subject, tuning: Tuning) -> None:
    st.header("Policies tried")
    lines = [f"Tuned for a budget of **{words.plain(tuning.budget)}**."]
    lines += [words.plain(line) for line in tuning.explanation]
    st.markdown("\n\n".join(lines))
    if not tuning.candidates:
        st.info("No policy fitted this budget.")
        return
    measured = measured_speeds(tuning.candidates, subject.verdicts, subject.results)
    frame = candidate_figures.candidates_frame(tuning.candidates)
    chosen = tuning.chosen
    speed = candidate_figures.speed(
        tuning.candidates, chosen=chosen, bounds=speed_bounds(tuning), measured=measured
    )
    title = ". ".join(candidate_figures.speed_finding(tuning.candidates, chosen))
    parts.chart(speed, frame, name="candidates", alt=f"Tokens per second by policy. {title}")
    outcomes = candidate_figures.outcomes(tuning.candidates, chosen=chosen)
    columns = pd.Index(["policy", "hit_rate", "late_rate", "miss_rate"])
    alt = "Hit, late and miss shares of decode demands, by policy."
    parts.chart(outcomes, frame.reindex(columns=columns), name="outcomes", alt=alt)
    st.dataframe(_table(frame), column_config=dict(_COLUMNS), hide_index=True, width="stretch")
    if tuning.runner_up:
        st.caption(f"Runner-up: {words.plain(tuning.runner_up)}")


def _table(frame: pd.DataFrame) -> pd.DataFrame:
    """The candidates in the units people read."""
    wide = frame.assign(
        ttft_ms=frame["ttft_s"] * 1e3,
        tpot_ms=frame["tpot_s"] * 1e3,
        mib_per_token=frame["bytes_per_token"] / 2**20,
        peak_mib=frame["peak_device_bytes"] / 2**20,
    )
    return wide.reindex(columns=list(_COLUMNS))


def speed_bounds(tuning: Tuning) -> dict[str, float]:
    """What nothing can beat, by name: the bound policies tried, and the chosen one's own bounds."""
    bounds = {result.label: result.tokens_per_s for result in tuning.bounds}
    chosen = next((r for r in tuning.candidates if r.label == tuning.chosen), None)
    if chosen:
        known = chosen.bounds
        bounds["link, perfect overlap"] = known.link_tokens_per_s
        bounds["all experts resident"] = known.all_resident_tokens_per_s
        if not any("belady" in name.lower() for name in bounds):
            bounds["Belady"] = known.belady_tokens_per_s
    return {name: value for name, value in bounds.items() if value > 0}


def _results(subject: Subject) -> None:
    """Single results lying in the folder, made by `simulate` or `deploy`."""
    if not subject.results:
        return
    st.header("Single runs")
    found = [result.value for result in subject.results]
    frame = candidate_figures.candidates_frame(found)
    table = _table(frame).drop(columns=["late_rate", "miss_rate", "mib_per_token", "slots_ratio"])
    table.insert(0, "file", [result.name for result in subject.results])
    table.insert(1, "source", [r.source for r in found])
    table.insert(2, "link", [f"{r.link}: {words.origin(r.link_origin)}" for r in found])
    st.dataframe(table, column_config=dict(_COLUMNS), hide_index=True, width="stretch")
    parts.download(frame, name="runs", text="Data of these runs (CSV)")


def _policies(catalog: Catalog, subject: Subject) -> None:
    """The policy files of this trace, with the command that runs the model under each."""
    shown = list(subject.policies) or list(catalog.policies)
    if not shown:
        return
    st.header("Policy files")
    if not subject.policies:
        st.caption("None of these says that it was tuned on this trace.")
    st.caption("Run the model under it; the page Policy explains each:")
    lines = [f"expertflow-trace deploy {parts.shell_path(policy.path)}" for policy in shown]
    st.code("\n".join(lines), language="bash", wrap_lines=True)

"""Timeline: a window of a run, simulated or recorded, and what was decided in it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

import pandas as pd
import streamlit as st

from ...simulator.account import RunRecord
from ...simulator.policy.spec import PolicySpec, check_shape
from ...simulator.timeline import run_timeline
from ...tracer.errors import ExpertFlowError
from ...tracer.export.perfetto import trace_timeline
from ...tracer.export.timeline import event_lines
from ...tracer.schema import Manifest
from ...tracer.store import Trace
from .. import log_words, parts, predictions, words
from .. import timeline as lines
from ..data import Catalog, Found, Problem, Subject
from ..figures import timeline as figures
from ..frames import Frame
from ..predictions import Desk, Question
from . import desk as desks

QUESTION: Final = "What happens when, and why was each expert loaded or evicted?"
SIMULATED, RECORDED = "simulated", "recorded"
_WIDEST: Final = 40
_CHART: Final = "timeline"


def render(catalog: Catalog) -> None:
    """Draw the page for whatever the catalog holds."""
    parts.header("Timeline", QUESTION)
    parts.problems(catalog.problems)
    if (chosen := desks.choose(catalog)) is None:
        return
    subject, trace = chosen
    run = st.segmented_control(
        "Run",
        [SIMULATED, RECORDED],
        default=SIMULATED,
        required=True,
        key="run",
        bind="query-params",
        help="Simulated: the policy replayed on this trace. Recorded: what the traced run itself did.",
    )
    if run == RECORDED:
        _recorded(trace)
    else:
        _simulated(catalog, subject, trace)


def _simulated(catalog: Catalog, subject: Subject, trace: Found[Manifest]) -> None:
    left, right = st.columns(2)
    with left:
        machine = desks.choose_machine(catalog, trace)
    if machine is None or (desk := desks.ready(trace, machine, compiled=False)) is None:
        return
    with right:
        spec = _choose_policy(catalog, subject, trace, desk)
    try:
        with st.spinner("Simulating with a decision log …"):
            record, passes = predictions.record(desk, spec)
    except ExpertFlowError as error:
        st.error(words.plain(str(error)))
        return
    whole = len(desk.whole.workload.steps)
    cut = f" It covers the first {passes:,} of {whole:,} passes." if passes < whole else ""
    st.caption(
        words.plain(
            f"SIMULATED run of {spec.label} on {desk.whole.device} behind {desk.whole.link} "
            f"({words.origin(desk.whole.link_origin)}).{cut}"
        )
    )
    overview = lines.passes_of(record.steps)
    first, last = _window(overview, is_recorded=False)
    found = lines.simulated(record, first, last)
    _draw(found, first, last)
    _save_simulated(record, spec.label)
    _explain_log(record, found, spec, first, last)


def _choose_policy(
    catalog: Catalog, subject: Subject, trace: Found[Manifest], desk: Desk
) -> PolicySpec:
    """A policy file that fits the model, or plain ones at half of the experts."""
    half = max(1, desk.shape_experts // 2)
    options: dict[str, PolicySpec] = {}
    for policy in (*subject.policies, *catalog.policies):
        try:
            check_shape(policy.value.shape, trace.value.shape)
        except ExpertFlowError:
            continue
        options[f"{policy.value.behaviour.label} ({policy.name})"] = policy.value.behaviour
    for question in (
        Question(slots=half),
        Question(slots=half, cache="static"),
        *(
            [Question(slots=half, predictor="gate_lookahead")]
            if predictions.can_predict(desk, "gate_lookahead")
            else []
        ),
    ):
        spec = predictions.spec_of(desk, question)
        options.setdefault(spec.label, spec)
    name = st.selectbox("Policy", list(options), key="policy", bind="query-params")
    return options.get(name or "", next(iter(options.values())))


def _recorded(trace: Found[Manifest]) -> None:
    overview = lines.recorded_passes(trace)
    if isinstance(overview, Problem):
        if "steps" not in trace.value.recorded:
            parts.empty("This trace holds no times, so there is no recorded run.", parts.FILL_TRACE)
        else:
            parts.problems([overview])
        return
    run = trace.value.run
    link = trace.value.hardware.link
    st.caption(
        words.plain(
            f"RECORDED run, {run.residency}, batches of {run.batch_size}, link {link.name} "
            f"({words.origin(link.origin)})."
        )
    )
    if run.residency == "resident":
        st.info(
            "All experts were resident when this trace was recorded, so nothing was copied and nothing waited. "
            "`expertflow-trace run --residency stream` records copies too."
        )
    first, last = _window(overview, is_recorded=True)
    found = lines.recorded(trace, first, last)
    if isinstance(found, Problem):
        parts.problems([found])
        return
    _draw(found, first, last)
    _save_recorded(trace, first, last)
    _explain_copies(found, first, last)


def _window(overview: Frame, *, is_recorded: bool) -> tuple[int, int]:
    """First and last pass of the window, chosen below the picture of all passes."""
    steps = overview["step"].to_numpy()
    place = st.container()
    left, right = st.columns([3, 1])
    with left:
        first = st.slider(
            "First pass",
            int(steps[0]),
            max(int(steps[-1]), int(steps[0]) + 1),
            value=int(steps[0]),
            key="first",
            bind="query-params",
        )
    with right:
        width = st.slider("Passes", 1, _WIDEST, value=6, key="passes", bind="query-params")
    last = min(first + width - 1, int(steps[-1]))
    first = min(first, last)
    with place:
        parts.chart(
            figures.passes(overview, first, last, is_recorded=is_recorded),
            overview,
            name="passes",
            alt="Time of every pass, waiting apart. " + ". ".join(figures.passes_finding(overview)),
        )
    return first, last


def _draw(found: lines.Timeline, first: int, last: int) -> None:
    if found.left_out:
        st.info(
            f"The last {found.left_out} passes of this window are not drawn: too many bars. Choose fewer passes."
        )
    parts.chart(
        figures.lanes(found, first, last),
        found.bars,
        name=_CHART,
        alt="Lanes of compute, copies and waiting over time. "
        + ". ".join(figures.lanes_finding(found, first, last)),
        select=("points",),
    )
    st.caption("A layer that ran in several waves is drawn as one wait and one computation.")


def _picked(first: int, last: int) -> int:
    """The pass to explain: the one of the bar picked last, or as typed."""
    marks = parts.picked(st.session_state.get(f"chart-{_CHART}"))
    picked = int(marks[0]) if marks else None
    if picked is not None and st.session_state.get("picked-bar") != picked:
        st.session_state["picked-bar"] = picked
        if first <= picked <= last:
            st.session_state["explain"] = picked
    if not first <= st.session_state.get("explain", first) <= last:
        st.session_state["explain"] = first
    return int(
        st.number_input(
            "Pass to explain", first, last, key="explain", width=220, help="Or pick a bar above."
        )
    )


def _explain_log(
    record: RunRecord, found: lines.Timeline, spec: PolicySpec, first: int, last: int
) -> None:
    st.header("What was decided, and why")
    step = _picked(first, last)
    entries = [entry for entry in record.log if entry.step == step]
    uses = log_words.Uses(record.log)
    decided = log_words.decisions(entries, uses, spec.predictor.name, spec.cache.name)
    row = found.passes[found.passes["step"] == step]
    if len(row):
        one = row.iloc[0]
        st.markdown(
            words.plain(
                f"Pass {step} ({one['phase']}, {_tokens(int(one['tokens']))}) took {words.seconds(one['total_s'])}, "
                f"{words.seconds(one['stall_s'])} of it waiting. {log_words.summary(decided)}"
            )
        )
    told = log_words.story(entries, uses, spec.predictor.name, spec.cache.name)
    text = "\n".join(
        f"- {words.plain(event)}\n" + "".join(f"    - {words.plain(line)}\n" for line in below)
        for event, below in told
    )
    with st.container(height=420, border=True):
        st.markdown(text or "Nothing was asked for.")
    st.caption("“Needed again” looks at the simulated part of the run only.")
    table = pd.DataFrame([asdict(decision) for decision in decided])
    parts.download(table, name=f"decisions-{step}", text="These decisions (CSV)")


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _explain_copies(found: lines.Timeline, first: int, last: int) -> None:
    copies = found.bars[found.bars["lane"] == lines.COPY]
    if not len(copies):
        return
    st.header("What was copied")
    step = _picked(first, last)
    rows = copies[copies["step"] == step]
    if not len(rows):
        st.markdown(f"Pass {step} asked for no copy.")
        return
    zero = float(found.bars["start_s"].min())
    table = pd.DataFrame(
        {
            "layer": rows["layer"],
            "expert": rows["expert"],
            "why": rows["cause"],
            "size": [words.size(value) for value in rows["bytes"]],
            "began, ms": ((rows["start_s"] - zero) * 1e3).round(3),
            "took, ms": ((rows["end_s"] - rows["start_s"]) * 1e3).round(3),
        }
    )
    st.dataframe(table, hide_index=True, width="stretch")


def _save_simulated(record: RunRecord, label: str) -> None:
    st.download_button(
        "This simulated run for ui.perfetto.dev (JSON)",
        lambda: perfetto(record, label),
        file_name="simulated-run.json",
        mime="application/json",
        key="perfetto",
        on_click="ignore",
        icon=":material/download:",
        type="tertiary",
    )


def _save_recorded(trace: Found[Manifest], first: int, last: int) -> None:
    st.download_button(
        "These passes for ui.perfetto.dev (JSON)",
        lambda: "\n".join(
            event_lines(trace_timeline(Trace.open(trace.path), range(first, last + 1)))
        ),
        file_name=f"recorded-{first}-{last}.json",
        mime="application/json",
        key="perfetto-recorded",
        on_click="ignore",
        icon=":material/download:",
        type="tertiary",
    )
    st.caption("All passes:")
    st.code(
        f"expertflow-trace export {parts.shell_path(trace.path)} --to perfetto --out run.json.gz",
        language="bash",
        wrap_lines=True,
    )


def perfetto(record: RunRecord, label: str) -> str:
    """A simulated run in the Chrome trace format; its name says that it is not a measurement."""
    return "\n".join(event_lines(run_timeline(f"predicted: {label}", record)))

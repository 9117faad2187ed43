"""Verify: whether the forecast held, predicted next to measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pandas as pd
import streamlit as st

from ...simulator.result import Check, Verdict, VerifiedRun
from .. import parts, words
from ..data import Catalog, Found
from ..figures import time_split as time_figures
from ..figures import verify as verify_figures

QUESTION: Final = "Did the forecast hold?"


def render(catalog: Catalog) -> None:
    """Draw the page for whatever the catalog holds."""
    parts.header("Verify", QUESTION)
    parts.problems(catalog.problems)
    if not catalog.verdicts:
        parts.empty("No forecast in this folder has been verified yet.", parts.FILL_VERDICT)
        if not catalog.policies:
            parts.empty("Verifying needs a policy, and there is none here.", parts.FILL_TUNING)
        if not catalog.traces:
            parts.empty("Tuning needs a trace, and there is none here.", parts.FILL_TRACE)
        return
    verdict = _choose(catalog.verdicts)
    _in_words(verdict)
    _promises(verdict)
    if not verdict.runs:
        st.info("This verdict holds no runs.")
        return
    _charts(verdict)
    st.header("By configuration")
    for run in verdict.runs:
        _configuration(run)
    _provenance(verdict)


def _choose(found: Sequence[Found[Verdict]]) -> Verdict:
    if len(found) == 1:
        return found[0].value
    names = [verdict.name for verdict in found]
    name = st.selectbox("Verdict", names, key="verdict", bind="query-params")
    return found[names.index(name)].value if name in names else found[0].value


def _in_words(verdict: Verdict) -> None:
    # The summary opens with the same words, for those who read it elsewhere.
    bare = verdict.summary.removeprefix("Validated.").removeprefix("NOT validated:").strip()
    summary = words.plain(bare)
    if verdict.validated:
        st.success(f"**Validated.** {summary}", icon=":material/check_circle:")
    else:
        st.error(
            f"**NOT validated.** {summary}\n\n" + "\n".join(f"- {why}" for why in reasons(verdict)),
            icon=":material/cancel:",
        )
    emulated = any(is_emulated(run) for run in verdict.runs)
    parts.emulated_note(emulated)
    for note in verdict.warnings:
        st.warning(words.plain(note))


def reasons(verdict: Verdict) -> list[str]:
    """Why a verdict is negative, one sentence per cause, safe inside Markdown."""
    out: list[str] = []
    for run in verdict.runs:
        name = words.plain(run.label)
        failed = [c for c in run.checks if words.is_outside(c)]
        if failed:
            out.append(f"{name}: {words.plain(', '.join(map(words.miss, failed)))}")
        if not run.same_tokens and run.is_lossless:
            out.append(f"{name}: the text differs from the resident model’s")
        if not run.log_replays:
            out.append(f"{name}: the decision log does not replay")
    if not verdict.order_preserved:
        out.append("The order of the policies by speed is not the one predicted")
    return out


def is_emulated(run: VerifiedRun) -> bool:
    """Whether any result of a run went over an emulated link."""
    return any(r.link_origin == "emulated" for r in (run.predicted, *run.measured))


def _promises(verdict: Verdict) -> None:
    runs = verdict.runs
    checks = [c for run in runs for c in run.checks if c.is_judged]
    lossless = [run for run in runs if run.is_lossless]
    same = sum(run.same_tokens for run in lossless)
    replays = sum(run.log_replays for run in runs)
    order = "yes" if verdict.order_preserved else "NO"
    tiles = [
        ("Checks within tolerance", f"{sum(c.passed for c in checks)} of {len(checks)}"),
        ("Same text as resident", f"{same} of {len(lossless)} runs"),
        ("Decision log replays", f"{replays} of {len(runs)} runs"),
        ("Order of policies preserved", order if len(runs) > 1 else "one run only"),
    ]
    with st.container(horizontal=True):
        for name, value in tiles:
            st.metric(name, value, border=True, width=215)
    noise = [f"{words.label(k)} ±{words.percent(v)}" for k, v in verdict.noise.items()]
    if noise:
        st.caption("Noise of the same run made twice: " + words.plain(", ".join(noise)))


def _charts(verdict: Verdict) -> None:
    st.header("Predicted next to measured")
    if any(run.checks for run in verdict.runs):
        parts.chart(
            verify_figures.checks(verdict.runs),
            verify_figures.checks_frame(verdict.runs),
            name="checks",
            alt="Predicted and measured values with tolerance bands, one panel per quantity. "
            + verify_figures.checks_finding(verdict.runs)[0],
        )
    st.header("Where the time goes")
    parts.chart(
        time_figures.time_split(verdict.runs),
        time_figures.time_split_frame(verdict.runs),
        name="time-split",
        alt="Seconds by part, predicted and measured. "
        + time_figures.time_split_finding(verdict.runs)[0],
    )


def _served(run: VerifiedRun) -> None:
    """How requests were served that arrived."""
    for result in (run.predicted, *run.measured[-1:]):
        if result.arrivals is not None:
            st.markdown(f"{result.source.title()}: {words.plain(result.arrivals.finding)}")


def _configuration(run: VerifiedRun) -> None:
    failed = sum(map(words.is_outside, run.checks))
    state = f"{failed} outside tolerance" if failed else "all within tolerance"
    with st.expander(f"{words.plain(run.label)}: {state}", expanded=True):
        first = run.predicted
        link = f"{first.link} ({words.origin(first.link_origin)})"
        st.markdown(
            f"Same text as the resident model: **{_yes(run.same_tokens)}**"
            f"{'' if run.is_lossless else ' (lossy: no promise)'} · "
            f"decision log replays: **{_yes(run.log_replays)}** · "
            f"{len(run.measured)} measured repeats · "
            f"{first.slots} of {first.total_experts} experts resident · "
            f"device {words.plain(first.device)} · link {words.plain(link)}"
        )
        _served(run)
        st.table(checks_table(run.checks))
        st.caption("gap: predicted less measured; noise: the same run made twice")
        if run.causes:
            st.caption("Gap in speed, split by cause")
            st.table(causes_table(run))


def checks_table(found: Sequence[Check]) -> pd.DataFrame:
    """The checks of one configuration as a person reads them."""
    rows = [
        {
            "quantity": words.plain(words.label(c.quantity)),
            "predicted": words.plain(words.amount(c, c.predicted)),
            "measured": words.plain(words.amount(c, c.measured)),
            "gap": words.plain(words.gap(c, c.gap)),
            "tolerance": words.plain(f"±{words.gap(c, c.tolerance, sign=False)}"),
            "noise": words.plain(f"±{words.gap(c, c.noise, sign=False)}"),
            "pass": _mark(c),
            "cause": words.plain(c.cause),
        }
        for c in found
    ]
    columns = ["quantity", "predicted", "measured", "gap", "tolerance", "noise", "pass", "cause"]
    return pd.DataFrame(rows, columns=columns).set_index("quantity")


def _mark(check: Check) -> str:
    if not check.is_judged:
        return "– not judged"
    return "✓ pass" if check.passed else "✗ outside"


def causes_table(run: VerifiedRun) -> pd.DataFrame:
    """What the gap in speed is made of, largest part first."""
    parts_found = sorted(run.causes.items(), key=lambda item: -abs(item[1]))
    rows = [
        {"cause": words.plain(words.label(name)), "part of the gap": f"{value * 100:+.1f} %"}
        for name, value in parts_found
    ]
    return pd.DataFrame(rows).set_index("cause")


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _provenance(verdict: Verdict) -> None:
    made = verdict.provenance
    st.caption(f"Made {words.plain(made.created)} with")
    st.code(made.command, language="bash", wrap_lines=True)

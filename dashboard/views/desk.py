"""What pages that predict begin with: which trace, which machine, and a simulator that is ready."""

from __future__ import annotations

import streamlit as st

from ...simulator.result import Result
from ...tracer.schema import Manifest
from .. import parts, predictions, words
from ..data import Catalog, Found, Problem, Subject, subjects
from ..predictions import Desk, MachineChoice


def choose(catalog: Catalog) -> tuple[Subject, Found[Manifest]] | None:
    """The trace a page predicts from; None, after saying what to do, where there is none."""
    found = [subject for subject in subjects(catalog) if subject.trace]
    if not found:
        parts.empty("There is no trace in this folder to predict from.", parts.FILL_TRACE)
        return None
    subject = parts.choose_subject(found)
    assert subject.trace is not None
    return subject, subject.trace


def choose_machine(catalog: Catalog, trace: Found[Manifest]) -> MachineChoice | None:
    """The machine whose times are used; the first that is offered is the one to trust most."""
    offered = predictions.machines_for(catalog, trace)
    if not offered:
        parts.empty(
            "This trace holds no times and not the size of its experts, so no machine can be declared for it.",
            "expertflow-trace import routing.npz --out traces/theirs --experts 32 --expert-bytes 13MB",
        )
        return None
    labels = {choice.label: choice for choice in offered}
    label = st.selectbox("Machine", list(labels), key="machine", bind="query-params")
    return labels.get(label or "", offered[0])


def ready(trace: Found[Manifest], machine: MachineChoice, *, compiled: bool = True) -> Desk | None:
    """Get the simulator ready, with a word where that takes a while; None, after saying why, if it cannot be.

    Pages that do not ask the compiled engine do not wait for it.
    """
    with st.spinner("Reading the trace …"):
        desk = predictions.desk_for(trace, machine)
    if isinstance(desk, Problem):
        parts.problems([desk])
        return None
    if compiled and not predictions.is_warm():
        text = (
            "Compiling the simulator: about half a minute, once per version; the result is kept on disk, so that "
            "the next start takes a second."
        )
        with st.spinner(text, show_time=True):
            predictions.warm(desk)
    return desk


def origin(desk: Desk, result: Result | None = None) -> None:
    """One line on what these predictions rest on; with a result, on its machine and link."""
    said = result or desk.whole
    half = (
        "judged on the half of the batches that nothing was learned from"
        if desk.judge.is_held_out
        else "judged on the one batch there is, which flatters what learns"
    )
    text = f"Predicted for {said.device} behind {said.link} ({words.origin(said.link_origin)}); {half}."
    st.caption(words.plain(text))
    if desk.total_passes:
        st.info(
            f"Replayed: the first {desk.passes:,} of about {desk.total_passes:,} passes. The commands of this page "
            "replay all of them."
        )
    for note in desk.whole.warnings:
        st.caption(f":material/warning: {words.plain(note)}")
    parts.emulated_note(said.link_origin == "emulated")

"""The pieces that pages are made of: a chart with its data, an empty state, a list of problems."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from . import theme, words
from .data import Catalog, Problem

FILL_TRACE = "expertflow-trace run --out traces/mine"
FILL_TUNING = "expertflow-trace tune traces/mine --budget 0.5 --out traces/mine-policy.json"
FILL_VERDICT = "expertflow-trace verify traces/mine-policy.json --out traces/mine-verdict.json"


def header(title: str, question: str) -> None:
    """A page's name and the question it answers."""
    st.title(title)
    st.markdown(f"**{question}**")


def chart(fig: go.Figure, frame: pd.DataFrame, *, name: str, alt: str) -> None:
    """A figure, what it shows in words for those who cannot see it, and its data as CSV."""
    st.plotly_chart(fig, config=theme.CONFIG, alt=alt, key=f"chart-{name}")
    download(frame, name=name, text="Data of this chart (CSV)")


def download(frame: pd.DataFrame, *, name: str, text: str) -> None:
    """A quiet button that saves a table as CSV."""
    st.download_button(
        text,
        frame.to_csv(index=False),
        file_name=f"{name}.csv",
        mime="text/csv",
        key=f"csv-{name}",
        on_click="ignore",
        type="tertiary",
        icon=":material/download:",
    )


def empty(what: str, command: str) -> None:
    """Say what is not there yet and which command makes it."""
    st.info(f"{what} This command makes it:", icon=":material/info:")
    st.code(command, language="bash")


def problems(found: Sequence[Problem]) -> None:
    """Name every file that could not be read, and why."""
    if not found:
        return
    count = f"{len(found)} {'thing' if len(found) == 1 else 'things'} could not be read"
    lines = [f"- **{words.plain(p.name)}**: {words.plain(p.reason)}" for p in found]
    st.warning(f"{count}; the rest is shown.\n\n" + "\n".join(lines), icon=":material/warning:")


def emulated_note(is_emulated: bool) -> None:
    """One line on what "emulated" means, where something emulated is shown."""
    if is_emulated:
        st.badge("EMULATED link", icon=":material/science:", color="orange")
        st.caption(words.EMULATED)


def facts(rows: Sequence[tuple[str, str]], *, columns: int = 3) -> None:
    """Short facts as label and text, side by side."""
    for start in range(0, len(rows), columns):
        places = st.columns(columns)
        for place, (name, text) in zip(places, rows[start : start + columns], strict=False):
            place.markdown(f":gray[{words.plain(name)}]  \n{words.plain(text)}")


def shell_path(path: Path) -> str:
    """A path to type after a command: relative to the working directory where it lies inside."""
    full = path.resolve()
    here = Path.cwd()
    return shlex.quote(str(full.relative_to(here) if full.is_relative_to(here) else full))


def sidebar(catalog: Catalog) -> None:
    """Which folder is shown and what was found in it."""
    st.caption("Data folder")
    st.code(shell_path(catalog.root), language=None, wrap_lines=True)
    counts = [
        ("traces", len(catalog.traces)),
        ("tunings", len(catalog.tunings)),
        ("policies", len(catalog.policies)),
        ("verdicts", len(catalog.verdicts)),
        ("single runs", len(catalog.results)),
    ]
    st.caption(" · ".join(f"{name}: {number}" for name, number in counts))
    if catalog.problems:
        st.caption(f":material/warning: {len(catalog.problems)} not readable")
    st.button("Read the folder again", icon=":material/refresh:", type="tertiary")

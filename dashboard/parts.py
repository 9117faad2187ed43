"""The pieces that pages are made of: a chart with its data, an empty state, a list of problems."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from . import theme, words
from .data import Catalog, Problem, Subject
from .standalone import page_of

FILL_TRACE = "expertflow-trace run --out traces/mine"
FILL_TUNING = "expertflow-trace tune traces/mine --budget 0.5 --out traces/mine-policy.json"
FILL_SWEEP = "expertflow-trace sweep traces/mine --out sweeps/mine"
FILL_VERDICT = "expertflow-trace verify traces/mine-policy.json --out traces/mine-verdict.json"


def header(title: str, question: str) -> None:
    """A page's name and the question it answers."""
    st.title(title)
    st.markdown(f"**{question}**")


def chart(
    fig: go.Figure, frame: pd.DataFrame, *, name: str, alt: str, select: Sequence[str] = ()
) -> Any:
    """A figure, what it shows in words for those who cannot see it, and both to take away.

    With `select` (points, box, lasso) marks can be picked, and what was picked comes back.
    """
    if select:
        picked = st.plotly_chart(
            fig,
            config=theme.SELECTING,
            alt=alt,
            key=f"chart-{name}",
            on_select="rerun",
            selection_mode=tuple(select),  # type: ignore[arg-type]
        )
    else:
        picked = st.plotly_chart(fig, config=theme.CONFIG, alt=alt, key=f"chart-{name}")
    _take_away(fig, frame, name, alt)
    return picked


def picked(state: Any) -> list[Any]:
    """What the picked marks of a chart carry: the first of their custom data, in whatever wrapping it comes back."""
    points = state["selection"]["points"] if state else []
    found: list[Any] = []
    for point in points:
        carried = point.get("customdata")
        if isinstance(carried, dict):  # rows of a matrix come back by column
            carried = list(carried.values())
        if isinstance(carried, list):
            carried = carried[0] if carried else None
        if carried is not None:
            found.append(carried)
    return found


def _take_away(fig: go.Figure, frame: pd.DataFrame, name: str, alt: str) -> None:
    """Data and figure as files, made when they are asked for."""
    with st.popover("Download", icon=":material/download:", type="tertiary"):
        download(frame, name=name, text="Data (CSV)")
        st.download_button(
            "Data (Parquet)",
            lambda: _parquet(frame),
            file_name=f"{name}.parquet",
            mime="application/vnd.apache.parquet",
            key=f"parquet-{name}",
            on_click="ignore",
            type="tertiary",
        )
        st.download_button(
            "Figure (HTML, works offline)",
            lambda: page_of(fig, alt),
            file_name=f"{name}.html",
            mime="text/html",
            key=f"html-{name}",
            on_click="ignore",
            type="tertiary",
        )


def _parquet(frame: pd.DataFrame) -> bytes:
    body = io.BytesIO()
    frame.to_parquet(body, index=False)
    return body.getvalue()


def download(frame: pd.DataFrame, *, name: str, text: str) -> None:
    """A quiet button that saves a table as CSV."""
    st.download_button(
        text,
        lambda: frame.to_csv(index=False),
        file_name=f"{name}.csv",
        mime="text/csv",
        key=f"csv-{name}",
        on_click="ignore",
        type="tertiary",
        icon=":material/download:",
    )


def choose_subject(found: Sequence[Subject]) -> Subject:
    """Which trace a page is about; asked only where there are several. The address keeps the answer."""
    if len(found) == 1:
        return found[0]
    names = [subject.name for subject in found]
    name = st.selectbox("Trace", names, key="trace", bind="query-params")
    return found[names.index(name)] if name in names else found[0]


def empty(what: str, command: str) -> None:
    """Say what is not there yet and which command makes it."""
    st.info(f"{what} This command makes it:", icon=":material/info:")
    st.code(command, language="bash", wrap_lines=True)


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
        ("sweeps", len(catalog.sweeps)),
        ("machines", len(catalog.machines)),
        ("watched runs", len(catalog.lives)),
    ]
    st.caption(" · ".join(f"{name}: {number}" for name, number in counts))
    if catalog.problems:
        st.caption(f":material/warning: {len(catalog.problems)} not readable")
    st.button("Read the folder again", icon=":material/refresh:", type="tertiary")

"""Sweep: what many configurations would bring, which of them are worth having, and which choice matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import streamlit as st

from ...simulator.sweep_folder import SweepFile
from .. import parts, words
from ..data import Catalog, Found, Problem, sweep_table
from ..figures import sweep as figures
from ..frames import Frame

QUESTION: Final = "Which of the many configurations are worth having, and which choice matters?"
_CHART: Final = "pareto"
_TABLE: Final = (
    "label", "tokens_per_s", "decode_hit_rate", "ttft_p95_s", "tpot_p95_s", "bytes_per_token", "peak_device_bytes",
    "slots_ratio", "link", "is_bound",
)  # fmt: skip


def render(catalog: Catalog) -> None:
    """Draw the page for whatever the catalog holds."""
    parts.header("Sweep", QUESTION)
    parts.problems(catalog.problems)
    if not catalog.sweeps:
        parts.empty("There is no sweep in this folder yet.", parts.FILL_SWEEP)
        if not catalog.traces:
            parts.empty("A sweep needs a trace, and there is none here.", parts.FILL_TRACE)
        return
    sweep = _choose(catalog.sweeps)
    _card(sweep)
    table = sweep_table(sweep)
    if isinstance(table, Problem):
        parts.problems([table])
        return
    frame = good_rows(table.to_pandas())
    _failed(table.num_rows - len(frame), table.to_pandas())
    if not len(frame):
        st.info("No configuration of this sweep could be predicted.")
        return
    chosen = _front(frame)
    usable = chosen[~chosen["is_bound"]]
    if len(usable):
        parts.chart(
            figures.coordinates(usable),
            usable,
            name="coordinates",
            alt="Parallel coordinates of choices and outcomes. "
            + ". ".join(figures.coordinates_finding(usable)),
        )
    _importance(frame)
    _rows(chosen, len(frame))


def _choose(found: Sequence[Found[SweepFile]]) -> Found[SweepFile]:
    if len(found) == 1:
        return found[0]
    names = [sweep.name for sweep in found]
    name = st.selectbox("Sweep", names, key="sweep", bind="query-params")
    return found[names.index(name)] if name in names else found[0]


def _card(sweep: Found[SweepFile]) -> None:
    document = sweep.value
    machine = document.machine
    counts = document.counts
    with st.container(border=True):
        st.markdown(f"**Sweep {words.plain(sweep.name)}**")
        parts.emulated_note(any("emulated" in link for link in machine.links))
        parts.facts(
            [
                ("Model", document.model_id),
                ("Machine", f"{machine.device}{', calibrated' if machine.is_calibrated else ''}"),
                ("Links", ", ".join(machine.links)),
                ("State", document.status),
                (
                    "Configurations",
                    f"{counts.get('predicted', 0):,} predicted, {counts.get('failed', 0):,} failed, "
                    f"{counts.get('bounds', 0):,} bounds",
                ),
                ("Aimed at", ", ".join(document.search.get("objectives", ()))),
            ]
        )
    if document.status != "finished":
        st.info(
            "This sweep is not finished; what is on disk is shown. The same command continues it."
        )
    for note in document.warnings:
        st.warning(words.plain(note))


def good_rows(frame: Frame) -> Frame:
    """Rows that could be predicted, fastest first."""
    good = frame[(frame["error"] == "") & frame["tokens_per_s"].notna()]
    return good.sort_values("tokens_per_s", ascending=False, ignore_index=True)


def _failed(count: int, frame: Frame) -> None:
    if count:
        first = frame.loc[frame["error"] != "", "error"].head(1)
        reason = f" The first: {first.iloc[0]}" if len(first) else ""
        st.warning(words.plain(f"{count} configurations failed.{reason}"))


def _front(frame: Frame) -> Frame:
    """The front, and the rows that were picked in it (all if none)."""
    st.header("What is worth having")
    columns = list(figures.columns_of(frame))
    left, right = st.columns(2)
    with left:
        x = st.selectbox(
            "Across",
            columns,
            index=columns.index("peak_device_bytes") if "peak_device_bytes" in columns else 0,
            key="x",
            bind="query-params",
        )
    with right:
        y = st.selectbox(
            "Up", columns, index=columns.index("tokens_per_s"), key="y", bind="query-params"
        )
    x, y = x or "peak_device_bytes", y or "tokens_per_s"
    state = parts.chart(
        figures.pareto(frame, x, y),
        frame,
        name=_CHART,
        alt="Configurations by two quantities, with the front. "
        + ". ".join(figures.pareto_finding(frame, x, y)),
        select=("points", "box", "lasso"),
    )
    keys = parts.picked(state)
    chosen = frame[frame["key"].isin(keys)] if keys else frame
    if not keys:
        st.caption(
            "Draw a box or a lasso around points, or pick one: what follows then shows them alone."
        )
    else:
        st.caption(
            f"{len(chosen)} of {len(frame):,} configurations picked; double-click the figure to have all again."
        )
    return chosen


def _importance(frame: Frame) -> None:
    columns = list(figures.columns_of(frame))
    st.header("Which choice matters")
    objective = st.selectbox(
        "For",
        columns,
        index=columns.index("tokens_per_s"),
        key="objective",
        bind="query-params",
    )
    objective = objective or "tokens_per_s"
    usable = frame[~frame["is_bound"]]
    parts.chart(
        figures.importance(usable, objective),
        figures.importance_frame(usable, objective),
        name="importance",
        alt="Share of variance that each choice explains. "
        + ". ".join(figures.importance_finding(usable, objective)),
    )


def _rows(chosen: Frame, total: int) -> None:
    st.header("The rows")
    table = chosen[[name for name in _TABLE if name in chosen]].assign(
        ttft_p95_s=chosen["ttft_p95_s"] * 1e3,
        tpot_p95_s=chosen["tpot_p95_s"] * 1e3,
        bytes_per_token=chosen["bytes_per_token"] / 2**20,
        peak_device_bytes=chosen["peak_device_bytes"] / 2**20,
    )
    number = st.column_config.NumberColumn
    st.dataframe(
        table,
        hide_index=True,
        width="stretch",
        height=420,
        column_config={
            "label": st.column_config.TextColumn("policy", pinned=True, width="large"),
            "tokens_per_s": number("tokens/s", format="%.2f"),
            "decode_hit_rate": number("decode hits", format="percent"),
            "ttft_p95_s": number("TTFT p95, ms", format="%.1f"),
            "tpot_p95_s": number("TPOT p95, ms", format="%.2f"),
            "bytes_per_token": number("MiB/token", format="%.2f"),
            "peak_device_bytes": number("peak MiB", format="%.0f"),
            "slots_ratio": number("r", format="%.2f"),
            "is_bound": st.column_config.CheckboxColumn("bound"),
        },
    )
    parts.download(chosen, name="sweep-rows", text=f"{len(chosen):,} of {total:,} rows (CSV)")

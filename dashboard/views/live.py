"""Live: a `run` or a `deploy` while it goes on, by the file it writes about once a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

import streamlit as st

from ...tracer.live import LiveStatus
from .. import live, parts, words
from ..data import Catalog, live_runs
from ..figures import live as figures
from ..live import Standing

QUESTION: Final = "What is running, and how is it going?"
EVERY_S: Final = 2.0
FILL: Final = (
    f"{parts.FILL_TRACE}\n"
    "expertflow-trace deploy traces/mine-policy.json --live traces/mine-deploy.live.json"
)
_BOXES: Final[Mapping[Standing, Callable[..., object]]] = {
    "running": st.info,
    "silent": st.warning,
    "gone": st.error,
    "failed": st.error,
    "interrupted": st.warning,
    "finished": st.success,
}
_ICONS: Final[Mapping[Standing, str]] = {
    "running": ":material/play_arrow:",
    "silent": ":material/hourglass_empty:",
    "gone": ":material/link_off:",
    "failed": ":material/error:",
    "interrupted": ":material/pause:",
    "finished": ":material/check:",
}


def render(catalog: Catalog) -> None:
    """Draw the page for whatever the catalog holds, and look again by itself."""
    parts.header("Live", QUESTION)
    parts.problems(catalog.problems)
    _watch(catalog)


@st.fragment(run_every=EVERY_S)
def _watch(catalog: Catalog) -> None:
    found = live.ordered(live_runs(catalog))
    if not found:
        parts.empty("Nothing in this folder runs or has run.", FILL)
        st.caption("This page looks again every two seconds.")
        return
    names = [one.name for one in found]
    name = names[0]
    if len(found) > 1:
        name = st.selectbox("Run", names, key="live", bind="query-params") or name
    status = found[names.index(name) if name in names else 0].value
    _standing(status)
    _numbers(status)
    if status.points:
        parts.chart(
            figures.rates(status.points),
            figures.rates_frame(status.points),
            name="live-rates",
            alt="Rates of the run over time. " + ". ".join(figures.rates_finding(status.points)),
        )
    if any(status.memory.values()):
        parts.chart(
            figures.memory(status.memory),
            figures.memory_frame(status.memory),
            name="live-memory",
            alt="Device memory by class. " + ". ".join(figures.memory_finding(status.memory)),
        )
    _origin(status)


def _standing(status: LiveStatus) -> None:
    how = live.stands(status)
    _BOXES[how](words.plain(live.in_words(status, how, time.time())), icon=_ICONS[how])
    if again := live.next_command(status, how):
        st.code(again, language="bash", wrap_lines=True)
    if status.tokens_total:
        done = f"{status.tokens_done:,} of at most {status.tokens_total:,} tokens"
        st.progress(live.progress_share(status), text=f"{words.plain(status.phase)}: {done}")


def _numbers(status: LiveStatus) -> None:
    shown = [
        ("Speed", f"{words.rate(status.tokens_per_s)} tokens/s" if status.passes else "–", _SPEED),
        ("Hits", _or_dash(status.hit_rate, words.percent), _HITS),
        ("Link", _or_dash(status.link_Bps, lambda value: f"{value / 1e9:.3g} GB/s"), _LINK),
        ("Waiting for loads", _or_dash(status.stall_share, words.percent), _STALL),
    ]
    for place, (name, text, explained) in zip(st.columns(len(shown)), shown, strict=True):
        place.metric(name, text, help=explained, border=True)


_SPEED: Final = "Generated tokens over wall time, since this part of the command began."
_HITS: Final = (
    "Demanded experts that were on the device. A run that records keeps none, so it has no hits."
)
_LINK: Final = "Bytes of experts asked of the link, over wall time. A resident model asks for none."
_STALL: Final = "Share of the passes' time in which compute waited for loads."


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "–" if value is None else text(value)


def _origin(status: LiveStatus) -> None:
    parts.emulated_note(status.link_origin == "emulated")
    parts.facts(
        [
            ("Model", status.model_id or "–"),
            ("How", status.label or "–"),
            ("Device", status.device or "–"),
            ("Link", f"{status.link} ({words.origin(status.link_origin)})" if status.link else "–"),
            ("Began", _moment(status.started)),
            ("Process", f"{status.pid} on {status.host}"),
        ]
    )
    st.code(status.arguments, language="bash", wrap_lines=True)


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return "–"

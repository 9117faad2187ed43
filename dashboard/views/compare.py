"""Compare: two to four results side by side, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import pandas as pd
import streamlit as st

from ...simulator.result import Result
from .. import parts, results, words
from ..data import Catalog
from ..figures import compare as figures
from ..figures import what_if as time_figures

QUESTION: Final = "How do these runs differ, in what was set and in what came out?"
MOST: Final = 4


def render(catalog: Catalog) -> None:
    """Draw the page for whatever the catalog holds."""
    parts.header("Compare", QUESTION)
    parts.problems(catalog.problems)
    found = results.named_results(catalog)
    if len(found) < 2:
        parts.empty(
            "There are not two results in this folder to compare.",
            "expertflow-trace simulate traces/mine --cache lru --out lru.json\n"
            "expertflow-trace simulate traces/mine --cache static --out static.json",
        )
        return
    names = st.multiselect(
        f"Results, two to {MOST}",
        list(found),
        default=suggested(found),
        max_selections=MOST,
        key="results",
        bind="query-params",
    )
    chosen = {name: found[name] for name in names}
    if len(chosen) < 2:
        st.info("Choose at least two.")
        return
    if reasons := results.unlike(chosen):
        st.warning(f"Unlike runs: these were made {', '.join(reasons)}.", icon=":material/warning:")
    parts.emulated_note(any(result.link_origin == "emulated" for result in chosen.values()))
    parts.chart(
        figures.compare(chosen),
        figures.compare_frame(chosen),
        name="compare",
        alt="Speed, latency, hits, traffic and memory of the chosen results. "
        + ". ".join(figures.compare_finding(chosen)),
    )
    several = list(chosen.values())
    parts.chart(
        time_figures.split(several, figures.display_names(chosen)),
        time_figures.split_frame(several),
        name="compare-time",
        alt="Milliseconds per token by part. " + ". ".join(time_figures.split_finding(several)),
    )
    _settings(chosen)


def suggested(found: Mapping[str, Result]) -> list[str]:
    """A forecast and what was measured for it, and the same for another policy, if there are such."""
    pairs = [
        (name, name.replace(", predicted (", ", measured ("))
        for name in found
        if ", predicted (" in name and name.replace(", predicted (", ", measured (") in found
    ]
    if pairs:
        return [name for pair in (pairs[0], pairs[-1]) for name in dict.fromkeys(pair)][:MOST]
    return list(found)[:2]


def _settings(chosen: Mapping[str, Result]) -> None:
    st.header("Settings that differ")
    rows = results.differing(chosen)
    if not rows:
        st.markdown("None: these results were made alike.")
        return
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(chosen))
    table.columns = figures.display_names(chosen)
    table.index.name = "setting"
    st.dataframe(table, width="stretch")
    parts.download(table.reset_index(), name="settings", text="These settings (CSV)")
    same = len(results.settings(next(iter(chosen.values())))) - len(rows)
    st.caption(words.plain(f"{max(same, 0)} other settings are the same."))

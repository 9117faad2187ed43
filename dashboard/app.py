"""The dashboard: `streamlit run dashboard/app.py [-- --data DIR]`."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path


def _make_importable() -> None:
    """From a plain checkout, let `expertflow.…` be found: Streamlit runs this file as a script."""
    try:
        if importlib.util.find_spec("expertflow.dashboard"):
            return
    except ModuleNotFoundError:
        sys.modules.pop("expertflow", None)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".typing"))


_make_importable()

import streamlit as st  # noqa: E402
from expertflow.dashboard import parts  # noqa: E402
from expertflow.dashboard.data import data_root, discover  # noqa: E402
from expertflow.dashboard.views import (  # noqa: E402
    capacity,
    compare,
    live,
    overview,
    policy,
    routing,
    sweep,
    timeline,
    verify,
    what_if,
)

# Pages by what they rest on; a page's name is its address.
SECTIONS = {
    "Recorded": {"Overview": overview, "Routing": routing, "Timeline": timeline, "Live": live},
    "Predicted": {"Capacity": capacity, "What-if": what_if, "Sweep": sweep},
    "Decided": {"Policy": policy, "Verify": verify, "Compare": compare},
}


def main() -> None:
    """Find the data, offer the pages, draw the one that was chosen."""
    # No page icon: named ones are fetched from a font server, and this tool calls nobody.
    st.set_page_config(page_title="ExpertFlow", layout="wide")
    catalog = discover(data_root())
    page = st.navigation(
        {
            section: [
                st.Page(
                    functools.partial(module.render, catalog),
                    title=title,
                    url_path=title.lower(),
                    default=module is overview,
                )
                for title, module in modules.items()
            ]
            for section, modules in SECTIONS.items()
        }
    )
    with st.sidebar:
        parts.sidebar(catalog)
    page.run()


main()

"""The dashboard: `streamlit run dashboard/app.py [-- --data DIR]`."""

from __future__ import annotations

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
from expertflow.dashboard.views import overview, verify  # noqa: E402


def main() -> None:
    """Find the data, offer the pages, draw the one that was chosen."""
    # No page icon: named ones are fetched from a font server, and this tool calls nobody.
    st.set_page_config(page_title="ExpertFlow", layout="wide")
    catalog = discover(data_root())
    pages = [
        st.Page(lambda: overview.render(catalog), title="Overview", default=True),
        st.Page(lambda: verify.render(catalog), title="Verify", url_path="verify"),
    ]
    page = st.navigation(pages)
    with st.sidebar:
        parts.sidebar(catalog)
    page.run()


main()

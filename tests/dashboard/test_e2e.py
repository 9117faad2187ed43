"""Both pages in a real Chromium: they show, they complain about nothing, they call nobody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = Path("/usr/bin/chromium")
REPO = Path(__file__).resolve().parents[2]
LOCAL = {"127.0.0.1", "localhost"}
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
]
PAGES = {
    "overview": (
        "Which experts does this model need",
        "the busiest 10 % of experts take",
        "of the experts resident,",
        "Download this policy",
    ),
    "verify": (
        "Did the forecast hold?",
        "checks are within tolerance",
        "of the measured time",
        "EMULATED link: every copy",
        "Made",
    ),
}
pytestmark = pytest.mark.e2e
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def address(demo: Path) -> Iterator[str]:
    """A dashboard on a free loopback port, showing the demo folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "dashboard/app.py"]
    command += ["--server.port", str(port), "--server.fileWatcherType", "none"]
    command += ["--", "--data", str(demo)]
    # Without PYTHONPATH: from a plain checkout the app has to find its package by itself.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    server = subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.DEVNULL)
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/_stcore/health", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_pages_in_a_browser(address: str, scheme: str, tmp_path: Path) -> None:
    with _browse(scheme) as (page, errors, hosts):
        page.goto(address)
        for name, texts in PAGES.items():
            page.get_by_role("link", name=name.capitalize()).click()
            _see(page, texts)
            _save(page, _artifacts(tmp_path) / f"{name}-{scheme}.png")
    assert not errors
    assert hosts <= LOCAL


def test_a_link_opens_its_page_in_its_state(address: str, tmp_path: Path) -> None:
    # Streamlit itself looks for its service below the page's path first and gets 404 there, so
    # this journey does not listen to the console.
    with _browse("dark") as (page, _, hosts):
        page.goto(f"{address}/verify?verdict=other-verdict.json")
        _see(page, ("NOT validated.", "16 of 18 checks", "copies slower than the traced link"))
        _save(page, _artifacts(tmp_path) / "verify-not-validated-dark.png")
    assert hosts <= LOCAL


@contextmanager
def _browse(scheme: str) -> Iterator[tuple[playwright.Page, list[str], set[str]]]:
    """A page in a fresh browser, the errors it reports, and the hosts it asks."""
    if not CHROMIUM.exists():
        pytest.skip(f"no Chromium at {CHROMIUM}")
    errors: list[str] = []
    hosts: set[str] = set()

    def note(url: str) -> None:
        if urlsplit(url).scheme not in {"data", "blob"}:
            hosts.add(urlsplit(url).hostname or url)

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1400, "height": 1000})
        page = context.new_page()
        page.on("request", lambda request: note(request.url))
        page.on("websocket", lambda socket: note(socket.url))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page, errors, hosts
        browser.close()


def _see(page: playwright.Page, texts: tuple[str, ...]) -> None:
    """Wait until every text is there; neither a traceback nor a placeholder may be."""
    for text in texts:
        playwright.expect(page.get_by_text(text).first).to_be_attached(timeout=30_000)
    playwright.expect(page.get_by_test_id("stException")).to_have_count(0)
    playwright.expect(page.get_by_test_id("stSkeleton")).to_have_count(0, timeout=30_000)


def _artifacts(tmp_path: Path) -> Path:
    folder = REPO / "out" / "screenshots" if os.environ.get("EXPERTFLOW_ARTIFACTS") else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save(page: playwright.Page, path: Path) -> None:
    """A picture of the whole page: its main part scrolls, so the window is made as tall as it."""
    height = page.get_by_test_id("stMain").evaluate("element => element.scrollHeight")
    page.set_viewport_size({"width": 1400, "height": int(height) + 20})
    page.wait_for_timeout(700)  # charts redraw after a change of size
    page.screenshot(path=path)
    page.set_viewport_size({"width": 1400, "height": 1000})


def _wait_until_up(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"the dashboard ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail("the dashboard did not answer within 60 s")

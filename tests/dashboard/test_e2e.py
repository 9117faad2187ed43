"""Every page in a real Chromium: they show, they complain about nothing, they call nobody."""

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
from expertflow.dashboard.report import report_on
from expertflow.dashboard.report_html import to_html

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
    "Overview": (
        "Which experts does this model need",
        "the busiest 10 % of experts take",
        "of the experts resident,",
        "expertflow-trace deploy",
    ),
    "Routing": ("How predictable is", "Used again in the very next pass", "Layer 0 foretells"),
    "Timeline": ("What happens when", "SIMULATED (outlined)", "because the router chose it"),
    "Capacity": ("How much memory do I need?", "of the best predicted speed takes"),
    "What-if": ("What would another budget", "Waiting for experts takes", "behind 360 GB/s"),
    "Sweep": ("Which of the many", "configurations are beaten by none", "matters most"),
    "Policy": ("Which policy was chosen", "Download this policy", "slots of its own"),
    "Verify": (
        "Did the forecast hold?",
        "checks are within tolerance",
        "of the measured time",
        "EMULATED link: every copy",
        "Made",
    ),
    "Compare": ("How do these runs differ", "is the fastest", "other settings are the same"),
    "Live": ("What is running", "Finished", "tokens/s now", "EMULATED link", "on the device"),
}
PATIENCE_MS = 240_000
"""The simulator may have to be compiled first."""
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
def test_every_page_in_a_browser(address: str, scheme: str, tmp_path: Path) -> None:
    with _browse(scheme) as (page, errors, hosts):
        page.goto(address)
        for name, texts in PAGES.items():
            page.get_by_role("link", name=name, exact=True).click()
            _see(page, texts)
            _save(page, _artifacts(tmp_path) / f"{name.lower()}-{scheme}.png")
    assert not errors
    assert hosts <= LOCAL


def test_what_if_answers_the_keyboard(address: str, tmp_path: Path) -> None:
    with _browse("light") as (page, errors, hosts):
        page.goto(address)
        page.get_by_role("link", name="What-if", exact=True).click()
        _see(page, PAGES["What-if"])
        tile = page.get_by_test_id("stMetricValue").first
        before = tile.inner_text()
        page.get_by_role("slider", name="Memory for experts, share of all").press("PageDown")
        playwright.expect(tile).not_to_have_text(before, timeout=PATIENCE_MS)
        assert "budget=" in page.url
        _save(page, _artifacts(tmp_path) / "what-if-after-a-key.png")
    assert not errors
    assert hosts <= LOCAL


def test_a_bar_of_the_timeline_is_explained_when_picked(address: str, tmp_path: Path) -> None:
    with _browse("light") as (page, errors, _):
        page.goto(address)
        page.get_by_role("link", name="Timeline", exact=True).click()
        _see(page, PAGES["Timeline"])
        field = page.get_by_role("spinbutton", name="Pass to explain")
        playwright.expect(field).to_have_value("0")
        bars = page.locator(".js-plotly-plot").nth(1).locator(".trace.bars").first.locator(".point")
        bars.last.scroll_into_view_if_needed()
        box = bars.last.bounding_box()
        assert box
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(*middle)
        playwright.expect(page.locator(".hoverlayer .hovertext").first).to_be_visible()
        page.mouse.click(*middle)
        playwright.expect(field).not_to_have_value("0", timeout=PATIENCE_MS)
        _save(page, _artifacts(tmp_path) / "timeline-after-a-pick.png")
    assert not errors


def test_a_figure_is_saved_as_a_page_that_works_alone(address: str, tmp_path: Path) -> None:
    with _browse("light") as (page, errors, _):
        page.goto(address)
        _see(page, PAGES["Overview"])
        page.get_by_test_id("stPopover").first.get_by_role("button").click()
        with page.expect_download(timeout=PATIENCE_MS) as started:
            page.get_by_role("button", name="Figure (HTML, works offline)").first.click()
        started.value.save_as(tmp_path / "figure.html")
    assert not errors
    _opens_offline(tmp_path / "figure.html", figures=1)


def test_the_report_opens_with_the_network_off(demo: Path, tmp_path: Path) -> None:
    html = to_html(report_on(demo))
    path = _artifacts(tmp_path) / "report.html"
    path.write_text(html, encoding="utf-8")
    _opens_offline(
        path, figures=html.count('class="plotly-graph-div"'), picture=path.with_suffix(".png")
    )


def _opens_offline(path: Path, *, figures: int, picture: Path | None = None) -> None:
    with _browse("light") as (page, errors, hosts):
        page.context.set_offline(True)
        page.goto(path.as_uri())
        playwright.expect(page.locator(".js-plotly-plot")).to_have_count(figures)
        playwright.expect(page.locator(".main-svg").first).to_be_visible()
        if picture is not None:
            page.screenshot(path=picture, full_page=True)
    assert not errors
    assert not {host for host in hosts if not host.startswith("file:")}


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
        playwright.expect(page.get_by_text(text).first).to_be_attached(timeout=PATIENCE_MS)
    playwright.expect(page.get_by_test_id("stException")).to_have_count(0)
    playwright.expect(page.get_by_test_id("stSkeleton")).to_have_count(0, timeout=PATIENCE_MS)


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

"""How fast the dashboard is in a browser: first paint, every page, a slider, and a trace of a million tokens.

1. The demo traces: seconds from asking for the address to the page's title (first paint, bar 2 s), and to the end of
   the page's script, in a browser that has not been there before; the server has shown each page once.
2. The what-if page: seconds from a key on the memory slider to the first number that changes (bar 0.5 s).
3. A synthetic trace of a million tokens, 16 layers, top-8 of 64: seconds until the overview's title stands and its
   script has ended, of a server that has just come up (bar 5 s), and that server's memory at its peak (bar 2 GB).

Headless Chromium. Exits 1 if a bar is missed.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from bench_common import ROOT, Report, Table, options_of, parser, write_block
from bench_embedded import hint
from playwright.sync_api import Browser, Page, sync_playwright
from trace_reading import QUICK_TOKENS, TOKENS, write

SCRIPT = "dashboard_speed.py"
PAGE = ROOT / "docs" / "dashboard.md"
CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
PAGES = (
    "", "routing", "timeline", "live", "capacity", "what-if", "sweep", "policy", "verify", "compare",
)  # fmt: skip
OVERVIEW = "overview"
LONG_MS = 240_000
REPEATS = 5


def main() -> None:
    """Measure all three."""
    options = options_of(parser(__doc__))
    report = Report(SCRIPT, options)
    with sync_playwright() as driver, browser_of(driver) as browser:
        with server(ROOT / "traces" / "demo") as (address, _):
            pages(report, browser, address, 1 if options.quick else REPEATS)
            slider(report, browser, address, 3 if options.quick else 15)
        with tempfile.TemporaryDirectory() as name:
            hint("writing the large trace")
            write(Path(name) / "large", QUICK_TOKENS if options.quick else TOKENS, 32, 1)
            with server(Path(name)) as (address, process):
                large(report, browser, address, process)
    if options.write:
        write_block(PAGE, SCRIPT, report.text())
    options.write = False  # the other page is not ours
    report.finish()


def pages(report: Report, browser: Browser, address: str, repeats: int) -> None:
    """Part 1."""
    rows: list[tuple[str, ...]] = []
    painted: list[float] = []
    for name in PAGES:
        hint(f"page {name or OVERVIEW}")
        opened(browser, f"{address}/{name}")
        found = [opened(browser, f"{address}/{name}") for _ in range(repeats)]
        paint_s, whole_s = (statistics.median(times) for times in zip(*found, strict=True))
        painted.append(paint_s)
        rows.append((name or OVERVIEW, f"{paint_s:.2f}", f"{whole_s:.2f}"))
    report.table(
        Table(
            f"Pages of the demo traces, seconds, medians of {repeats}",
            ("", "title", "script ended"),
            rows,
        )
    )
    report.bar("first paint of the slowest page", max(painted), 2.0, "s", at_least=False)


def slider(report: Report, browser: Browser, address: str, keys: int) -> None:
    """Part 2."""
    hint("slider")
    with page_of(browser) as page:
        page.goto(f"{address}/what-if")
        settled(page)
        handle = page.get_by_role("slider", name="Memory for experts, share of all")
        seconds: list[float] = []
        for number in range(keys + 2):
            before = numbers(page)
            began = time.perf_counter()
            handle.press("ArrowRight" if number % 2 else "ArrowLeft")
            page.wait_for_function(
                "before => [...document.querySelectorAll('[data-testid=stMetricValue]')]"
                ".map(e => e.innerText).join('|') !== before",
                arg=before,
                timeout=LONG_MS,
                polling=10,
            )
            seconds.append(time.perf_counter() - began)
            settled(page)
    taken = statistics.median(seconds[2:])
    report.note(
        f"A key on the what-if slider: {len(seconds) - 2} presses, {max(seconds[2:]):.2f} s at most."
    )
    report.bar(
        "a key on the what-if slider to its first new number", taken, 0.5, "s", at_least=False
    )


def large(report: Report, browser: Browser, address: str, process: psutil.Process) -> None:
    """Part 3."""
    hint("opening the large trace")
    paint_s, whole_s = opened(browser, address)
    peak = peak_bytes(process)
    report.note(
        f"The large trace: title after {paint_s:.2f} s, all of the overview after {whole_s:.2f} s."
    )
    report.bar("overview of the large trace, all of it", whole_s, 5.0, "s", at_least=False)
    report.bar("the server's memory at its peak", peak / 1e9, 2.0, "GB", at_least=False)


def opened(browser: Browser, address: str) -> tuple[float, float]:
    """Seconds until a page's title and until its script has ended, for someone who was never there."""
    with page_of(browser) as page:
        began = time.perf_counter()
        page.goto(address)
        page.locator("h1").first.wait_for(timeout=LONG_MS)
        paint_s = time.perf_counter() - began
        settled(page)
        return paint_s, time.perf_counter() - began


def settled(page: Page) -> None:
    """Wait until the page's script has ended."""
    page.locator("h1").first.wait_for(timeout=LONG_MS)
    page.locator("[data-test-script-state=notRunning]").first.wait_for(timeout=LONG_MS)


def numbers(page: Page) -> str:
    """What the page's tiles say."""
    return "|".join(page.get_by_test_id("stMetricValue").all_inner_texts())


@contextmanager
def page_of(browser: Browser) -> Iterator[Page]:
    """A page without a history."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    try:
        yield context.new_page()
    finally:
        context.close()


@contextmanager
def browser_of(driver: Any) -> Iterator[Browser]:
    """Headless Chromium: the system's, or Playwright's own."""
    path = next((name for name in CHROMIUM if Path(name).exists()), None) or shutil.which(
        "chromium"
    )
    found = driver.chromium.launch(
        executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    )
    try:
        yield found
    finally:
        found.close()


@contextmanager
def server(data: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A dashboard on a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "dashboard/app.py"]
    command += ["--server.port", str(port), "--server.fileWatcherType", "none"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [*command, "--", "--data", str(data)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_up(f"http://127.0.0.1:{port}/_stcore/health", process)
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=20)


def wait_until_up(address: str, process: subprocess.Popen[bytes]) -> None:
    """Raises SystemExit if the server ends or does not answer within a minute."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit("The dashboard did not come up.")


def peak_bytes(process: psutil.Process) -> int:
    """The most memory a process has held (Linux), with its children."""
    found = 0
    for one in (process, *process.children(recursive=True)):
        status = Path(f"/proc/{one.pid}/status").read_text()
        found += int(status.split("VmHWM:")[1].split()[0]) * 1024
    return found


if __name__ == "__main__":
    main()

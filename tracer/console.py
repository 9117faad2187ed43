"""What the commands say: results on stdout, everything else on stderr.

Colours and bars appear on a terminal only; `NO_COLOR` and `FORCE_COLOR` are respected by Rich.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape

from .records import to_json

LOG_EVERY_S = 10.0

_stderr = Console(stderr=True, highlight=False, soft_wrap=True)
_stdout = Console(highlight=False, soft_wrap=True)


def stderr() -> Console:
    """Return the console for everything that is not the result."""
    return _stderr


def say(message: str) -> None:
    """Print a note on stderr."""
    _stderr.print(message, markup=False)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    _stderr.print(f"[yellow]warning:[/yellow] {escape(message)}")


def print_error(message: str) -> None:
    """Print why a command failed, on stderr."""
    _stderr.print(f"[bold red]error:[/bold red] {escape(message)}")


def print_json(document: Any) -> None:
    """Print one JSON document on stdout; numbers that are not finite become null."""
    is_unicode = (sys.stdout.encoding or "utf-8").lower().replace("-", "").startswith("utf")
    text = json.dumps(_finite(to_json(document)), indent=2, ensure_ascii=not is_unicode)
    sys.stdout.write(text + "\n")


def print_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a titled list of names and values on stdout, aligned, never cut to the window."""
    pairs = list(rows)
    width = max((len(name) for name, _ in pairs), default=0)
    _stdout.print(f"[bold]{escape(title)}[/bold]")
    for name, value in pairs:
        _stdout.print(f"  [cyan]{escape(name):<{width}}[/cyan]  {escape(value)}")


class Reporter(Protocol):
    """What `progress` hands out."""

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more as done."""
        ...

    def phase(self, text: str) -> None:
        """Say what is being done now."""
        ...


@contextmanager
def progress(
    title: str,
    total: int | None = None,
    unit: str = "tokens",
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Reporter]:
    """Show progress on stderr: a bar with rate and time left, or a line every 10 s in a pipe."""
    if not _stderr.is_terminal:
        log = _Log(title, total, unit, clock)
        yield log
        log.report()
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}" + (f"/{total:,}" if total else "") + f" {unit}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_stderr, transient=True) as bar:
        yield _Bar(bar, title, total, unit, clock)


class Silent:
    """A Reporter that shows nothing."""

    def advance(self, amount: int = 1) -> None:
        """Nothing to show."""

    def phase(self, text: str) -> None:
        """Nothing to show."""


@contextmanager
def no_progress(title: str, total: int | None = None, unit: str = "") -> Iterator[Reporter]:
    """In place of `progress` where nobody watches."""
    yield Silent()


class _Bar:
    def __init__(
        self, bar: Any, title: str, total: int | None, unit: str, clock: Callable[[], float]
    ) -> None:
        self._bar, self._title, self._unit, self._clock = bar, title, unit, clock
        self._task = bar.add_task(escape(title), total=total, rate="")
        self._done, self._start_s = 0, clock()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        elapsed_s = max(self._clock() - self._start_s, 1e-9)
        rate = f"{self._done / elapsed_s:,.1f} {self._unit}/s"
        self._bar.update(self._task, advance=amount, rate=rate)

    def phase(self, text: str) -> None:
        self._bar.update(self._task, description=escape(f"{self._title}: {text}"))


class _Log:
    def __init__(
        self, title: str, total: int | None, unit: str, clock: Callable[[], float]
    ) -> None:
        self._title, self._total, self._unit, self._clock = title, total, unit, clock
        self._done, self._text = 0, ""
        self._start_s = self._last_s = clock()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        if self._clock() - self._last_s >= LOG_EVERY_S:
            self.report()

    def phase(self, text: str) -> None:
        self._text = f" ({text})"

    def report(self) -> None:
        self._last_s = self._clock()
        elapsed_s = self._last_s - self._start_s
        rate = self._done / elapsed_s if elapsed_s > 0 else 0.0
        of = f"/{self._total:,}" if self._total else ""
        left = ""
        if self._total and rate and self._done < self._total:
            left = f", {(self._total - self._done) / rate:,.0f} s left"
        say(
            f"{self._title}{self._text}: {self._done:,}{of} {self._unit}, "
            f"{rate:,.1f} {self._unit}/s, {elapsed_s:,.0f} s{left}"
        )


def bytes_text(count: float) -> str:
    """Return a size for people: 12.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value

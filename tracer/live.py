"""What a long command says of itself while it goes on: a small file, replaced about once a second.

The dashboard's Live page reads it. Passes only add to a few numbers; the file is written between them, so that no
timed pass holds it. Points over time are kept as written text, the last few minutes of them, which keeps a write far
below a millisecond. A run that cannot write its file goes on without it.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol

from .types import Origin

if TYPE_CHECKING:
    from .generate import StepObserver, StepTokens
    from .timing import StepInfo

LIVE_FORMAT = "expertflow.live/1"
SUFFIX = ".live.json"
EVERY_S = 1.0
KEPT_POINTS = 240
"""Four minutes, if a pass takes less than a second."""

State = Literal["running", "finished", "failed", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePoint:
    """Rates since the point before. `at_s` is seconds since the command began; None: nothing to divide by.

    `hit_rate` is of demanded experts, `link_Bps` what was asked of the link, `stall_share` of the passes' time.
    """

    at_s: float
    tokens_per_s: float
    hit_rate: float | None = None
    link_Bps: float | None = None
    stall_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStatus:
    """A running command as its file tells it. `heartbeat` and `started` are seconds since 1970.

    `tokens_total` is a bound: sequences may end before. `process` tells the process from a later one with its
    number. `memory` is bytes on the device by class, as far as they are known. `points` are the latest.
    """

    command: str
    arguments: str
    state: State
    phase: str
    host: str
    pid: int
    process: str
    started: float
    heartbeat: float
    tokens_done: int
    tokens_total: int
    passes: int
    tokens_per_s: float
    model_id: str = ""
    device: str = ""
    label: str = ""
    link: str = ""
    link_origin: Origin = "measured"
    hit_rate: float | None = None
    bytes_moved: int = 0
    link_Bps: float | None = None
    stall_share: float | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    message: str = ""
    points: tuple[LivePoint, ...] = ()
    format: Literal["expertflow.live/1"] = "expertflow.live/1"


@dataclass(frozen=True, slots=True)
class Seen:
    """Sums over a run so far; zero demanded experts: hits are not counted."""

    hits: int = 0
    demanded: int = 0
    bytes_moved: int = 0
    stall_s: float = 0.0
    has_link: bool = False


Look = Callable[[], Seen]


def live_path(out: Path) -> Path:
    """Where a command that writes `out` says how it goes: beside it."""
    name = out.name.removesuffix(".json") if out.suffix == ".json" else out.name
    return out.with_name(name + SUFFIX)


class LiveFile:
    """Writes one file while its context is open; without a path it does nothing.

    How the context is left is how the file says the command ended.
    """

    def __init__(
        self,
        path: Path | None,
        command: str,
        arguments: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._clock, self._wall = clock, wall
        self._began_s, self._last_s, self._due_s = clock(), clock(), clock()
        self._points: deque[str] = deque(maxlen=KEPT_POINTS)
        self._look: Look = Seen
        self._seen = Seen()
        self._tokens = self._settled = self._passes = 0
        self._tokens_before, self._tokens_begun = 0, 0
        self._busy_s = self._busy_before_s = 0.0
        self._phase_s = self._passed_s = self._began_s
        self._phase_seen = Seen()
        self._fixed: dict[str, object] = {
            "format": LIVE_FORMAT,
            "command": command,
            "arguments": arguments,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": process_mark(os.getpid()),
            "started": wall(),
        }
        self._told: dict[str, object] = {"phase": "starting", "tokens_total": 0, "memory": {}}

    def tell(self, **what: object) -> None:
        """Set fields of LiveStatus that do not change with every pass."""
        self._told.update(what)

    def phase(self, text: str, tokens_total: int | None = None, look: Look = Seen) -> None:
        """Something else is done from now on; with a total, tokens are counted anew. `look` gives its sums."""
        self._told["phase"] = text
        if tokens_total is not None:
            self._told["tokens_total"] = tokens_total
            self._tokens = self._settled = self._tokens_before = self._tokens_begun = 0
            self._look = look
            self._seen = self._phase_seen = look()
            self._busy_s = self._busy_before_s = 0.0
            self._phase_s = self._passed_s = self._last_s = self._clock()
        self._write("running")

    def resumed(self, tokens: int) -> None:
        """So many tokens were there before; they count as done, not as speed."""
        self._tokens = self._settled = self._tokens_before = self._tokens_begun = tokens

    def passed(self, tokens: int, seconds: float) -> None:
        """A forward pass gave about so many tokens and took so long."""
        self._tokens += tokens
        self._passes += 1
        self._busy_s += seconds
        self._passed_s = self._clock()
        if self._passed_s >= self._due_s:
            self._add_point()
            self._write("running")

    def settle(self, tokens: int) -> None:
        """A batch has ended with exactly so many tokens."""
        self._settled += tokens
        self._tokens = self._settled

    def __enter__(self) -> LiveFile:
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            except OSError:
                self._path = None
        self._write("running")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._add_point()
        if error is None:
            self._write("finished")
        elif isinstance(error, KeyboardInterrupt):
            self._write("interrupted")
        else:
            self._write("failed", str(error).strip() or type(error).__name__)

    def _add_point(self) -> None:
        if self._path is None:
            return
        now = self._clock()
        spent_s, busy_s = now - self._last_s, self._busy_s - self._busy_before_s
        tokens, seen = self._tokens - self._tokens_before, self._look()
        if spent_s <= 0 or not busy_s:
            return
        point = {
            "at_s": round(now - self._began_s, 3),
            "tokens_per_s": round(max(0, tokens) / spent_s, 3),
            **_rates(self._seen, seen, spent_s, busy_s),
        }
        self._points.append(json.dumps(point))
        self._last_s, self._seen = now, seen
        self._tokens_before, self._busy_before_s = self._tokens, self._busy_s

    def _write(self, state: State, message: str = "") -> None:
        if self._path is None:
            return
        now = self._clock()
        self._due_s = now + EVERY_S
        spent_s, seen = self._passed_s - self._phase_s, self._look()
        document = {
            **self._fixed,
            **self._told,
            "state": state,
            "message": message,
            "heartbeat": self._wall(),
            "tokens_done": self._tokens,
            "passes": self._passes,
            "tokens_per_s": _share(self._tokens - self._tokens_begun, spent_s) or 0.0,
            "bytes_moved": seen.bytes_moved - self._phase_seen.bytes_moved,
            **_rates(self._phase_seen, seen, spent_s, self._busy_s),
        }
        head = json.dumps(document)[:-1]
        partial = self._path.with_name(f".{self._path.name}.tmp")
        try:
            partial.write_text(
                f'{head}, "points": [{", ".join(self._points)}]}}\n', encoding="utf-8"
            )
            partial.replace(self._path)
        except OSError:
            self._path = None  # nobody's run may end for want of a status


def _rates(before: Seen, now: Seen, spent_s: float, busy_s: float) -> dict[str, float | None]:
    return {
        "hit_rate": _share(now.hits - before.hits, now.demanded - before.demanded),
        "link_Bps": _share(now.bytes_moved - before.bytes_moved, spent_s if now.has_link else 0),
        "stall_share": _share(now.stall_s - before.stall_s, busy_s if now.has_link else 0),
    }


def _share(part: float, whole: float) -> float | None:
    share = part / whole if whole > 0 else math.nan
    return round(share, 6) if math.isfinite(share) else None


class WatchedPasses:
    """Lets a live file count the passes that another observer sees. Implements generate.StepObserver.

    `after` is called behind each pass, by those whose sums are gone later.
    """

    def __init__(
        self, inner: StepObserver, live: LiveFile, after: Callable[[], object] | None = None
    ) -> None:
        self._inner = inner
        self._live = live
        self._after = after
        self._tokens = 0

    def begin_step(self, info: StepInfo, tokens: StepTokens) -> None:
        """See generate.StepObserver."""
        # Every sequence that goes on gets a token; those that have ended are padding.
        going = info.batch if info.phase == "prefill" else sum(p >= 0 for p in tokens.position)
        self._tokens = min(info.batch, going)
        self._inner.begin_step(info, tokens)

    def end_step(self) -> float:
        """See generate.StepObserver."""
        seconds = self._inner.end_step()
        if self._after is not None:
            self._after()
        self._live.passed(self._tokens, seconds)
        return seconds


class _Reporter(Protocol):
    def advance(self, amount: int = 1) -> None: ...
    def phase(self, text: str) -> None: ...


class LiveReporter:
    """Progress on the terminal and in a live file. Implements console.Reporter."""

    def __init__(self, inner: _Reporter, live: LiveFile) -> None:
        self._inner = inner
        self._live = live

    def advance(self, amount: int = 1) -> None:
        """See console.Reporter."""
        self._inner.advance(amount)
        self._live.settle(amount)

    def phase(self, text: str) -> None:
        """See console.Reporter."""
        self._inner.phase(text)
        self._live.phase(text)


def process_mark(pid: int) -> str:
    """What tells a process from a later one of the same number; empty if there is none, or nothing tells."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    # The name, in parentheses, may hold anything; the time of the start is the twentieth field behind it.
    fields = stat.rpartition(")")[2].split()
    return f"{boot}:{fields[19]}" if len(fields) > 19 and fields[0] != "Z" else ""

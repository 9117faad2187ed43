"""How a command stands that says of itself how it goes: at work, silent, gone, or ended; and that in words."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Final, Literal

from ..tracer.live import LiveStatus, process_mark
from .data import Found

Standing = Literal["running", "silent", "gone", "finished", "failed", "interrupted"]

SILENT_AFTER_S: Final = 15.0
"""A pass of a large model may take a few seconds; after more than this the silence is worth a word."""
GONE_AFTER_S: Final = 120.0
"""Without a look at the process, on another machine, so long a silence is taken for its end."""


def is_there(status: LiveStatus) -> bool | None:
    """Whether the process still runs; None if it ran on another machine, or its machine does not tell."""
    if status.host != socket.gethostname() or not status.process:
        return None
    return process_mark(status.pid) == status.process


def standing(status: LiveStatus, now_s: float, there: bool | None) -> Standing:
    """How a command stands at `now_s` (seconds since 1970)."""
    if status.state != "running":
        return status.state
    silence_s = now_s - status.heartbeat
    if there is False or (there is None and silence_s > GONE_AFTER_S):
        return "gone"
    return "silent" if silence_s > SILENT_AFTER_S else "running"


def stands(status: LiveStatus) -> Standing:
    """How a command stands now."""
    return standing(status, time.time(), is_there(status))


def in_words(status: LiveStatus, how: Standing, now_s: float) -> str:
    """What has become of a command, and what to do about it."""
    since = span(now_s - status.heartbeat)
    if how == "running":
        left = time_left_s(status)
        return f"Running: {status.phase}." + (f" At most {span(left)} left." if left else "")
    if how == "silent":
        return (
            f"No word for {since}, but its process ({status.pid}) is there: {status.phase}. A long pass, or a machine "
            "that is busy or asleep."
            if is_there(status)
            else f"No word for {since} from {status.host}: {status.phase}."
        )
    if how == "finished":
        return f"Finished {since} ago, after {span(status.heartbeat - status.started)}."
    if how == "failed":
        return f"Failed {since} ago: {status.message or 'no reason given.'}"
    if how == "interrupted":
        return f"Interrupted {since} ago, while {status.phase}."
    return f"Ended {since} ago or later without a word, while {status.phase}: killed, or its machine stopped."


def next_command(status: LiveStatus, how: Standing) -> str:
    """What takes a command up again that did not come to its end; empty if there is nothing to do."""
    if how not in ("gone", "interrupted", "failed"):
        return ""
    resumes = status.command == "run" and not status.arguments.endswith(" --resume")
    return status.arguments + (" --resume" if resumes else "")


def time_left_s(status: LiveStatus) -> float:
    """Seconds until all tokens are there, if none ends early; 0 if nothing can be said."""
    left = status.tokens_total - status.tokens_done
    return left / status.tokens_per_s if left > 0 and status.tokens_per_s > 0 else 0.0


def progress_share(status: LiveStatus) -> float:
    """Tokens done of all that there may be, 0 to 1."""
    if status.tokens_total <= 0:
        return 0.0
    return min(1.0, max(0.0, status.tokens_done / status.tokens_total))


def ordered(found: Sequence[Found[LiveStatus]]) -> list[Found[LiveStatus]]:
    """Those at work first, then the latest to be heard of."""
    return sorted(
        found,
        key=lambda f: (stands(f.value) not in ("running", "silent"), -f.value.heartbeat),
    )


def span(seconds: float) -> str:
    """A stretch of time as a person would say it."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest and minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days"

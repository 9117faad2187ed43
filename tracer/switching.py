"""How soon a thread that wakes up may run Python code while another one is at it.

By default Python lets a thread go on for 5 ms before another gets its turn: the time of twenty copies of a small
expert. A predictor written in Python then holds up the thread that carries the copies it was to hide, and the link
stands still (docs/adr/0013).
"""

from __future__ import annotations

import sys
import threading

SWITCH_S = 50e-6
"""The longest that a copy thread waits for its turn."""

_lock = threading.Lock()
_users = 0
_before_s = 0.0


def hasten() -> None:
    """Let waking threads run within `SWITCH_S`, until as many `relax` as `hasten` were called; for the process."""
    global _users, _before_s
    with _lock:
        if _users == 0:
            _before_s = sys.getswitchinterval()
            sys.setswitchinterval(min(SWITCH_S, _before_s))
        _users += 1


def relax() -> None:
    """Give back what `hasten` took: the last one restores the interval found by the first."""
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            sys.setswitchinterval(_before_s)

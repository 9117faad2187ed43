"""What a live file tells of a session: hits, bytes asked of the link and time spent waiting, summed up as they come."""

from __future__ import annotations

from ..tracer.live import Seen
from ..tracer.schema import WHOLE_STEP
from ..tracer.timing import LAPS
from .session import Session

_STALL = LAPS.index("stall_s")


class SessionSums:
    """Sums over a session that keeps its log. Each call looks at what has come since the last."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._entries = self._rows = self._loads = 0
        self._stall_s = 0.0

    def __call__(self) -> Seen:
        """The sums so far."""
        session = self._session
        entries = session.log[self._entries :]
        self._entries += len(entries)
        self._loads += sum(entry.kind == "load" for entry in entries)
        rows = session.timer.rows.rows[self._rows :]
        self._rows += len(rows)
        self._stall_s += sum(row.laps[_STALL] for row in rows if row.layer != WHOLE_STEP)
        outcomes = session.outcomes
        return Seen(
            hits=outcomes["hits"],
            demanded=sum(outcomes.values()),
            bytes_moved=self._loads * session.shape.expert_bytes,
            stall_s=self._stall_s,
            has_link=True,
        )

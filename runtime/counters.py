"""What a model that lives long has done so far: passes, tokens, waiting, and what crossed the link."""

from __future__ import annotations

from dataclasses import dataclass

from ..simulator.account import covered_s
from ..tracer.schema import WHOLE_STEP
from ..tracer.timing import LAPS, StepInfo
from .session import Session

_STALL = LAPS.index("stall_s")


@dataclass(slots=True)
class LiveCounters:
    """Sums over all passes that have ended; brought up to date by `fold` after each.

    `tokens` counts one per row of a batch and pass, rows of beams and of sequences that have ended included.
    `positions` are those of the last pass's KV cache. Whoever reads from another thread sees the last pass that ended.
    """

    passes: int = 0
    tokens: int = 0
    pass_s: float = 0.0
    stall_s: float = 0.0
    link_busy_s: float = 0.0
    bytes_moved: int = 0
    positions: int = 0

    def fold(self, session: Session, info: StepInfo) -> None:
        """Take over the rows of a pass that has just ended; the session starts empty."""
        rows, session.timer.rows.rows = session.timer.rows.rows, []
        self.stall_s += sum(row.laps[_STALL] for row in rows if row.layer != WHOLE_STEP)
        self.pass_s += sum(row.total_s or 0.0 for row in rows if row.layer == WHOLE_STEP)
        copies = session.store.take_rows()
        self.link_busy_s += covered_s(copies)
        self.bytes_moved += sum(copy.num_bytes for copy in copies if copy.why != "warm")
        self.passes += 1
        self.tokens += info.batch
        self.positions = info.batch * info.context

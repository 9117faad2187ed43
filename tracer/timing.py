"""Where the time of one forward pass goes: one row per MoE layer and one for the whole pass.

On the CPU every lap is wall time. On CUDA the host runs ahead of the device only between two
read-backs of the routing, so the device's share (mixer, stall, experts) comes from events on the compute
stream and the host's share from its own clock. Nothing here synchronises except `end`, which the
generation loop does anyway to read the token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from .schema import WHOLE_STEP
from .types import Phase

LAPS: tuple[str, ...] = (
    "mixer_s",
    "readback_s",
    "decision_s",
    "lookahead_s",
    "stall_s",
    "experts_s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """One forward pass about to run. `tokens` and `context` include padding."""

    step: int
    phase: Phase
    batch: int
    tokens: int
    context: int


@dataclass(slots=True)
class StepRows:
    """Rows for the `steps` table, column by column."""

    columns: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; every row has the same keys."""
        for name, value in row.items():
            self.columns.setdefault(name, []).append(value)

    def take(self) -> dict[str, list[Any]]:
        """Hand over what was collected and start empty."""
        taken, self.columns = self.columns, {}
        return taken


class StepTimer:
    """Laps on the host clock; complete for devices that compute when asked to (CPU).

    Call order per pass: begin, then per layer enter, lap…, leave, then end. `lap(name)` closes the time
    since the last mark under that name; `skip` drops it (the tracer's own work).
    """

    def __init__(self) -> None:
        self.rows = StepRows()
        self.origin = time.perf_counter()
        self._info: StepInfo | None = None
        self._skipped = 0.0
        self._mark = 0.0
        self._layer_start = 0.0
        self._laps: dict[str, float] = {}

    def now(self) -> float:
        """Seconds on the run's clock."""
        return time.perf_counter() - self.origin

    def begin(self, info: StepInfo) -> None:
        """Start a forward pass."""
        self._info = info
        self._skipped = 0.0
        self._step_start = self._mark = self.now()

    def enter(self) -> None:
        """The model reached a layer's experts: what came before was its mixer."""
        self._laps = dict.fromkeys(LAPS, 0.0)
        self._layer_start = self._mark
        self.lap("mixer_s")

    def lap(self, name: str) -> None:
        """Charge the time since the last mark to `name`."""
        now = self.now()
        self._laps[name] += now - self._mark
        self._mark = now

    def skip(self) -> None:
        """Drop the time since the last mark from every account."""
        now = self.now()
        self._skipped += now - self._mark
        self._mark = now

    def leave(self, layer: int, *, distinct: int, waves: int) -> None:
        """The layer is done: write its row."""
        self._write(layer, self._layer_start, distinct, waves, self._laps, self._lap_sum())

    def end(self) -> float:
        """The pass is done: write its row. Returns its seconds."""
        total = self.now() - self._step_start - self._skipped
        self._write(WHOLE_STEP, self._step_start, 0, 0, dict.fromkeys(LAPS, 0.0), total)
        return total

    def _lap_sum(self) -> float:
        return sum(self._laps.values())

    def _write(
        self,
        layer: int,
        start_s: float,
        distinct: int,
        waves: int,
        laps: dict[str, float],
        total_s: float,
    ) -> None:
        info = self._info
        assert info is not None
        self.rows.add(
            {
                "step": info.step,
                "layer": layer,
                "phase": info.phase,
                "batch": info.batch,
                "tokens": info.tokens,
                "context": info.context,
                "distinct": distinct,
                "waves": waves,
                "start_s": start_s,
                **laps,
                "total_s": total_s,
            }
        )


class CudaStepTimer(StepTimer):
    """Adds device time: events around mixer, stall and experts, read when the pass has ended.

    The host's mixer and experts laps only cover launching work; they are replaced by the device's,
    and the read-back keeps what the host waited beyond them.
    """

    _DEVICE_LAPS: tuple[str, ...] = ("mixer_s", "stall_s", "experts_s")

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[dict[str, Any]] = []
        self._events: list[tuple[str, Any]] = []
        self._last_event: Any = None

    def begin(self, info: StepInfo) -> None:
        """Start a forward pass and the device's own clock for it."""
        super().begin(info)
        self._pending = []
        self._last_event = self._event()

    def enter(self) -> None:
        """Mark the end of the mixer on host and device."""
        self._events = []
        super().enter()

    def lap(self, name: str) -> None:
        """Charge host time, and device time where the device does the work."""
        super().lap(name)
        if name in self._DEVICE_LAPS:
            event = self._event()
            self._events.append((name, event))

    def leave(self, layer: int, *, distinct: int, waves: int) -> None:
        """Keep the layer's marks until the device has passed them."""
        self._pending.append(
            {
                "layer": layer,
                "distinct": distinct,
                "waves": waves,
                "start_s": self._layer_start,
                "laps": dict(self._laps),
                "events": [("from", self._last_event), *self._events],
            }
        )
        self._last_event = self._events[-1][1]

    def end(self) -> float:
        """Wait for the device, turn the marks into rows, and close the pass."""
        torch.cuda.synchronize()
        for pending in self._pending:
            laps = self._merge(pending["laps"], pending["events"])
            self._write(
                pending["layer"],
                pending["start_s"],
                pending["distinct"],
                pending["waves"],
                laps,
                sum(laps.values()),
            )
        return super().end()

    @staticmethod
    def _event() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @classmethod
    def _merge(cls, host: dict[str, float], events: list[tuple[str, Any]]) -> dict[str, float]:
        device = dict.fromkeys(cls._DEVICE_LAPS, 0.0)
        for (_, before), (name, after) in pairwise(events):
            device[name] += before.elapsed_time(after) / 1e3
        laps = dict(host)
        # The device's gap between two marks holds host work too; take the host's accounts out of it.
        waited = host["readback_s"] + host["mixer_s"]
        laps["mixer_s"] = min(device["mixer_s"], waited)
        laps["readback_s"] = max(0.0, waited - laps["mixer_s"])
        host_side = host["decision_s"] + host["lookahead_s"]
        laps["stall_s"] = max(0.0, device["stall_s"] - laps["readback_s"] - host_side)
        laps["experts_s"] = device["experts_s"]
        return laps


def step_timer(device: torch.device) -> StepTimer:
    """The timer that tells the truth on this device."""
    return CudaStepTimer() if device.type == "cuda" else StepTimer()

"""Where the time of one forward pass goes: one row per MoE layer and one for the whole pass.

On the CPU every lap is wall time. On CUDA the host runs ahead of the device between two read-backs of
the routing; there, what the device computes is timed by events on its stream. Nothing here synchronises
but the begin and end of a pass, where the generation loop waits for the token anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

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

CPU_LAP = "cpu_s"
"""Handing experts over to the CPU and waiting for them: only in runs whose policy computes misses there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """One forward pass about to run. `tokens` and `context` include padding."""

    step: int
    phase: Phase
    batch: int
    tokens: int
    context: int


class _Row(NamedTuple):
    """One row of the `steps` table before it is spelled out: cheap to make, as every event makes one.

    `laps` are seconds in the order of LAPS, and after them that of CPU_LAP, if the event had any. The total of a layer
    is their sum; of a pass it is given.
    """

    info: StepInfo
    layer: int
    distinct: int
    waves: int
    start_s: float
    laps: tuple[float, ...]
    schedule_s: float = 0.0
    total_s: float | None = None


_NO_LAPS: dict[str, float] = dict.fromkeys(LAPS, 0.0)


@dataclass(slots=True)
class StepRows:
    """Rows for the `steps` table."""

    rows: list[_Row] = field(default_factory=list)

    def add(self, row: _Row) -> None:
        """Append one row."""
        self.rows.append(row)

    def lap_s(self, name: str, first: int = 0) -> float:
        """Seconds of one lap over all layers, from row `first` on."""
        place = LAPS.index(name)
        return sum(row.laps[place] for row in self.rows[first:])

    def take(self) -> dict[str, list[Any]]:
        """Hand over what was collected, column by column, and start empty."""
        rows, self.rows = self.rows, []
        if not rows:
            return {}
        infos = [row.info for row in rows]
        own = len(LAPS)
        on_cpu = [sum(row.laps[own:]) for row in rows]
        return {
            "step": [info.step for info in infos],
            "layer": [row.layer for row in rows],
            "phase": [info.phase for info in infos],
            "batch": [info.batch for info in infos],
            "tokens": [info.tokens for info in infos],
            "context": [info.context for info in infos],
            "distinct": [row.distinct for row in rows],
            "waves": [row.waves for row in rows],
            "start_s": [row.start_s for row in rows],
            **{name: [row.laps[place] for row in rows] for place, name in enumerate(LAPS)},
            **({CPU_LAP: on_cpu} if any(on_cpu) else {}),
            "schedule_s": [row.schedule_s for row in rows],
            "total_s": [sum(r.laps) if r.total_s is None else r.total_s for r in rows],
        }


class StepTimer:
    """Laps on the host clock; complete for devices that compute when asked to (CPU).

    Call order per pass: begin, then per layer enter, lap…, leave, then end. `lap(name)` closes the time
    since the last mark under that name; `skip` drops it (the tracer's own work). What is done for a pass before it
    begins counts as `schedule_s` of its row, from a call of `prepare` on.
    """

    def __init__(self) -> None:
        self.rows = StepRows()
        self.origin = perf_counter()
        self._info: StepInfo | None = None
        self._skipped = 0.0
        self._mark = 0.0
        self._step_start = 0.0
        self._prepared: float | None = None
        self._schedule_s = 0.0
        self._layer_start = 0.0
        self._laps: dict[str, float] = {}

    def now(self) -> float:
        """Seconds on the run's clock."""
        return perf_counter() - self.origin

    def prepare(self) -> None:
        """From here to `begin`, the next pass is prepared."""
        self._prepared = self.now()

    def begin(self, info: StepInfo) -> None:
        """Start a forward pass."""
        self._info = info
        self._skipped = 0.0
        self._step_start = self._mark = self.now()
        self._schedule_s = 0.0
        if self._prepared is not None:
            self._schedule_s, self._prepared = self._step_start - self._prepared, None

    def enter(self) -> None:
        """The model reached a layer's experts: what came before was its mixer."""
        self._laps = _NO_LAPS.copy()
        self._layer_start = self._mark
        self.lap("mixer_s")

    def lap(self, name: str) -> None:
        """Charge the time since the last mark to `name`."""
        now = perf_counter() - self.origin
        self._laps[name] = self._laps.get(name, 0.0) + now - self._mark
        self._mark = now

    def skip(self) -> None:
        """Drop the time since the last mark from every account."""
        now = perf_counter() - self.origin
        self._skipped += now - self._mark
        self._mark = now

    def leave(self, layer: int, *, distinct: int, waves: int) -> None:
        """The layer is done: write its row."""
        self._write(layer, self._layer_start, distinct, waves, self._laps)

    def event(
        self,
        layer: int,
        distinct: int,
        entered: float,
        foreseen: float,
        kept: float,
        computed: float,
    ) -> None:
        """A whole event of a resident layer at once, by moments of `perf_counter`.

        The model reached the experts, whose choice is on the host already; predictions were made; the tracer had
        kept what it wants (its own work, dropped); the experts were computed. One call instead of seven: between
        kernels every line of Python meets cold caches.
        """
        origin = self.origin
        start = self._mark
        assert self._info is not None
        laps = (entered - origin - start, 0.0, 0.0, foreseen - entered, 0.0, computed - kept)
        self.rows.rows.append(_Row(self._info, layer, distinct, 1, start, laps))
        self._mark = mark = perf_counter() - origin
        self._skipped += kept - foreseen + mark - (computed - origin)

    def end(self) -> float:
        """The pass is done: write its row. Returns its seconds."""
        total = self.now() - self._step_start - self._skipped + self._schedule_s
        began = self._step_start - self._schedule_s
        assert self._info is not None
        laps = tuple(_NO_LAPS.values())
        self.rows.add(_Row(self._info, WHOLE_STEP, 0, 0, began, laps, self._schedule_s, total))
        return total

    def _write(
        self, layer: int, start_s: float, distinct: int, waves: int, laps: dict[str, float]
    ) -> None:
        assert self._info is not None
        self.rows.add(_Row(self._info, layer, distinct, waves, start_s, tuple(laps.values())))


class CudaStepTimer(StepTimer):
    """Puts host and device on one clock: a lap ends when the slower of the two has passed it.

    Laps that the device computes end at an event on the compute stream, the others at the host's
    clock. Each lap is charged from where the one before ended, so that the laps of a layer add up to wall
    time although the host runs ahead.
    """

    _ON_DEVICE = frozenset({"mixer_s", "stall_s", "experts_s"})

    def __init__(self) -> None:
        super().__init__()
        self._marks: list[tuple[str, float, Any]] = []
        self._layers: list[tuple[int, int, int, list[tuple[str, float, Any]]]] = []
        self._base: Any = None

    def begin(self, info: StepInfo) -> None:
        """Start a forward pass; the device is idle here, so the clocks can be tied."""
        torch.cuda.synchronize()
        self._base = self._event()
        super().begin(info)
        self._layers = []

    def enter(self) -> None:
        """See StepTimer."""
        self._marks = []
        super().enter()

    def lap(self, name: str) -> None:
        """See StepTimer."""
        super().lap(name)
        event = self._event() if name in self._ON_DEVICE else None
        self._marks.append((name, self._mark, event))

    def leave(self, layer: int, *, distinct: int, waves: int) -> None:
        """Keep the layer's marks until the device has passed them."""
        self._layers.append((layer, distinct, waves, self._marks))

    def end(self) -> float:
        """Wait for the device, turn the marks into rows, and close the pass."""
        torch.cuda.synchronize()
        cursor = self._step_start
        for layer, distinct, waves, marks in self._layers:
            began, laps = cursor, dict.fromkeys(LAPS, 0.0)
            for name, host_s, event in marks:
                ended = host_s if event is None else self._device_s(event)
                laps[name] = laps.get(name, 0.0) + max(0.0, ended - cursor)
                cursor = max(cursor, ended)
            self._write(layer, began, distinct, waves, laps)
        return super().end()

    def _device_s(self, event: Any) -> float:
        return self._step_start + self._base.elapsed_time(event) / 1e3

    @staticmethod
    def _event() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def step_timer(device: torch.device) -> StepTimer:
    """The timer that tells the truth on this device."""
    return CudaStepTimer() if device.type == "cuda" else StepTimer()

"""A measured machine as a file, `expertflow.profile/1`: points, the lines through them, and how far to trust both."""

from __future__ import annotations

from dataclasses import dataclass

from ..types import Origin, Provenance

PROFILE_FORMAT = "expertflow.profile/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Seconds as measured: the median over `repeats`, and the quartiles around it."""

    seconds: float
    low_s: float
    high_s: float
    repeats: int

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.high_s - self.low_s) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPoint:
    """One copy of `num_bytes` when `concurrent` of them were asked for at once (seconds are per copy)."""

    num_bytes: int
    pinned: bool
    busy: bool
    concurrent: int
    time: Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPoint:
    """One call of a layer's experts: tokens, and the distinct experts they chose."""

    tokens: int
    distinct: int
    time: Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadbackPoint:
    """Bringing the router's choice for some tokens to the host."""

    tokens: int
    time: Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Seconds as a sum of non-negative weights times features; `residual` is the median relative error."""

    features: tuple[str, ...]
    weights: tuple[float, ...]
    residual: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLine:
    """The line through the copies of one kind: (1, bytes)."""

    pinned: bool
    busy: bool
    concurrent: int
    line: Line

    @property
    def latency_s(self) -> float:
        """Seconds of a copy beside its bytes."""
        return self.line.weights[0]

    @property
    def bandwidth_Bps(self) -> float:
        """Bytes a second once a copy runs; infinite where bytes made no difference."""
        return 1 / self.line.weights[1] if self.line.weights[1] else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFile:
    """`profile.json`. `expert_bytes` is the block the copies were measured around; sizes are bytes, times seconds.

    `wake_s` and `submit_s` are what a wait and a request cost beside the copy; `launch_s` is the host's time for
    one small operation on the device; `group_s` what a slot more in a layer's pool adds to a call.
    `repeat_spread` compares the two halves of the measurement: how much the machine itself drifted.
    """

    name: str
    device: str
    machine: str
    threads: int
    link: str
    link_origin: Origin
    model_id: str
    expert_bytes: int
    chunk_bytes: int
    copies: tuple[CopyPoint, ...]
    copy_lines: tuple[CopyLine, ...]
    experts: tuple[ExpertPoint, ...]
    experts_line: Line
    readback: tuple[ReadbackPoint, ...]
    readback_line: Line
    launch_s: float
    wake_s: float
    submit_s: float
    group_s: float
    repeat_spread: float
    provenance: Provenance
    warnings: tuple[str, ...] = ()
    format: str = PROFILE_FORMAT

    def copy_line(self, *, busy: bool) -> CopyLine:
        """The line of single copies from the kind of memory the runtime uses: page-locked where there is any."""
        return min(
            self.copy_lines,
            key=lambda found: (not found.pinned, found.busy != busy, found.concurrent),
        )

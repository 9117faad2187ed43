"""Whether a machine keeps up with the requests that arrive, and what to call it if it does not.

The delay before service must grow through the run: each third of the requests waits longer than the one before, and
a straight line through the delays by time of arrival rises by more than 50 ms a second (a machine that serves 95 % of
what is offered falls behind that fast), and by more than 3 standard errors. Then either of two signs is enough:
- The last third waits more than twice as long as the first, and longer than a request is in service.
- Of the requests that had time to be finished before the last arrival, had they not queued, fewer than 95 % were. Less
  than 20 such requests tell nothing.

In a closed loop arrivals follow service, so there is nothing to keep up with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..tracer.quantities import format_seconds
from .account import percentiles
from .result import ArrivalResult

_MIN_SLOPE = 0.05
_MIN_SLOPE_IN_ERRORS = 3.0
_MIN_GROWTH = 2.0
_MIN_SERVED = 0.95
_MIN_TO_JUDGE = 20


@dataclass(frozen=True, slots=True, eq=False)
class ServedTimes:
    """When requests arrived, were first at work and were finished: seconds on the run's clock, by arrival."""

    arrived: np.ndarray
    begun: np.ndarray
    finished: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What else is known of a run with arrivals. `busy_s` is the time of all passes."""

    description: str
    users: int | None
    busy_s: float
    mean_batch: float
    mixed_tokens: int


def judge_arrivals(times: ServedTimes, load: Load) -> ArrivalResult:
    """Add up how requests were served, and name it if they came in faster than that."""
    count = len(times.arrived)
    span_s = float(times.finished.max(initial=0.0) - times.arrived.min(initial=0.0)) if count else 0
    window_s = float(np.ptp(times.arrived)) if count else 0.0
    is_open = load.users is None and window_s > 0
    queue_s = times.begun - times.arrived
    found = ArrivalResult(
        description=load.description,
        requests=count,
        offered_per_s=(count - 1) / window_s if is_open else 0.0,
        served_per_s=count / span_s if span_s else 0.0,
        span_s=span_s,
        queue=percentiles(queue_s.tolist()),
        service_s=float(np.mean(times.finished - times.begun)) if count else 0.0,
        mean_batch=load.mean_batch,
        utilization=load.busy_s / span_s if span_s else 0.0,
        mixed_tokens=load.mixed_tokens,
        saturated=is_open and is_saturated(times),
        finding="",
    )
    return replace(found, finding=_sentence(found, load.users, queue_s))


def is_saturated(times: ServedTimes) -> bool:
    """Whether requests come in faster than they are served. See the module docstring."""
    queue_s = times.begun - times.arrived
    service_s = times.finished - times.begun
    if len(queue_s) < 3:
        return False
    first_s, middle_s, last_s = _thirds(queue_s)
    if not (first_s < middle_s < last_s and _rises(times.arrived, queue_s)):
        return False
    if last_s > _MIN_GROWTH * first_s and last_s > service_s.mean():
        return True
    had_time = times.arrived + service_s <= times.arrived.max()
    if had_time.sum() < _MIN_TO_JUDGE:
        return False
    was_served = times.finished[had_time] <= times.arrived.max()
    return bool(was_served.mean() < _MIN_SERVED)


def _rises(moment_s: np.ndarray, value: np.ndarray) -> bool:
    """Whether the slope of a straight line is well above 0."""
    x, y = moment_s - moment_s.mean(), value - value.mean()
    spread = float(x @ x)
    slope = float(x @ y) / spread if spread else 0.0
    left = y - slope * x
    error = np.sqrt(float(left @ left) / max(1, len(x) - 2) / spread) if spread else 0.0
    return slope > max(_MIN_SLOPE, _MIN_SLOPE_IN_ERRORS * error)


def _thirds(values: np.ndarray) -> list[float]:
    return [float(third.mean()) for third in np.array_split(values, 3)]


def _sentence(found: ArrivalResult, users: int | None, queue_s: np.ndarray) -> str:
    if not found.requests:
        return "No request arrived."
    served = f"{found.served_per_s:.3g}/s"
    busy = f"passes of {found.mean_batch:.1f} sequences run {found.utilization:.0%} of the time"
    if users is not None:
        return (
            f"Closed loop: {users} requests in flight keep the machine busy; {served} are served."
        )
    if not found.offered_per_s:
        return f"All {found.requests} requests arrive at once; {served} are served."
    few = ""
    if found.requests < _MIN_TO_JUDGE:
        few = f" {found.requests} requests are too few to be sure: run more with --requests."
    if found.saturated:
        first_s, _, last_s = _thirds(queue_s)
        return (
            f"Saturated: requests arrive at {found.offered_per_s:.3g}/s and {served} are served; the first third "
            f"waits {format_seconds(first_s)}, the last {format_seconds(last_s)}, and the queue grows for as "
            f"long as this goes on.{few}"
        )
    return (
        f"Keeps up: requests arrive at {found.offered_per_s:.3g}/s, {busy}, and they wait "
        f"{format_seconds(found.queue.p95)} at most in 95 % of cases.{few}"
    )

"""Copy engines: the only code that moves expert bytes to the device, and times each move.

Two lanes, demand before prefetch. On CUDA the lanes are streams. On the CPU one thread carries both,
chunk by chunk, so that a demand copy waits for one prefetch chunk at most; there a link can be emulated:
each chunk is really copied, then the rest of the time that link would take is waited.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .errors import ResourceError, UsageError
from .quantities import LinkSpec
from .switching import hasten, relax
from .types import ExpertKey, Why

CHUNK_BYTES = 4 * 2**20
_PR_SET_TIMERSLACK = 29
_CLOSED = "The copy engine was closed before this copy ended."


@dataclass(slots=True, eq=False)
class Copy:
    """One expert on its way. Times are seconds on the run's clock; `needed_s` is None if unasked.

    What is in `target` goes to `back` first, if there is such a place. `moved` counts bytes both ways. `error` is why
    it did not arrive.
    """

    key: ExpertKey
    source: torch.Tensor
    target: torch.Tensor
    why: Why
    step: int
    queued_s: float = 0.0
    start_s: float = 0.0
    end_s: float = 0.0
    needed_s: float | None = None
    is_urgent: bool = False
    is_cancelled: bool = False
    back: torch.Tensor | None = None
    moved: int = 0
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)
    events: tuple[Any, Any] | None = None

    @property
    def num_bytes(self) -> int:
        """What crosses the link for it."""
        return self.source.numel() * (1 if self.back is None else 2)

    def carry(self, start: int, most: int) -> int:
        """Copy on from byte `start`, at most so many, in one direction; returns where it got to."""
        size = self.source.numel()
        if self.back is None and start == 0 and most >= size:
            self.target.copy_(self.source)  # most experts go in one piece, and slicing takes time
            return size
        if self.back is not None and start < size:
            stop = min(size, start + most)
            self.back[start:stop].copy_(self.target[start:stop])
            return stop
        first = self.num_bytes - size
        stop = min(self.num_bytes, start + most)
        self.target[start - first : stop - first].copy_(self.source[start - first : stop - first])
        return stop


class CopyEngine(Protocol):
    """Moves blocks. `submit` never blocks; after `wait` the targets may be computed with.

    A copy that fails does not stop the others. A wait for it raises ResourceError, once the rest has ended; nobody
    waits for a prefetch, so `failed` names it.
    """

    pinned: bool
    stream_names: tuple[str, ...]

    def submit(self, copies: Sequence[Copy]) -> None:
        """Ask for copies; returns at once."""
        ...

    def wait(self, copies: Sequence[Copy]) -> None:
        """Make compute wait for copies."""
        ...

    def promote(self, copy: Copy) -> None:
        """Compute needs this prefetch now."""
        ...

    def cancel(self, copy: Copy) -> None:
        """Give up a prefetch; later copies into its slot are safe."""
        ...

    def abandon(self, copy: Copy) -> bool:
        """Nobody will wait for this copy. Returns whether its target holds it; if not, later copies there are safe."""
        ...

    def finished(self) -> list[Copy]:
        """Prefetches that ended since the last call, in order of their end."""
        ...

    def failed(self) -> list[Copy]:
        """Prefetches that failed since the last call."""
        ...

    def take_records(self) -> list[Copy]:
        """Every copy that ended, with its times, since the last call."""
        ...

    def close(self) -> None:
        """Stop copying."""
        ...


class ThreadCopyEngine:
    """One thread copies between host buffers: the CPU's link, real or emulated."""

    pinned = False
    stream_names: tuple[str, ...] = ("link",)

    def __init__(
        self,
        now: Callable[[], float],
        *,
        link: LinkSpec | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._now = now
        self._link = link
        self._chunk_bytes = chunk_bytes
        self._demand: deque[Copy] = deque()
        self._prefetch: deque[Copy] = deque()
        self._finished: deque[Copy] = deque()
        self._failed: deque[Copy] = deque()
        self._records: deque[Copy] = deque()
        self._wake = threading.Condition()
        self._is_closed = False
        self._free_at = 0.0
        self._thread = threading.Thread(target=self._run, name="expertflow-copies", daemon=True)
        hasten()
        self._thread.start()

    def submit(self, copies: Sequence[Copy]) -> None:
        """Queue copies; demand copies go before every prefetch. Raises ResourceError after `close`."""
        if not copies:
            return
        now = self._now()
        with self._wake:
            if self._is_closed:
                raise ResourceError("Copies were asked for after their engine was closed.")
            for copy in copies:
                copy.queued_s = now
                copy.is_urgent = copy.why == "demand"
                (self._demand if copy.is_urgent else self._prefetch).append(copy)
            self._wake.notify()

    def wait(self, copies: Sequence[Copy]) -> None:
        """Block until all have ended. Raises ResourceError for the first that failed."""
        now = self._now()
        for copy in copies:
            copy.needed_s = now
        for copy in copies:
            copy.done.wait()
        for copy in copies:
            if copy.error is not None:
                raise _not_copied(copy) from copy.error

    def promote(self, copy: Copy) -> None:
        """Compute needs this prefetch now: let it go first."""
        with self._wake:
            copy.is_urgent = True
            if copy in self._prefetch:
                self._prefetch.remove(copy)
                self._demand.append(copy)

    def cancel(self, copy: Copy) -> None:
        """Stop a prefetch at the next chunk; later copies into its slot wait for that chunk."""
        with self._wake:
            copy.is_cancelled = True
            if copy in self._prefetch:
                self._prefetch.remove(copy)
                if copy.moved:  # interrupted before: what it moved was moved
                    copy.end_s = self._now()
                    self._records.append(copy)
                copy.done.set()

    def abandon(self, copy: Copy) -> bool:
        """See CopyEngine."""
        with self._wake:
            if copy.done.is_set():
                return copy.error is None and not copy.is_cancelled
            # Whether it is being carried or waits, it ends at its next chunk.
            copy.is_cancelled = True
            return False

    def finished(self) -> list[Copy]:
        """See CopyEngine."""
        return _drain(self._finished)

    def failed(self) -> list[Copy]:
        """See CopyEngine."""
        return _drain(self._failed)

    def take_records(self) -> list[Copy]:
        """See CopyEngine."""
        return _drain(self._records)

    def close(self) -> None:
        """Stop the thread at the next chunk; queued copies are dropped. Nothing happens the second time."""
        with self._wake:
            was_closed, self._is_closed = self._is_closed, True
            self._wake.notify()
        self._thread.join()
        for copy in (*_drain(self._demand), *_drain(self._prefetch)):
            copy.error = ResourceError(_CLOSED)
            copy.done.set()
        if not was_closed:
            relax()

    def _run(self) -> None:
        _fine_sleep()
        while (copy := self._next()) is not None:
            try:
                self._carry(copy)
            except Exception as error:
                self._fail(copy, error)

    def _fail(self, copy: Copy, error: Exception) -> None:
        # Whoever waits for it is told; this thread goes on, or every later wait would last for ever.
        copy.error = error
        copy.end_s = self._free_at = self._now()
        self._records.append(copy)
        if not copy.is_cancelled and copy.why != "demand":
            self._failed.append(copy)
        copy.done.set()

    def _next(self) -> Copy | None:
        with self._wake:
            while not (self._demand or self._prefetch or self._is_closed):
                self._wake.wait()
            if self._is_closed:
                return None
            return self._demand.popleft() if self._demand else self._prefetch.popleft()

    def _carry(self, copy: Copy) -> None:
        # A copy that was already waiting starts when the one before it was due, not when this thread
        # woke up: late wake-ups must not add up.
        start = self._now()
        if copy.queued_s < self._free_at:
            start = min(start, self._free_at)
        if copy.moved == 0:
            copy.start_s = start
        due = start + (self._link.latency_s if self._link and copy.moved == 0 else 0.0)
        total = copy.num_bytes
        while copy.moved < total and not copy.is_cancelled:
            if self._is_closed:
                raise ResourceError(_CLOSED)
            stop = copy.carry(copy.moved, self._chunk_bytes)
            if self._link:
                due += (stop - copy.moved) / self._link.bandwidth_Bps
                _sleep_until(due, self._now)
            copy.moved = stop
            if copy.moved < total and self._must_yield(copy):
                self._free_at = self._now()
                return
        copy.end_s = self._now()
        self._free_at = max(due, copy.end_s) if not self._link else due
        self._records.append(copy)
        if not copy.is_cancelled and copy.why != "demand":
            self._finished.append(copy)
        copy.done.set()

    def _must_yield(self, copy: Copy) -> bool:
        with self._wake:
            if copy.is_urgent or not self._demand:
                return False
            self._prefetch.appendleft(copy)
            return True


class CudaCopyEngine:
    """Two streams over the bus; completion is known from events, compute waits without the host."""

    stream_names: tuple[str, ...] = ("demand", "prefetch")

    def __init__(self, device: torch.device, *, pinned: bool) -> None:
        self.pinned = pinned
        self._device = device
        self._demand: Any = torch.cuda.Stream(device, priority=-1)
        self._prefetch: Any = torch.cuda.Stream(device)
        self._in_flight: list[Copy] = []
        self._ended: list[Copy] = []
        self._last_into: dict[int, Any] = {}
        self._base: Any = torch.cuda.Event(enable_timing=True)
        self._base.record()
        torch.cuda.synchronize(device)
        self._base_s = time.perf_counter()
        self._now: Callable[[], float] = lambda: time.perf_counter() - self._base_s

    def use_clock(self, now: Callable[[], float]) -> None:
        """Report times on the run's clock."""
        self._now = now
        torch.cuda.synchronize(self._device)
        self._base.record()
        torch.cuda.synchronize(self._device)
        self._base_s = now()

    def submit(self, copies: Sequence[Copy]) -> None:
        """Enqueue copies behind the compute that may still read their slots."""
        for copy in copies:
            copy.queued_s = self._now()
            stream = self._demand if copy.why == "demand" else self._prefetch
            stream.wait_stream(torch.cuda.current_stream(self._device))
            before = self._last_into.get(copy.target.data_ptr())
            if before is not None:
                stream.wait_event(before)
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            with torch.cuda.stream(stream):
                start.record()
                if copy.back is not None:
                    copy.back.copy_(copy.target, non_blocking=True)
                copy.target.copy_(copy.source, non_blocking=True)
                end.record()
            copy.events = (start, end)
            self._last_into[copy.target.data_ptr()] = end
            self._in_flight.append(copy)

    def wait(self, copies: Sequence[Copy]) -> None:
        """Make the compute stream wait; the host goes on."""
        compute = torch.cuda.current_stream(self._device)
        now = self._now()
        for copy in copies:
            copy.needed_s = now
            assert copy.events is not None
            compute.wait_event(copy.events[1])

    def promote(self, copy: Copy) -> None:
        """Nothing to do: an enqueued copy cannot overtake (docs/limits.md)."""

    def cancel(self, copy: Copy) -> None:
        """Forget its result; the bytes still cross, and later copies into the slot come after."""
        copy.is_cancelled = True

    def abandon(self, copy: Copy) -> bool:
        """What was enqueued arrives before anything that is computed or copied after it."""
        return copy.events is not None

    def failed(self) -> list[Copy]:
        """None: an enqueued copy fails with the whole device, and that is raised."""
        return []

    def finished(self) -> list[Copy]:
        """See CopyEngine."""
        done = [c for c in self._in_flight if c.events is not None and c.events[1].query()]
        self._in_flight = [c for c in self._in_flight if c not in done]
        self._ended += done
        return [c for c in done if c.why != "demand" and not c.is_cancelled]

    def take_records(self) -> list[Copy]:
        """See CopyEngine; waits for the device."""
        torch.cuda.synchronize(self._device)
        ended, self._ended = self._ended, []
        waiting, self._in_flight = self._in_flight, []
        # Prefetches not yet reported by `finished` stay in flight; their times are known already.
        self._in_flight = [c for c in waiting if c.why != "demand"]
        for copy in (*ended, *(c for c in waiting if c.why == "demand")):
            self._stamp(copy)
        return [*ended, *(c for c in waiting if c.why == "demand")]

    def close(self) -> None:
        """Wait for the bus to fall silent."""
        torch.cuda.synchronize(self._device)

    def _stamp(self, copy: Copy) -> None:
        assert copy.events is not None
        copy.start_s = self._base_s + self._base.elapsed_time(copy.events[0]) / 1e3
        copy.end_s = self._base_s + self._base.elapsed_time(copy.events[1]) / 1e3


def copy_engine(
    device: torch.device,
    now: Callable[[], float],
    *,
    pinned: bool,
    link: LinkSpec | None = None,
) -> ThreadCopyEngine | CudaCopyEngine:
    """The engine for a device. Raises UsageError for an emulated link on CUDA."""
    if device.type != "cuda":
        return ThreadCopyEngine(now, link=link)
    if link is not None:
        raise UsageError("A link can only be emulated on the CPU; leave --link out on CUDA.")
    engine = CudaCopyEngine(device, pinned=pinned)
    engine.use_clock(now)
    return engine


def _not_copied(copy: Copy) -> ResourceError:
    error = copy.error
    words = f"{type(error).__name__}: {error}".splitlines()[0]
    return ResourceError(
        f"Expert {copy.key.expert} of layer {copy.key.layer} could not be copied to its slot: {words} The pass was "
        "given up; the model, its experts and the other slots are as they were, so it can be run again."
    )


def _drain(queue: deque[Copy]) -> list[Copy]:
    taken: list[Copy] = []
    while queue:
        taken.append(queue.popleft())
    return taken


def _sleep_until(due: float, now: Callable[[], float]) -> None:
    remaining = due - now()
    if remaining > 0:
        time.sleep(remaining)


def _fine_sleep() -> None:
    # Linux rounds short sleeps of a thread up by 50 µs unless told otherwise: as long as a copy.
    try:
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    except (OSError, AttributeError):
        return

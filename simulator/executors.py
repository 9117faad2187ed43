"""Where the points of a sweep are predicted: here, in processes of this machine, or on a Ray cluster.

All give the same rows; only the order in which they come differs. A judge is never sent along with a point:
forked workers share its memory, spawned ones open the trace themselves, Ray keeps it in its object store.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, Self

from ..tracer.errors import ResourceError, unknown_name
from .judge import Judge, Opening
from .space import Point
from .sweep_row import Row

EXECUTORS = ("process", "ray", "serial")
_LOOPBACK = "127.0.0.1"
_IN_FLIGHT = 2
"""Points handed out per worker, so that none waits and few are lost."""


class Executor(Protocol):
    """A context manager that predicts points."""

    def __enter__(self) -> Self:
        """Start the workers."""
        ...

    def __exit__(self, *_: object) -> None:
        """End the workers, whatever they are doing."""
        ...

    def run(self, points: Iterable[Point]) -> Iterator[Row]:
        """A row for each point, as they are finished."""
        ...


def make_executor(
    name: str, judge: Judge, *, workers: int | None = None, opening: Opening | None = None
) -> Executor:
    """An executor by name, with a worker per core unless told. Raises UsageError for unknown names."""
    count = workers or os.cpu_count() or 1
    if name == "serial":
        return SerialExecutor(judge)
    if name == "process":
        return ProcessExecutor(judge, count, opening)
    if name == "ray":
        return RayExecutor(judge, count)
    raise unknown_name("executor", name, EXECUTORS)


class SerialExecutor:
    """One point after another, in this process."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, points: Iterable[Point]) -> Iterator[Row]:
        """A row for each point, in order."""
        return map(self._judge.predict, points)


class ProcessExecutor:
    """A pool of processes. `opening` tells spawned ones how to get the judge; else it is copied to each.

    Workers are forked where that is safe; `method` names another way to start them.
    """

    def __init__(
        self, judge: Judge, workers: int, opening: Opening | None = None, method: str | None = None
    ) -> None:
        self._method = method or _start_method()
        shared = None if self._method == "fork" else (opening or judge)
        self._judge, self._workers = judge, workers
        self._before = set(multiprocessing.active_children())
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context(self._method),
            initializer=_begin,
            initargs=(shared, os.getpid()),
        )

    def __enter__(self) -> Self:
        global _judge
        # Forked now, before anything here starts a thread.
        _judge = self._judge
        try:
            self._pool.submit(_nothing).result()
        except BrokenProcessPool:
            self.__exit__()
            raise _broken() from None
        return self

    def __exit__(self, *_: object) -> None:
        global _judge
        _judge = None
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers():
            # Not `terminate`: a library of the parent's (Ray, a server) may have left a handler for that signal.
            worker.kill()

    def workers(self) -> set[BaseProcess]:
        """The processes of the pool that are alive."""
        return set(multiprocessing.active_children()) - self._before

    def run(self, points: Iterable[Point]) -> Iterator[Row]:
        """A row for each point, as they are finished. Raises ResourceError if a worker was killed."""
        waiting = iter(points)
        running: set[Future[Row]] = set()
        try:
            while True:
                room = self._workers * _IN_FLIGHT - len(running)
                running |= {self._pool.submit(_predict, p) for p in islice(waiting, room)}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise _broken() from None


class RayExecutor:
    """Ray: the cluster of RAY_ADDRESS if that is set, else a private one on this machine's loopback."""

    def __init__(self, judge: Judge, workers: int) -> None:
        self._judge, self._workers = judge, workers
        self._is_ours = False
        self._shared: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        is_cluster = bool(os.environ.get("RAY_ADDRESS"))
        if not is_cluster:
            # Ray takes an address of 127.0.0.1 for a slip of the pen and listens on all networks, but not
            # where it thinks that clusters are not supported. It reads this when it is imported.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray = _ray()
        if not ray.is_initialized():
            self._is_ours = True
            if is_cluster:
                ray.init(log_to_driver=False)
            else:
                self._start_here(ray)
        self._shared = ray.put(self._judge)
        self._task = ray.remote(num_cpus=1)(_judged)
        return self

    def __exit__(self, *_: object) -> None:
        self._shared = self._task = None
        if self._is_ours:
            _ray().shutdown()

    def _start_here(self, ray: Any) -> None:
        ray.init(
            num_cpus=self._workers,
            include_dashboard=False,
            _node_ip_address=_LOOPBACK,
            log_to_driver=False,
        )
        if {node["NodeManagerAddress"] for node in ray.nodes()} != {_LOOPBACK}:
            self.__exit__()
            raise ResourceError(
                "Ray would listen on all networks, because it was imported before the sweep began. Import "
                "it later, set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, or join a cluster of yours with "
                "RAY_ADDRESS."
            )

    def run(self, points: Iterable[Point]) -> Iterator[Row]:
        """A row for each point, as they are finished. Raises ResourceError if Ray cannot predict one."""
        ray = _ray()
        waiting = iter(points)
        running: list[Any] = []
        room = max(self._workers, int(ray.cluster_resources().get("CPU", 1))) * _IN_FLIGHT
        while True:
            fresh = islice(waiting, room - len(running))
            running += [self._task.remote(self._shared, point) for point in fresh]
            if not running:
                return
            done, running = ray.wait(running)
            try:
                rows = ray.get(done)
            except ray.exceptions.RayError as cause:
                raise ResourceError(
                    f"Ray lost a point: {cause}. Finished rows are kept: run the same command again."
                ) from None
            yield from rows


_judge: Judge | None = None
"""The judge of this worker, or of the parent that is about to fork."""


def _start_method() -> str:
    # macOS can fork, but its system libraries do not survive it.
    can_fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    return "fork" if can_fork else "spawn"


def _begin(shared: Judge | Opening | None, parent: int) -> None:
    """Prepare a worker: Ctrl-C is the parent's to handle, and nobody outlives the parent."""
    global _judge
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if shared is not None:
        _judge = shared.judge() if isinstance(shared, Opening) else shared


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _nothing() -> None:
    pass


def _predict(point: Point) -> Row:
    assert _judge is not None
    return _judge.predict(point)


def _judged(judge: Judge, point: Point) -> Row:
    return judge.predict(point)


def _broken() -> ResourceError:
    return ResourceError(
        "A worker was ended from outside, probably because memory ran out. Finished rows are kept: run the "
        "same command again with fewer --workers."
    )


def _ray() -> Any:
    # Ray reports its use to its makers unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise ResourceError(
            "--executor ray needs ray, which is not installed. Run: pip install 'expertflow-trace[ray]'"
        ) from None
    return ray

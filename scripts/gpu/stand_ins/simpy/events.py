"""Events and processes, as far as the reference engine uses SimPy's; the same order of everything at one instant."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any

URGENT, NORMAL = 0, 1


class Event:
    """Something that happens once. `callbacks` is None when it has."""

    def __init__(self, env: Environment) -> None:
        self.env = env
        self.callbacks: list[Callable[[Event], None]] | None = []
        self._ok, self._value = True, None
        self._is_triggered = False

    @property
    def triggered(self) -> bool:
        """Whether it is bound to happen."""
        return self._is_triggered

    @property
    def processed(self) -> bool:
        """Whether it has happened."""
        return self.callbacks is None

    def succeed(self, value: Any = None) -> Event:
        """Let it happen now."""
        if self._is_triggered:
            raise RuntimeError(f"{self} has already been triggered")
        self._value = value
        self.env.schedule(self, NORMAL)
        return self


class Process(Event):
    """A generator that yields what it waits for; an event itself, which happens when it ends."""

    def __init__(self, env: Environment, generator: Generator[Event, Any, Any]) -> None:
        super().__init__(env)
        self._generator = generator
        start = Event(env)
        start.callbacks = [self._resume]
        env.schedule(start, URGENT)

    def _resume(self, event: Event) -> None:
        while True:
            try:
                event = self._generator.send(event._value)
            except StopIteration as end:
                self.succeed(end.value)
                return
            if event.callbacks is not None:
                event.callbacks.append(self._resume)
                return


class AllOf(Event):
    """Happens when all of some events have."""

    def __init__(self, env: Environment, events: Sequence[Event]) -> None:
        super().__init__(env)
        self._missing = len(events)
        if not events:
            self.succeed()
        for event in events:
            if event.callbacks is None:
                self._count(event)
            else:
                event.callbacks.append(self._count)

    def _count(self, event: Event) -> None:
        self._missing -= 1
        if not self._missing:
            self.succeed()


class Environment:
    """The virtual clock and what is to come, by time, urgency and order of asking."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, int, Event]] = []
        self._number = count()

    def schedule(self, event: Event, priority: int = NORMAL, delay: float = 0) -> None:
        """Let an event happen `delay` from now."""
        event._is_triggered = True
        heappush(self._queue, (self.now + delay, priority, next(self._number), event))

    def event(self) -> Event:
        """An event that somebody will trigger."""
        return Event(self)

    def timeout(self, delay: float) -> Event:
        """An event that happens by itself."""
        made = Event(self)
        self.schedule(made, NORMAL, delay)
        return made

    def process(self, generator: Generator[Event, Any, Any]) -> Process:
        """Start a process."""
        return Process(self, generator)

    def all_of(self, events: Sequence[Event]) -> AllOf:
        """Wait for all of them."""
        return AllOf(self, list(events))

    def run(self, until: Event) -> Any:
        """Let things happen until this one has."""
        while not until.processed:
            self.now, _, _, event = heappop(self._queue)
            waiting, event.callbacks = event.callbacks or [], None
            for callback in waiting:
                callback(event)
        return until._value

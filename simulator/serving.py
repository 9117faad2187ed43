"""Continuous batching of requests as they arrive: sequences join and leave at every pass.

The i-th request takes the i-th recorded sequence, from the first again after the last. A pass feeds one token of every
sequence that generates and, up to `max_step_tokens` in all, prompts chunk by chunk in the order they joined; then those
whom the policy's scheduler picks join while there is room. Tokens appear when the pass ends; a prompt's last chunk
yields the first of them. Nothing here depends on more than the times it is told, so every engine gets the same passes,
and so does the runtime (runtime/serving.py), which asks for each with `plan` and runs it on a real model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from ..tracer.errors import UsageError, unknown_name
from .account import SequenceTimes
from .arrivals import Arrival, Arrivals
from .policy.base import Scheduler, Waiting
from .policy.spec import PolicySpec
from .result import ArrivalResult
from .saturation import Load, ServedTimes, judge_arrivals
from .token_table import Pass, TokenTable
from .workload import Workload

MAX_STEP_TOKENS = 2048
LENGTHS = ("trace", "arrivals")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    """How requests are batched.

    `max_batch` is how many may be in progress, `max_step_tokens` how many tokens one pass takes. With `mixed`, prompts
    and generation share passes; without, passes over prompts go first. `lengths` says whose lengths requests have: the
    trace's, or those of the arrivals, for which recorded rows are cut or repeated.
    """

    max_batch: int
    max_step_tokens: int = MAX_STEP_TOKENS
    mixed: bool = True
    lengths: str = "trace"

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise UsageError(f"The largest batch must be at least 1, got {self.max_batch}.")
        if self.max_step_tokens < self.max_batch:
            raise UsageError(
                f"A pass must take a token of each of {self.max_batch} sequences, but may take only "
                f"{self.max_step_tokens} tokens."
            )
        if self.lengths not in LENGTHS:
            raise unknown_name("source of lengths", self.lengths, LENGTHS)


@dataclass(slots=True, eq=False)
class _Request:
    """A request and the recorded rows it feeds: `prompt` of them for its prompt, then `decodes`.

    `past` are tokens of its context that no row was recorded for. `arrived`, `begun` and `tokens` are numbers of
    passes: the first to start after its arrival (of a closed loop), the first with a row of it, those that gave tokens.
    """

    number: int
    arrival_s: float
    prompt: int
    decodes: int
    past: int
    prompt_rows: range
    decode_rows: range
    fed: int = 0
    arrived: int = -1
    begun: int = -1
    tokens: list[int] = field(default_factory=list)

    @property
    def is_prefilling(self) -> bool:
        return self.fed < self.prompt

    @property
    def is_done(self) -> bool:
        return self.fed == self.prompt + self.decodes

    def row(self, place: int) -> int:
        """The row of the table that is fed as this request's token `place`."""
        if place < self.prompt:
            return self.prompt_rows[place % len(self.prompt_rows)]
        return self.decode_rows[(place - self.prompt) % len(self.decode_rows)]


class Serving:
    """A source of passes made of requests as they arrive (source.Source). Good for one run; `serve` makes one."""

    def __init__(
        self, table: TokenTable, arrivals: Arrivals, scheduler: Scheduler, settings: ServingSettings
    ) -> None:
        if settings.lengths == "arrivals" and not arrivals.has_lengths:
            raise UsageError(
                f"Arrivals ({arrivals.description}) say nothing about lengths; take those of the trace, "
                "or arrivals from a file."
            )
        self.settings = settings
        self._table, self._arrivals, self._scheduler = table, arrivals, scheduler
        self._requests = [
            _request(table, number, arrival, settings.lengths)
            for number, arrival in enumerate(arrivals.requests)
        ]
        self._prompts = {request.number: request.prompt for request in self._requests}
        self._issued = 0
        self._waiting: list[Waiting] = []
        self._running: list[_Request] = []
        self._start_s: list[float] = []
        self._end_s: list[float] = []
        self._batch_sum = 0
        self._mixed_tokens = 0
        if arrivals.users is not None:
            self._issue(arrivals.users)

    @property
    def is_closed(self) -> bool:
        """Whether requests arrive when others are finished, so that the passes do not depend on the clock."""
        return self._arrivals.users is not None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was made up."""
        if self.settings.lengths == "trace":
            return ()
        table, found = self._table, self._requests
        long = sum(_is_longer(request) for request in found)
        said = [
            f"Lengths of requests are those of the arrivals: {long} of {len(found)} need more tokens than were "
            "recorded and repeat recorded routing (synthetic), the others use the beginning of what was recorded."
        ]
        if not table.has_prompts:
            said.append(
                "The trace holds no prompts: their length counts as context, their passes are not run."
            )
        return tuple(said)

    def next(self, now_s: float) -> tuple[Workload, int] | float | None:
        """The next pass, made of who is there; seconds until somebody is; None when all are finished."""
        found = self.plan(now_s)
        if not isinstance(found, Pass):
            return found
        return self._table.one_pass(found, self._prompts, self.settings.max_batch), 0

    def plan(self, now_s: float) -> Pass | float | None:
        """Who is fed what next; seconds until somebody is there; None when all are finished.

        A request's tokens are fed in their order, so `owners` of the pass says all there is to know.
        """
        if not self.is_closed:
            due = self._issued
            while due < len(self._requests) and self._requests[due].arrival_s <= now_s:
                due += 1
            self._issue(due - self._issued)
        if not (self._running or self._waiting):
            if self._issued == len(self._requests):
                return None
            return self._requests[self._issued].arrival_s - now_s
        self._start_s.append(now_s)
        found = self._compose(len(self._start_s) - 1)
        self._batch_sum += found.batch
        return found

    @property
    def in_progress(self) -> tuple[int, ...]:
        """Requests that have started and not left, in the order they joined."""
        return tuple(request.number for request in self._running)

    @property
    def waiting(self) -> int:
        """How many requests have arrived and not started."""
        return len(self._waiting)

    def finish(self, number: int) -> None:
        """The token that the running pass gave this request is its last: it leaves when the pass ends."""
        request = self._requests[number]
        request.decodes = request.fed - request.prompt

    def ended(self, now_s: float) -> None:
        """Those who are finished leave."""
        self._end_s.append(now_s)
        left = [request for request in self._running if not request.is_done]
        finished = len(self._running) - len(left)
        self._running = left
        if self.is_closed:
            self._issue(finished)

    def sequences(self) -> list[SequenceTimes]:
        """Times from each request's arrival."""
        end_s = np.asarray(self._end_s)
        return [
            SequenceTimes(
                request.number,
                request.prompt,
                tuple((end_s[request.tokens] - self._arrival_s(request)).tolist()),
                is_request=True,
            )
            for request in self._requests
            if request.tokens
        ]

    def events(self) -> NoReturn:
        """Nobody knows them."""
        raise UsageError(
            "A policy that knows the future (belady, oracle) cannot run with arrivals: which requests run "
            "together depends on the clock. Replay the recorded batches, or a closed loop (closed:USERS)."
        )

    def closed_workload(self) -> Workload:
        """All passes of a closed loop as one workload, for engines and bounds that want to know it beforehand.

        It uses this source up; `retime` tells it how the replay went. Raises UsageError for other arrivals.
        """
        if not self.is_closed:
            self.events()
        found: list[Pass] = []
        while isinstance(planned := self.plan(0.0), Pass):
            found.append(planned)
            self.ended(0.0)
        arrived = {request.number: request.arrived for request in self._requests}
        return self._table.passes(found, self._prompts, arrived, self.settings.max_batch)

    def retime(self, total_s: np.ndarray) -> None:
        """The passes of `closed_workload` took so long, one right after the other: [passes]."""
        end_s = np.cumsum(total_s)
        self._start_s, self._end_s = np.append(0.0, end_s[:-1]).tolist(), end_s.tolist()

    def result(self) -> ArrivalResult:
        """How the requests were served, when the run is over."""
        start_s, end_s = np.asarray(self._start_s), np.asarray(self._end_s)
        served = [request for request in self._requests if request.tokens]
        times = ServedTimes(
            np.array([self._arrival_s(request) for request in served]),
            start_s[[request.begun for request in served]] if served else start_s,
            end_s[[request.tokens[-1] for request in served]] if served else end_s,
        )
        load = Load(
            description=self._arrivals.description,
            users=self._arrivals.users,
            busy_s=float((end_s - start_s).sum()),
            mean_batch=self._batch_sum / len(end_s) if len(end_s) else 0.0,
            mixed_tokens=self._mixed_tokens,
        )
        return judge_arrivals(times, load)

    def _arrival_s(self, request: _Request) -> float:
        return self._start_s[request.arrived] if self.is_closed else request.arrival_s

    def _issue(self, count: int) -> None:
        """The next `count` requests arrive."""
        for request in self._requests[self._issued : self._issued + count]:
            request.arrived = len(self._end_s)
            self._waiting.append(Waiting(request.number, request.prompt))
        self._issued = min(self._issued + count, len(self._requests))

    def _compose(self, number: int) -> Pass:
        found = Pass(number=number, is_decode=True, batch=0, context=0)
        decoded = self._feed_decodes(found, self._running) if self.settings.mixed else 0
        self._feed_prompts(found, self._running)
        joined = self._join(self.settings.max_step_tokens - len(found.tokens))
        self._feed_prompts(found, joined)
        if self.settings.mixed:
            decoded += self._feed_decodes(found, joined)
        elif not found.tokens:
            self._feed_decodes(found, self._running)
        if not found.is_decode:
            self._mixed_tokens += decoded
        found.positions = sum(request.past + request.fed for request in self._running)
        return found

    def _join(self, room: int) -> list[_Request]:
        """Who starts now, in order; each needs a token's room."""
        limit = min(room, self.settings.max_batch - len(self._running))
        if limit < 1 or not self._waiting:
            return []
        picked = list(self._scheduler.pick(self._waiting, limit))
        is_sound = 1 <= len(set(picked)) == len(picked) <= limit
        if not is_sound or min(picked) < 0 or max(picked) >= len(self._waiting):
            raise UsageError(
                f"Scheduler {self._scheduler.name!r} picked positions {picked} of {len(self._waiting)} waiting; "
                f"expected 1 to {limit} different ones."
            )
        joined = [self._requests[self._waiting[place].sequence] for place in picked]
        for place in sorted(picked, reverse=True):
            del self._waiting[place]
        self._running += joined
        return joined

    def _feed_prompts(self, found: Pass, requests: Sequence[_Request]) -> None:
        for request in requests:
            room = self.settings.max_step_tokens - len(found.tokens)
            if request.is_prefilling and room > 0:
                found.is_decode = False
                _feed(found, request, min(room, request.prompt - request.fed))

    def _feed_decodes(self, found: Pass, requests: Sequence[_Request]) -> int:
        before = len(found.tokens)
        for request in requests:
            # One whose prompt was fed by this very pass has to wait for its first token.
            if request.is_prefilling or (request.tokens and request.tokens[-1] == found.number):
                continue
            if len(found.tokens) < self.settings.max_step_tokens:
                _feed(found, request, 1)
        return len(found.tokens) - before


def serve(
    routing: Workload | TokenTable,
    spec: PolicySpec,
    arrivals: Arrivals,
    settings: ServingSettings,
) -> Serving:
    """Requests with recorded routing, to be run once under a policy. Raises UsageError for what cannot be.

    A table made once (`TokenTable.of`) serves many runs.
    """
    table = TokenTable.of(routing) if isinstance(routing, Workload) else routing
    return Serving(table, arrivals, spec.build_scheduler(), settings)


def _request(table: TokenTable, number: int, arrival: Arrival, lengths: str) -> _Request:
    place = number % table.num_sequences
    first, last = table.first[place : place + 2].tolist()
    prompts = range(first, first + int(table.prompts[place]))
    rows = range(prompts.stop, last)
    prompt, decodes, past = len(prompts), len(rows), 0
    if lengths == "arrivals":
        prompt, decodes = arrival.prompt_tokens or 1, (arrival.output_tokens or 1) - 1
        if not prompts:
            prompt, decodes, past = 0, decodes + 1, prompt
    # A sequence that was recorded without any generation can only go on as its prompt did.
    return _Request(number, arrival.time_s, prompt, decodes, past, prompts, rows or prompts)


def _is_longer(request: _Request) -> bool:
    rows = 0 if request.decode_rows == request.prompt_rows else len(request.decode_rows)
    return request.prompt > len(request.prompt_rows) or request.decodes > rows


def _feed(found: Pass, request: _Request, count: int) -> None:
    found.tokens += [request.row(place) for place in range(request.fed, request.fed + count)]
    found.owners += [request.number] * count
    found.batch += 1
    request.fed += count
    found.context = max(found.context, request.past + request.fed)
    if request.begun < 0:
        request.begun = found.number
    if not request.is_prefilling:
        found.members.append(request.number)
        request.tokens.append(found.number)

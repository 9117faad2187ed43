"""What `verify --arrivals` serves in each repeat, and what it keeps to calibrate on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..simulator.arrivals import Arrivals
from ..simulator.commands.arrival_options import ArrivalOptions
from ..tracer.generate import Prompt
from .deploy import RunRequest
from .serving import Load
from .serving_deploy import queue_of, requests_of
from .trial import divide, numbered

_MANY = 100


class Loads:
    """The judged prompts as they arrive in each repeat, and `others` to calibrate on.

    `notes` say what the user may not expect.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        run: RunRequest,
        asked: ArrivalOptions,
        eos_ids: frozenset[int],
        *,
        repeats: int,
    ) -> None:
        self._asked, self._eos_ids, self._repeats = asked, eos_ids, repeats
        self._queue: Arrivals | None = None
        if queue_of(run, asked) is None:
            on, others = divide(prompts)
        else:
            # Whoever is kept for calibration does not come.
            queue = asked.read(len(prompts))
            coming, kept = divide(list(zip(prompts, queue.requests, strict=False)))
            on, others = [prompt for prompt, _ in coming], [prompt for prompt, _ in kept]
            self._queue = replace(queue, requests=tuple(arrival for _, arrival in coming))
        self._prompts, self.others = numbered(on), numbered(others)
        self.max_new_tokens = run.max_new_tokens
        self.settings = asked.settings(self._arrivals(0), run.batch_size)

    def of(self, repeat: int) -> Load:
        """The load of one repeat: poisson arrivals are drawn anew, others are the same."""
        arrivals = self._arrivals(repeat)
        found = requests_of(self._prompts, arrivals, self.settings, self.max_new_tokens)
        return replace(found, eos_ids=self._eos_ids)

    def distinct(self) -> tuple[list[Prompt], list[int]]:
        """Prompts and tokens of the requests up to where they begin anew: what has to be known of them."""
        load = self.of(0)
        has_lengths = self.settings.lengths == "arrivals"
        count = len(load.requests) if has_lengths else len(self._prompts)
        return list(load.requests[:count]), list(load.new_tokens[:count])

    @property
    def description(self) -> str:
        """How requests come."""
        first, last = (self._arrivals(n) for n in (0, self._repeats - 1))
        seed = self._asked.seed or 0
        words = first.description
        if last.description != words:
            last_seed = seed + self._repeats - 1
            words = words.replace(f"seed {seed}", f"seeds {seed} to {last_seed}")
        return f"{words}; {len(first.requests)} requests, at most {self.settings.max_batch} at once"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user may not expect of the load."""
        count = len(self._arrivals(0).requests)
        few = (
            f"{count} requests are few: percentile 99 is the slowest of them. More with --requests."
        )
        kept = (
            f"{len(self.others)} requests of the queue were kept for calibration and did not come; --arrival-speed "
            "makes up for it."
        )
        return (*((few,) if count < _MANY else ()), *((kept,) if self._queue is not None else ()))

    def _arrivals(self, repeat: int) -> Arrivals:
        if self._queue is not None:
            return self._queue
        seeded = replace(self._asked, seed=(self._asked.seed or 0) + repeat)
        return seeded.read(len(self._prompts))

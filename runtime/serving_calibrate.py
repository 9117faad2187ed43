"""Calibration in continuous batches, for forecasts of requests that arrive (`simulate --arrivals`).

Passes there are packed, of few sequences and of many, and prompts share them with generated tokens: rows of full
padded batches say little about them. So every calibration policy serves a closed loop of one user, and one of as many
as run at once, whose requests are of different lengths: they join and leave one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..simulator.account import RunRecord
from ..simulator.arrivals import Arrival, Arrivals
from ..simulator.policy.spec import PolicySpec
from ..simulator.result import MemoryResult
from ..simulator.serving import MAX_STEP_TOKENS, ServingSettings
from ..tracer.generate import Prompt
from .calibrate import Calibration
from .deploy import RunRequest
from .machine import Machine
from .serving import Load, serve

_ALONE = 2
_ROUNDS = 2
_NO_MEMORY = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)


class ServingCalibration(Calibration):
    """Short runs of a machine on some prompts, served as `settings` say, and the cost model they give."""

    def __init__(
        self,
        machine: Machine,
        prompts: Sequence[Prompt],
        *,
        settings: ServingSettings,
        max_new_tokens: int,
    ) -> None:
        super().__init__(
            machine, prompts, batch_size=settings.max_batch, max_new_tokens=max_new_tokens
        )
        self._settings = settings

    def _runs(self, spec: PolicySpec) -> list[RunRecord]:
        return [self._served(spec, 1, _ALONE), self._run(spec)]

    def _run(self, spec: PolicySpec) -> RunRecord:
        users = self._settings.max_batch
        return self._served(spec, users, _ROUNDS * users)

    def _served(self, spec: PolicySpec, users: int, count: int) -> RunRecord:
        load = closed_loop(self._prompts, users, count, self._max_new_tokens, self._settings)
        return serve(self._machine, spec, load, memory=_NO_MEMORY).record


def calibration_of(
    machine: Machine, prompts: Sequence[Prompt], request: RunRequest, *, serves: int | None
) -> Calibration:
    """What measures a machine: in batches as given, or serving at most so many requests. Raises UsageError below 1."""
    if serves is None:
        return Calibration(
            machine, prompts, batch_size=request.batch_size, max_new_tokens=request.max_new_tokens
        )
    most = max(MAX_STEP_TOKENS, serves)
    settings = ServingSettings(max_batch=serves, max_step_tokens=most)
    return ServingCalibration(
        machine, prompts, settings=settings, max_new_tokens=request.max_new_tokens
    )


def closed_loop(
    prompts: Sequence[Prompt],
    users: int,
    count: int,
    max_new_tokens: int,
    settings: ServingSettings,
) -> Load:
    """`count` requests of a closed loop whose lengths are spread over the upper half of `max_new_tokens`."""
    least = max(1, max_new_tokens // 2)
    spread = max(1, max_new_tokens - least + 1)
    chosen = itertools.islice(itertools.cycle(prompts), count)
    return Load(
        requests=[Prompt(number, prompt.token_ids) for number, prompt in enumerate(chosen)],
        new_tokens=[least + 5 * number % spread for number in range(count)],
        arrivals=Arrivals(
            requests=(Arrival(0.0),) * count, description=f"closed loop of {users}", users=users
        ),
        settings=settings,
    )

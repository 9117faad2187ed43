"""Calibration in continuous batches, for forecasts of requests that arrive (`simulate --arrivals`).

Passes there are packed, of few sequences and of many, and prompts share them with generated tokens: rows of full
padded batches say little about them. So every calibration policy serves a closed loop of one user, and one of as many
as run at once, whose requests are of different lengths: they join and leave one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..simulator.account import RunRecord
from ..simulator.activations import wave_rows
from ..simulator.arrivals import Arrival, Arrivals
from ..simulator.policy.spec import PolicySpec
from ..simulator.serving import MAX_STEP_TOKENS, ServingSettings
from ..tracer.generate import Prompt, StepObserver
from ..tracer.memory import METERED_PASSES, peaks_of
from ..tracer.types import MemoryPoint
from .calibrate import Calibration, divided
from .deploy import RunRequest
from .machine import Machine
from .serving import NO_MEMORY, Load, ServingLoop, serve

_ALONE = 2
_ROUNDS = 2


class ServingCalibration(Calibration):
    """Short runs of a machine on some prompts, served as `settings` say, and the cost model they give."""

    def __init__(
        self,
        machine: Machine,
        prompts: Sequence[Prompt],
        *,
        settings: ServingSettings,
        max_new_tokens: int,
        slots: int | None = None,
    ) -> None:
        self._settings = settings
        super().__init__(
            machine,
            prompts,
            batch_size=settings.max_batch,
            max_new_tokens=max_new_tokens,
            slots=slots,
        )

    def _memory_points(self, specs: Sequence[PolicySpec]) -> tuple[MemoryPoint, ...]:
        users = self._settings.max_batch
        loads = [
            closed_loop(prompts, count, count + 1, 2 * METERED_PASSES, self._settings)
            for prompts, count in (
                ([self._prompts[0], self._prompts[-1]], 1),
                (self._prompts[-users:], users),
            )
        ]
        return tuple(
            point
            for spec in specs
            for load in loads
            for point in _points(self._machine, spec, load)
        )

    def _runs(self, spec: PolicySpec) -> list[RunRecord]:
        return [self._served(spec, 1, _ALONE), self._run(spec)]

    def _run(self, spec: PolicySpec) -> RunRecord:
        users = self._settings.max_batch
        return self._served(spec, users, _ROUNDS * users)

    def _served(self, spec: PolicySpec, users: int, count: int) -> RunRecord:
        load = closed_loop(self._prompts, users, count, self._max_new_tokens, self._settings)
        return serve(self._machine, spec, load, memory=NO_MEMORY).record


def _points(machine: Machine, spec: PolicySpec, load: Load) -> list[MemoryPoint]:
    """Peaks of working tensors in all passes of a load, KV cache taken out."""
    shape = machine.loaded.shape
    loops: list[ServingLoop] = []
    with machine.session(spec) as session:

        def run(watch: StepObserver) -> None:
            loop = ServingLoop(machine.loaded, session, load.serving(spec), load, observer=watch)
            loops.append(loop)
            loop.run()

        found = peaks_of(run, machine.device, session)
        rows = wave_rows(session.log, shape.num_moe_layers)
    positions = loops[0].kv_positions
    return [
        MemoryPoint(
            phase=info.phase,
            batch=info.batch,
            tokens=info.tokens,
            context=info.context,
            activation_bytes=max(0, peak - positions[info.step] * shape.kv_bytes_per_token),
            waves=divided(rows.get(info.step, ())),
        )
        for info, peak in found
    ]


def calibration_of(
    machine: Machine,
    prompts: Sequence[Prompt],
    request: RunRequest,
    *,
    serves: int | None,
    slots: int | None = None,
) -> Calibration:
    """What measures a machine: in batches as given, or serving at most so many requests. Raises UsageError below 1."""
    new_tokens = request.max_new_tokens
    if serves is None:
        size = request.batch_size
        return Calibration(
            machine, prompts, batch_size=size, max_new_tokens=new_tokens, slots=slots
        )
    settings = settings_for(serves)
    return ServingCalibration(
        machine, prompts, settings=settings, max_new_tokens=new_tokens, slots=slots
    )


def settings_for(serves: int) -> ServingSettings:
    """How a calibration serves at most so many requests. Raises UsageError below 1."""
    return ServingSettings(max_batch=serves, max_step_tokens=max(MAX_STEP_TOKENS, serves))


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

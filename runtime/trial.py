"""Matched pairs: what `verify` does with any kind of run. Calibrate, predict everything, then measure everything.

How a run is calibrated, predicted and measured is the trial's: batches as given (verify.py), or requests as they arrive
(serving_verify.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np

from ..simulator.forecast import Forecaster
from ..simulator.policy.spec import PolicySpec, make_spec
from ..simulator.result import MemoryResult, Result, VerifiedRun
from ..simulator.workload import Workload
from ..tracer.errors import ResourceError, UsageError
from ..tracer.generate import Prompt
from ..tracer.placement import choose_residency
from .calibrate import Calibration
from .deploy import Prepared
from .forecasts import forecaster_of
from .machine import Machine
from .verdict import QUANTITIES, Pair, Quantity, judge, noise_of

SHARES = (0.25, 0.75)

_T = TypeVar("_T")


@dataclass(slots=True)
class Measured:
    """All repeats of one configuration.

    `again` are second measurements, for the noise; only the control has them. `tolerances` are by repeat and quantity,
    where they are not the usual ones.
    """

    spec: PolicySpec
    predicted: list[Result] = field(default_factory=list)
    measured: list[Result] = field(default_factory=list)
    again: list[Result] = field(default_factory=list)
    tolerances: list[Mapping[str, float]] = field(default_factory=list)
    memory: MemoryResult | None = None

    @property
    def pairs(self) -> list[Pair]:
        """Each prediction with the measurement made after it."""
        return [Pair(*pair) for pair in zip(self.predicted, self.measured, strict=True)]

    @property
    def same_tokens(self) -> bool:
        """Whether every measured run gave the resident model's text."""
        return all(result.same_tokens for result in (*self.measured, *self.again))


class Trial(Protocol):
    """One kind of run, on one machine."""

    def calibrate(
        self, repeat: int, specs: Sequence[PolicySpec], advance: Callable[[int], None]
    ) -> None:
        """Get to know the machine as it is now; the predictions that follow are about these policies."""
        ...

    def predict(self, run: Measured) -> Result:
        """What a configuration will do."""
        ...

    def measure(self, run: Measured) -> Result:
        """What it does."""
        ...


def measure_pairs(
    trial: Trial,
    runs: Sequence[Measured],
    control: Measured,
    repeats: int,
    *,
    say: Callable[[str], None],
    advance: Callable[[int], None],
) -> None:
    """Fill in all repeats of all configurations; the control, one of them, is measured twice in each."""
    for repeat in range(repeats):
        say(f"repeat {repeat + 1} of {repeats}: calibrate, predict, measure")
        trial.calibrate(repeat, [run.spec for run in runs], advance)
        for run in runs:
            run.predicted.append(trial.predict(run))
        for run in runs:
            run.measured.append(trial.measure(run))
            advance(1)
        control.again.append(trial.measure(control))
        advance(1)


def calibrated(
    calibrator: Calibration,
    machine: Machine,
    workload: Workload,
    specs: Sequence[PolicySpec],
    advance: Callable[[int], None],
) -> Forecaster:
    """Predictions for this process as it is now."""
    costs = calibrator.measure(advance)
    if any("cpu_times" in spec.needs() for spec in specs):
        costs = replace(costs, cpu_expert=calibrator.measure_cpu())
    return forecaster_of(
        machine,
        workload,
        costs,
        path_costs=calibrator.measure_paths(costs),
        own_costs=calibrator.measure_own(costs, specs, advance),
    )


def judged(
    runs: Sequence[Measured], control: Measured, quantities: Sequence[Quantity] = QUANTITIES
) -> tuple[list[VerifiedRun], dict[str, float]]:
    """Every configuration with its checks, and the noise of the machine by quantity."""
    noise = noise_of(list(zip(control.measured, control.again, strict=True)), quantities)
    return [
        judge(
            run.spec.label,
            run.pairs,
            run.same_tokens,
            noise,
            is_lossless=run.spec.is_lossless,
            quantities=quantities,
            tolerances=_medians(run.tolerances),
        )
        for run in runs
    ], noise


def _medians(tolerances: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name for found in tolerances for name in found}
    return {name: float(np.median([found[name] for found in tolerances])) for name in names}


def neighbours(spec: PolicySpec, workload: Workload) -> list[PolicySpec]:
    """The policy itself, the on-demand baseline (second), LRU and static placement at its size, itself at others."""
    total = workload.num_layers * workload.num_experts
    popularity = workload.popularity()
    return different(
        [
            spec,
            *(
                make_spec(slots=spec.slots, cache=cache, popularity=popularity)
                for cache in ("none", "lru", "static")
            ),
            *(spec.with_slots(max(1, round(share * total))) for share in SHARES),
        ]
    )


def different(specs: Sequence[PolicySpec]) -> list[PolicySpec]:
    """Each behaviour once, in the order given."""
    unique: dict[str, PolicySpec] = {}
    for one in specs:
        unique.setdefault(one.behaviour_hash(), one)
    return list(unique.values())


def divide(items: Sequence[_T]) -> tuple[list[_T], list[_T]]:
    """Two thirds to judge on and the rest to calibrate on, spread over the file."""
    if len(items) < 2:
        raise UsageError("verify needs at least 2 prompts: some to calibrate on, some to judge.")
    places = set(range(2, len(items), 3)) or {len(items) - 1}
    return (
        [item for place, item in enumerate(items) if place not in places],
        [item for place, item in enumerate(items) if place in places],
    )


def numbered(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts as sequences 0, 1, …"""
    return [replace(prompt, sequence=number) for number, prompt in enumerate(prompts)]


def require_resident(prepared: Prepared) -> None:
    """Raises ResourceError if the resident model does not fit: its text is what all others must equal."""
    if choose_residency("auto", prepared.loaded.shape, prepared.device) == "stream":
        raise ResourceError(
            "verify compares with the resident model's text, and this model does not fit the device. "
            "Use `deploy`, or a device with more memory."
        )


def require_repeats(repeats: int) -> None:
    """Raises UsageError if nothing would be measured."""
    if repeats < 1:
        raise UsageError(f"--repeats must be at least 1, got {repeats}.")

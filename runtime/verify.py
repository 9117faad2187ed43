"""Predicts, runs, compares: does the forecast hold on this machine?

Per repeat: a calibration on other prompts and sizes, then for every judged configuration the prediction and,
after it, the measurement, with the base configuration measured twice as the control for noise. What is
judged is the median over repeats of the pairs (docs/validation.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..simulator.forecast import Forecaster
from ..simulator.policy.spec import PolicyFile, PolicySpec, make_spec
from ..simulator.result import Result, Verdict
from ..simulator.workload import Workload
from ..tracer.generate import Prompt
from .calibrate import Calibration
from .deploy import RunRequest, path_predictor, prepare, same_text, text_change
from .machine import Machine
from .reference import Reference, recording_for, reference_of
from .trial import (
    SHARES,
    Measured,
    calibrated,
    different,
    divide,
    judged,
    measure_pairs,
    neighbours,
    numbered,
    require_repeats,
    require_resident,
)
from .verdict import summarise


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """What `verify` was asked for beside the run itself."""

    run: RunRequest
    repeats: int = 3


def verify(
    policy: PolicyFile,
    request: VerifyRequest,
    *,
    say: Callable[[str], None],
    advance: Callable[[int], None],
) -> Verdict:
    """Judge a policy's forecast, with its neighbours in size and kind. See the module docstring.

    Raises ResourceError if the resident model does not fit: its text is what all others must equal.
    """
    require_repeats(request.repeats)
    run, spec = request.run, policy.behaviour
    prepared = prepare(run, policy)
    require_resident(prepared)
    on, others = map(numbered, divide(prepared.prompts))
    say(
        f"{prepared.loaded.shape.model_id} on {prepared.device}: the resident model's text and routing"
    )
    paths = path_predictor(run.paths, prepared.device, policy.shape)
    recording = recording_for(spec, prepared)

    def traced(prompts: Sequence[Prompt], asks: bool) -> Reference:
        return reference_of(
            prepared,
            prompts,
            batch_size=run.batch_size,
            new_tokens=[run.max_new_tokens] * len(prompts),
            recording=recording,
            paths=paths if asks else None,
        )

    reference, learned = traced(on, asks=True), traced(others, asks=False)
    machine = Machine(
        prepared.loaded,
        prepared.device,
        link=prepared.link,
        tier=prepared.tier,
        pin=run.pin,
        trace_id=policy.trace,
        paths=paths,
    )
    try:
        runs = [Measured(found) for found in configurations(spec, learned.workload)]
        trial = _BatchTrial(machine, run, on, others, reference)
        measure_pairs(trial, runs, runs[1], request.repeats, say=say, advance=advance)
    finally:
        machine.close()
    verified, noise = judged(runs, runs[1])
    emulated = prepared.link.text if prepared.link else ""
    return summarise(verified, noise, emulated_link=emulated)


def configurations(spec: PolicySpec, workload: Workload) -> list[PolicySpec]:
    """The policy itself, the on-demand baseline (second) and its neighbours in size and kind."""
    total = workload.num_layers * workload.num_experts
    popularity = workload.popularity()

    def kind(cache: str, slots: int, predictor: str = "none") -> PolicySpec:
        return make_spec(
            slots=max(1, slots), cache=cache, predictor=predictor, popularity=popularity
        )

    wanted = [
        *neighbours(spec, workload),
        *(kind("lru", round(share * total)) for share in SHARES),
        kind("lfu", round(0.375 * total)),
    ]
    if workload.lookahead:
        wanted.append(kind("lru", spec.slots, "gate_lookahead"))
    return different(wanted)


def count_runs(repeats: int) -> int:
    """Upper bound of timed runs, for the progress bar: calibration, the policy's code, configurations, control."""
    return repeats * (6 + 1 + 10 + 1)


class _BatchTrial:
    """Prompts that are all there, in batches as given (trial.Trial)."""

    def __init__(
        self,
        machine: Machine,
        run: RunRequest,
        on: Sequence[Prompt],
        others: Sequence[Prompt],
        reference: Reference,
    ) -> None:
        self._machine = machine
        self._run = run
        self._on = on
        self._reference = reference
        self._calibrator = Calibration(
            machine, others, batch_size=run.batch_size, max_new_tokens=run.max_new_tokens
        )
        self._forecaster: Forecaster | None = None

    def calibrate(
        self, repeat: int, specs: Sequence[PolicySpec], advance: Callable[[int], None]
    ) -> None:
        self._forecaster = calibrated(
            self._calibrator, self._machine, self._reference.workload, specs, advance
        )

    def predict(self, run: Measured) -> Result:
        assert self._forecaster is not None
        return self._forecaster.predict(run.spec)

    def measure(self, run: Measured) -> Result:
        if run.memory is None:
            run.memory = self._machine.peak_of_run(
                run.spec,
                self._on,
                batch_size=self._run.batch_size,
                max_new_tokens=self._run.max_new_tokens,
            )
        record, outputs = self._machine.run(
            run.spec,
            self._on,
            batch_size=self._run.batch_size,
            max_new_tokens=self._run.max_new_tokens,
            memory=run.memory,
        )
        is_same = same_text(outputs, self._reference.outputs)
        result = self._machine.result(
            record, run.spec, batch_size=self._run.batch_size, same_tokens=is_same
        )
        if run.spec.is_lossless:
            return result
        return replace(result, text=text_change(outputs, self._reference.outputs))

"""`verify --arrivals`: does the forecast of requests served as they arrive hold on this machine?

As in verify.py, with loads in place of batches: the machine is calibrated serving closed loops, the same arrivals are
predicted and then served for real, poisson ones drawn anew in each repeat. Beside speed, hits and memory the times to
the first token and per token are judged, as far as a forecast can tell them (`speed_bands`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..simulator.arrivals import Arrivals
from ..simulator.commands.arrival_options import ArrivalOptions
from ..simulator.forecast import Forecaster
from ..simulator.policy.spec import PolicyFile, PolicySpec
from ..simulator.regroup import require_arrivals
from ..simulator.result import Result, Verdict
from ..simulator.serving import serve as simulated
from ..simulator.token_table import TokenTable
from ..tracer.generate import Prompt
from ..tracer.load import LoadedModel
from .deploy import same_text, text_change
from .machine import Machine
from .reference import Reference, recording_for, reference_of
from .serving import NO_MEMORY, Load, Served, peak_in_passes, result_of, serve
from .serving_calibrate import ServingCalibration
from .serving_deploy import made_up, prepare_queue, resident_again, rounding
from .serving_loads import Loads
from .serving_pack import attention_windows
from .serving_passes import text_in_passes
from .speed_bands import speed_bands
from .trial import (
    Measured,
    calibrated,
    judged,
    measure_pairs,
    neighbours,
    require_repeats,
    require_resident,
)
from .verdict import SERVING_QUANTITIES, summarise
from .verify import VerifyRequest


def verify_arrivals(
    policy: PolicyFile,
    request: VerifyRequest,
    asked: ArrivalOptions,
    *,
    stop_at_eos: bool = False,
    say: Callable[[str], None],
    advance: Callable[[int], None],
) -> Verdict:
    """Judge the forecast of a policy under load, with its neighbours in size and kind. See the module docstring.

    Raises UsageError, InputError for arrivals, policies and models that cannot be served, ResourceError if the
    resident model does not fit: its text is what all others must equal.
    """
    require_repeats(request.repeats)
    run, spec = request.run, policy.behaviour
    require_arrivals(spec)
    # What is wrong there is said before a model is loaded.
    asked.settings(asked.read(1), run.batch_size)
    prepared = prepare_queue(policy, run, asked)
    attention_windows(prepared.loaded.model)
    require_resident(prepared)
    eos_ids = prepared.loaded.eos_ids if stop_at_eos else frozenset[int]()
    loads = Loads(prepared.prompts, run, asked, eos_ids, repeats=request.repeats)
    say(
        f"{prepared.loaded.shape.model_id} on {prepared.device}: the resident model's text and routing"
    )
    ending = replace(prepared, loaded=replace(prepared.loaded, eos_ids=eos_ids))
    recording = recording_for(spec, prepared)

    def traced(prompts: Sequence[Prompt], new_tokens: Sequence[int]) -> Reference:
        return reference_of(
            ending, prompts, batch_size=1, new_tokens=new_tokens, recording=recording
        )

    reference = traced(*loads.distinct())
    learned = traced(loads.others, [run.max_new_tokens] * len(loads.others))
    machine = Machine(
        prepared.loaded,
        prepared.device,
        link=prepared.link,
        tier=prepared.tier,
        pin=run.pin,
        trace_id=policy.trace,
    )
    try:
        runs = [Measured(found) for found in neighbours(spec, learned.workload)]
        trial = _ServingTrial(machine, loads, reference)
        # The policy is its own control: what it keeps up with may be too much for the others.
        measure_pairs(trial, runs, runs[0], request.repeats, say=say, advance=advance)
    finally:
        machine.close()
    settled = trial.settle(runs, lambda: resident_again(machine, run.dtype), say)
    verified, noise = judged(runs, runs[0], SERVING_QUANTITIES)
    return summarise(
        verified,
        noise,
        emulated_link=prepared.link.text if prepared.link else "",
        arrivals=loads.description,
        notes=(*made_up(asked, prepared, loads.of(0)), *loads.notes, *settled),
    )


def count_served(repeats: int) -> int:
    """Upper bound of timed runs, for the progress bar: calibration, the policy's code, configurations, control."""
    return repeats * (6 + 1 + 6 + 1)


@dataclass(frozen=True, slots=True)
class _Dispute:
    """A measured run under a lossless policy whose text is not that of the prompts alone."""

    result: Result
    load: Load
    served: Served
    changed: int


class _ServingTrial:
    """Requests as they arrive (trial.Trial)."""

    def __init__(self, machine: Machine, loads: Loads, reference: Reference) -> None:
        self._machine, self._loads, self._reference = machine, loads, reference
        self._table = TokenTable.of(reference.workload)
        self._settings = replace(loads.settings, lengths="trace")  # they are in the table already
        self._calibrator = ServingCalibration(
            machine, loads.others, settings=loads.settings, max_new_tokens=loads.max_new_tokens
        )
        self._load = loads.of(0)
        self._forecaster: Forecaster | None = None
        self._disputes: list[_Dispute] = []

    def calibrate(
        self, repeat: int, specs: Sequence[PolicySpec], advance: Callable[[int], None]
    ) -> None:
        self._load = self._loads.of(repeat)
        self._forecaster = calibrated(
            self._calibrator, self._machine, self._reference.workload, specs, advance
        )

    def predict(self, run: Measured) -> Result:
        def at(arrivals: Arrivals) -> Result:
            assert self._forecaster is not None
            serving = simulated(self._table, run.spec, arrivals, self._settings)
            return self._forecaster.predict(run.spec, serving=serving, with_bounds=False)

        found = at(self._load.arrivals)
        run.tolerances.append(speed_bands(found, self._load.arrivals, at))
        return found

    def measure(self, run: Measured) -> Result:
        load = self._load
        served = serve(self._machine, run.spec, load, memory=run.memory or NO_MEMORY)
        if run.memory is None:
            run.memory = peak_in_passes(self._machine, run.spec, load, served.passes)
            served = served.with_memory(run.memory)
        alone = self._reference.outputs
        expected = [
            replace(alone[number % len(alone)], sequence=number)
            for number in range(len(load.requests))
        ]
        is_same = same_text(served.outputs, expected)
        result = result_of(self._machine, run.spec, served, same_tokens=is_same)
        change = text_change(served.outputs, expected)
        if not run.spec.is_lossless:
            return replace(result, text=change)
        if not is_same:
            self._disputes.append(_Dispute(result, load, served, change.sequences_changed))
        return result

    def settle(
        self,
        runs: Sequence[Measured],
        resident: Callable[[], LoadedModel],
        say: Callable[[str], None],
    ) -> tuple[str, ...]:
        """Ask the resident model for the text of disputed runs in their very passes; what to say of rounding.

        Where it is the same, runs are corrected.
        """
        if not self._disputes:
            return ()
        say("Text differs from that of prompts run alone: the resident model runs the same passes")
        loaded = resident()
        sound: list[_Dispute] = []
        for one in self._disputes:
            found = text_in_passes(loaded, one.load.requests, one.served.passes)
            if same_text(one.served.outputs, found):
                sound.append(one)
        for results in (results for run in runs for results in (run.measured, run.again)):
            for place, result in enumerate(results):
                if any(result is one.result for one in sound):
                    results[place] = replace(result, same_tokens=True)
        requests = sum(len(one.load.requests) for one in sound)
        return (rounding(sum(one.changed for one in sound), requests),) if sound else ()

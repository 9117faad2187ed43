"""Predicts, runs, compares: does the forecast hold on this machine?

Per repeat: a calibration on other prompts and sizes, then for every judged configuration the prediction and,
after it, the measurement, with the base configuration measured twice as the control for noise. What is
judged is the median over repeats of the pairs (docs/validation.md).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ..simulator.policy.spec import PolicyFile, PolicySpec, make_spec
from ..simulator.result import MemoryResult, Result, Verdict
from ..simulator.workload import Workload, workload_of
from ..tracer.errors import ResourceError, UsageError
from ..tracer.generate import Generated, Prompt
from ..tracer.link import measure_link
from ..tracer.placement import choose_residency, hardware_profile
from ..tracer.probe import machine_name, provenance
from ..tracer.prompts import PromptText
from ..tracer.record import Recorder, Recording, ResidentExperts, record_run
from ..tracer.store import Trace
from ..tracer.tracing import recorded_names
from ..tracer.types import RunSettings
from ..tracer.writer import TraceWriter
from .calibrate import Calibration
from .deploy import Prepared, RunRequest, path_predictor, prepare, same_text, text_change
from .forecasts import forecaster_of
from .machine import Machine
from .paths.data import routed
from .paths.model import PathModel
from .paths.predict import path_table
from .verdict import Pair, judge, noise_of, summarise

SHARES = (0.25, 0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """What `verify` was asked for beside the run itself."""

    run: RunRequest
    repeats: int = 3


@dataclass(slots=True)
class _Reference:
    """What the resident model gave: the text and its routing."""

    outputs: list[Generated]
    workload: Workload


@dataclass(slots=True)
class _Measured:
    """All repeats of one configuration."""

    spec: PolicySpec
    pairs: list[Pair] = field(default_factory=list)
    same_tokens: bool = True
    memory: MemoryResult | None = None


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
    if request.repeats < 1:
        raise UsageError(f"--repeats must be at least 1, got {request.repeats}.")
    prepared = prepare(request.run, policy)
    _require_resident(prepared)
    judged, calibration = _divide(prepared.prompts)
    say(
        f"{prepared.loaded.shape.model_id} on {prepared.device}: the resident model's text and routing"
    )
    has_gates = all(layer.gate is not None for layer in prepared.loaded.layers)
    depth = max(1, policy.behaviour.lookahead_depth) if has_gates else 0
    paths = path_predictor(request.run.paths, prepared.device, policy.shape)
    # Another routing is predicted from what the gates gave all experts.
    scores = policy.shape.num_experts if policy.behaviour.reroutes else 0
    reference = _reference(prepared, judged, request.run, depth, paths, scores)
    learned = _reference(prepared, calibration, request.run, depth)
    machine = Machine(
        prepared.loaded,
        prepared.device,
        link=prepared.link,
        tier=prepared.tier,
        pin=request.run.pin,
        trace_id=policy.trace,
        paths=paths,
    )
    try:
        specs = configurations(policy.behaviour, learned.workload)
        runs = [_Measured(spec) for spec in specs]
        trial = _Trial(machine, request, judged, calibration, reference)
        controls: list[tuple[Result, Result]] = []
        for repeat in range(request.repeats):
            say(f"repeat {repeat + 1} of {request.repeats}: calibrate, predict, measure")
            controls.append(trial.repeat(runs, advance))
    finally:
        machine.close()
    return _verdict(runs, controls, prepared)


def configurations(spec: PolicySpec, workload: Workload) -> list[PolicySpec]:
    """The policy itself, the on-demand baseline (second) and its neighbours in size and kind."""
    total = workload.num_layers * workload.num_experts
    popularity = workload.popularity()

    def kind(cache: str, slots: int, predictor: str = "none") -> PolicySpec:
        return make_spec(
            slots=max(1, slots), cache=cache, predictor=predictor, popularity=popularity
        )

    wanted = [
        spec,
        kind("none", spec.slots),
        kind("lru", spec.slots),
        kind("static", spec.slots),
        *(spec.with_slots(max(1, round(share * total))) for share in SHARES),
        *(kind("lru", round(share * total)) for share in SHARES),
        kind("lfu", round(0.375 * total)),
    ]
    if workload.lookahead:
        wanted.append(kind("lru", spec.slots, "gate_lookahead"))
    unique: dict[str, PolicySpec] = {}
    for one in wanted:
        unique.setdefault(one.behaviour_hash(), one)
    return list(unique.values())


def count_runs(repeats: int) -> int:
    """Upper bound of timed runs, for the progress bar: calibration, the policy's code, configurations, control."""
    return repeats * (6 + 1 + 10 + 1)


class _Trial:
    """The measuring side of `verify`."""

    def __init__(
        self,
        machine: Machine,
        request: VerifyRequest,
        judged: Sequence[Prompt],
        calibration: Sequence[Prompt],
        reference: _Reference,
    ) -> None:
        self._machine = machine
        self._run = request.run
        self._judged = judged
        self._reference = reference
        self._calibrator = Calibration(
            machine,
            calibration,
            batch_size=request.run.batch_size,
            max_new_tokens=request.run.max_new_tokens,
        )

    def repeat(
        self, runs: Sequence[_Measured], advance: Callable[[int], None]
    ) -> tuple[Result, Result]:
        """One round of pairs. Returns the base configuration's two measurements, for the noise."""
        costs = self._calibrator.measure(advance)
        if any("cpu_times" in run.spec.needs() for run in runs):
            costs = replace(costs, cpu_expert=self._calibrator.measure_cpu())
        forecaster = forecaster_of(
            self._machine,
            self._reference.workload,
            costs,
            path_costs=self._calibrator.measure_paths(costs),
            own_costs=self._calibrator.measure_own(costs, [run.spec for run in runs], advance),
        )
        predicted = [forecaster.predict(run.spec) for run in runs]
        base: list[Result] = []
        for run, forecast in zip(runs, predicted, strict=True):
            measured = self._measure(run)
            run.pairs.append(Pair(forecast, measured))
            advance(1)
            if run is runs[1]:
                base.append(measured)
        base.append(self._measure(runs[1]))
        advance(1)
        return base[0], base[1]

    def _measure(self, run: _Measured) -> Result:
        if run.memory is None:
            run.memory = self._machine.peak_memory(run.spec, self._judged, self._run.batch_size)
        record, outputs = self._machine.run(
            run.spec,
            self._judged,
            batch_size=self._run.batch_size,
            max_new_tokens=self._run.max_new_tokens,
            memory=run.memory,
        )
        is_same = same_text(outputs, self._reference.outputs)
        run.same_tokens = run.same_tokens and is_same
        result = self._machine.result(
            record, run.spec, batch_size=self._run.batch_size, same_tokens=is_same
        )
        if run.spec.is_lossless:
            return result
        return replace(result, text=text_change(outputs, self._reference.outputs))


def _reference(
    prepared: Prepared,
    prompts: Sequence[Prompt],
    run: RunRequest,
    lookahead: int,
    paths: PathModel | None = None,
    scores: int = 0,
) -> _Reference:
    """Trace the resident model in place: its text is the standard, its routing the workload."""
    loaded, device = prepared.loaded, prepared.device
    loaded.model.to(device)
    numbered = [replace(prompt, sequence=number) for number, prompt in enumerate(prompts)]
    texts = [PromptText(str(prompt.sequence), "", "") for prompt in numbered]
    recording = Recording(lookahead=lookahead, weights=scores > 0, scores=scores)
    with tempfile.TemporaryDirectory(prefix="expertflow-verify-") as folder:
        out = Path(folder) / "trace"
        recorder = Recorder(loaded, None, device, recording)
        link = measure_link(
            device, recorder.timer.now, block_bytes=loaded.shape.expert_bytes, repeats=3
        )
        with TraceWriter(
            out,
            shape=loaded.shape,
            hardware=hardware_profile(
                device, link, torch.get_num_threads(), machine_name(str(device))
            ),
            run=RunSettings(
                batch_size=run.batch_size,
                max_new_tokens=run.max_new_tokens,
                residency="resident",
                experts_implementation=loaded.implementation,
                lookahead=recording.lookahead,
            ),
            provenance=provenance(0, "own-generation"),
            recorded=recorded_names(recording),
        ) as writer:
            recorder = Recorder(loaded, writer, device, recording)
            outputs = record_run(
                recorder,
                numbered,
                texts,
                batch_size=run.batch_size,
                max_new_tokens=run.max_new_tokens,
                make=lambda layer: ResidentExperts(recorder, layer),
                advance=lambda tokens: None,
            )
            recorder.write()
            writer.close()
        trace = Trace.open(out)
        workload = workload_of(trace)
        if paths is not None:
            found = routed(trace)
            everybody = np.arange(len(found.number))
            most = 2 * loaded.shape.top_k
            workload = workload.with_paths(path_table(paths, found, everybody, most))
    return _Reference(outputs, workload)


def _divide(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Judge on two thirds of the prompts, calibrate on the rest, spread over the file."""
    if len(prompts) < 2:
        raise UsageError("verify needs at least 2 prompts: some to calibrate on, some to judge.")
    calibration = [prompt for place, prompt in enumerate(prompts) if place % 3 == 2]
    calibration = calibration or [prompts[-1]]
    judged = [prompt for prompt in prompts if prompt not in calibration]
    return (
        [replace(prompt, sequence=number) for number, prompt in enumerate(judged)],
        [replace(prompt, sequence=number) for number, prompt in enumerate(calibration)],
    )


def _require_resident(prepared: Prepared) -> None:
    if choose_residency("auto", prepared.loaded.shape, prepared.device) == "stream":
        raise ResourceError(
            "verify compares with the resident model's text, and this model does not fit the device. "
            "Use `deploy`, or a device with more memory."
        )


def _verdict(
    runs: Sequence[_Measured], controls: Sequence[tuple[Result, Result]], prepared: Prepared
) -> Verdict:
    noise = noise_of(controls)
    verified = [
        judge(
            run.spec.label,
            run.pairs,
            run.same_tokens,
            noise,
            is_lossless=run.spec.is_lossless,
        )
        for run in runs
    ]
    emulated = prepared.link.text if prepared.link else ""
    return summarise(verified, noise, emulated_link=emulated)

"""`deploy --arrivals`: requests served as they arrive, measured, their text compared with that of each prompt alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ..simulator.arrivals import Arrival, Arrivals, queue_times
from ..simulator.commands.arrival_options import ArrivalOptions
from ..simulator.policy.spec import PolicyFile, check_shape
from ..simulator.regroup import require_arrivals
from ..simulator.result import Result
from ..simulator.serving import ServingSettings
from ..tracer.console import Reporter
from ..tracer.errors import UsageError
from ..tracer.generate import Generated, Prompt
from ..tracer.load import LoadedModel, load_model
from .deploy import (
    Prepared,
    RunRequest,
    load,
    prepare,
    reference_text,
    same_text,
    text_change,
)
from .machine import Machine
from .room import check_room
from .run_size import prompts_to_run, served_size
from .serving import Load, Served, result_of, serve
from .serving_pack import attention_windows
from .serving_passes import text_in_passes

_SHOW_EVERY_S = 0.5


class Progress(Protocol):
    """Shows how far a run is (tracer.console.progress)."""

    def __call__(
        self, title: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Reporter]:
        """Begin to show it."""
        ...


def deploy_arrivals(
    policy: PolicyFile,
    request: RunRequest,
    asked: ArrivalOptions,
    *,
    stop_at_eos: bool = False,
    progress: Progress,
    say: Callable[[str], None],
) -> Result:
    """Serve requests under a policy for real and measure it.

    They run to their given lengths, so that passes are those of the forecast; with `stop_at_eos` a request ends at an
    end mark. Raises UsageError, InputError for arrivals, policies and models that cannot be served; ResourceError
    before the model is loaded if it does not fit.
    """
    spec = policy.behaviour
    require_arrivals(spec)
    # What is wrong there is said before a model is loaded.
    asked.settings(asked.read(1), request.batch_size)
    check_room(policy, request, served_size(load_to_come(policy, request, asked)))
    prepared, requested = _prepare(policy, request, asked)
    attention_windows(prepared.loaded.model)
    say(f"{prepared.loaded.shape.model_id} on {prepared.device}: {spec.label}")
    ending = prepared.loaded.eos_ids if stop_at_eos else frozenset[int]()
    wanted = replace(requested, eos_ids=ending)
    reference = alone(prepared, request, wanted, say) if request.check_text else None
    machine = Machine(
        prepared.loaded,
        prepared.device,
        link=prepared.link,
        tier=prepared.tier,
        pin=request.pin,
        trace_id=policy.trace,
    )
    try:
        with progress("serving", len(wanted.requests), "requests") as report:
            served = serve(machine, spec, wanted, watch=_Shown(report, len(wanted.requests)))
        result = result_of(machine, spec, served)
    finally:
        machine.close()
    notes = made_up(asked, prepared, wanted)
    if reference is not None:
        is_same = same_text(served.outputs, reference)
        if not is_same and spec.is_lossless:
            say(
                "Text differs from that of prompts run alone: the resident model runs the same passes"
            )
            is_same = same_text(served.outputs, _resident_text(machine, request, wanted, served))
            changed = text_change(served.outputs, reference).sequences_changed
            notes = (*notes, rounding(changed, len(reference))) if is_same else notes
        result = replace(result, same_tokens=is_same)
        if not spec.is_lossless:
            result = replace(result, text=text_change(served.outputs, reference))
    return replace(result, warnings=(*result.warnings, *notes))


def alone(
    prepared: Prepared, request: RunRequest, wanted: Load, say: Callable[[str], None]
) -> list[Generated] | None:
    """The resident model's own text of each request's prompt, run by itself; None, said aloud, if it does not fit."""
    quiet = replace(prepared, loaded=replace(prepared.loaded, eos_ids=wanted.eos_ids))
    known: dict[tuple[tuple[int, ...], int], Generated] = {}
    for prompt, count in zip(wanted.requests, wanted.new_tokens, strict=True):
        if (prompt.token_ids, count) in known:
            continue
        one = replace(quiet, prompts=[prompt])
        found = reference_text(one, replace(request, batch_size=1, max_new_tokens=count), say)
        if found is None:
            return None
        known[prompt.token_ids, count] = found[0]
    return [
        replace(known[prompt.token_ids, count], sequence=prompt.sequence)
        for prompt, count in zip(wanted.requests, wanted.new_tokens, strict=True)
    ]


def requests_of(
    prompts: Sequence[Prompt], arrivals: Arrivals, settings: ServingSettings, max_new_tokens: int
) -> Load:
    """The i-th request takes the i-th prompt, from the first again after the last.

    Prompts are cut or repeated where lengths are those of the arrivals. Raises UsageError if these have none.
    """
    given = settings.lengths == "arrivals"
    if given and not arrivals.has_lengths:
        raise UsageError(
            f"Arrivals ({arrivals.description}) say nothing about lengths; leave --lengths out, or take arrivals from "
            "a file."
        )
    return Load(
        requests=[
            replace(_fitted(prompt, arrival) if given else prompt, sequence=number)
            for number, (prompt, arrival) in enumerate(
                zip(itertools.cycle(prompts), arrivals.requests, strict=False)
            )
        ],
        new_tokens=[
            (arrival.output_tokens or 1) if given else max_new_tokens
            for arrival in arrivals.requests
        ],
        arrivals=arrivals,
        settings=settings,
    )


def _prepare(
    policy: PolicyFile, request: RunRequest, asked: ArrivalOptions
) -> tuple[Prepared, Load]:
    """The model, and the requests that are to come."""
    prepared = prepare_queue(policy, request, asked)
    arrivals = asked.read(len(prepared.prompts))
    settings = asked.settings(arrivals, request.batch_size)
    return prepared, requests_of(prepared.prompts, arrivals, settings, request.max_new_tokens)


def prepare_queue(policy: PolicyFile, request: RunRequest, asked: ArrivalOptions) -> Prepared:
    """The model and its prompts; those of a queue in order of arrival. Raises ResourceError, PolicyError."""
    queue = queue_of(request, asked)
    if queue is None:
        return prepare(request, policy)
    # Every line is somebody's request, so none is left out.
    name = request.model or policy.shape.model_id
    prepared = load(replace(request, limit=None), name, held_out_from=None)
    check_shape(policy.shape, prepared.loaded.shape)
    return replace(prepared, prompts=_in_order(prepared.prompts, queue))


def load_to_come(policy: PolicyFile, request: RunRequest, asked: ArrivalOptions) -> Load:
    """The requests of a run before its model is loaded: as long as they will be.

    Raises UsageError and InputError for arrivals and prompts, ResourceError without a tokenizer.
    """
    queue, name = queue_of(request, asked), request.model or policy.shape.model_id
    if queue is None:
        prompts = prompts_to_run(request, name, held_out_from=policy)
    else:
        found = prompts_to_run(replace(request, limit=None), name, held_out_from=None)
        prompts = _in_order(found, queue)
    arrivals = asked.read(len(prompts))
    settings = asked.settings(arrivals, request.batch_size)
    return requests_of(prompts, arrivals, settings, request.max_new_tokens)


def _in_order(prompts: Sequence[Prompt], queue: Path) -> list[Prompt]:
    """Prompts of a queue in order of arrival."""
    return [prompts[place] for place in np.argsort(queue_times(queue), kind="stable").tolist()]


def queue_of(request: RunRequest, asked: ArrivalOptions) -> Path | None:
    """The file that holds prompts and their times; None if they come from two places."""
    if request.prompts is None or asked.arrivals is None:
        return None
    same = Path(asked.arrivals).resolve() == request.prompts.resolve()
    return request.prompts if same else None


def _fitted(prompt: Prompt, arrival: Arrival) -> Prompt:
    found = itertools.islice(itertools.cycle(prompt.token_ids), arrival.prompt_tokens or 1)
    return Prompt(prompt.sequence, tuple(found))


def made_up(asked: ArrivalOptions, prepared: Prepared, wanted: Load) -> tuple[str, ...]:
    """What to say of a load whose lengths are not those of its prompts."""
    if asked.lengths != "arrivals":
        return ()
    longest = max((len(prompt.token_ids) for prompt in prepared.prompts), default=0)
    long = sum(len(prompt.token_ids) > longest for prompt in wanted.requests)
    return (
        f"Lengths of requests are those of the arrivals: prompts were cut or repeated to them ({long} of "
        f"{len(wanted.requests)} are longer than any prompt given; repeated text routes more alike than fresh text).",
    )


def _resident_text(
    machine: Machine, request: RunRequest, wanted: Load, served: Served
) -> list[Generated]:
    """The resident model's text in the very passes of a run."""
    return text_in_passes(resident_again(machine, request.dtype), wanted.requests, served.passes)


def resident_again(machine: Machine, dtype: str) -> LoadedModel:
    """The model with all its weights on the device. The machine, which emptied its own, is used up."""
    loaded = load_model(machine.loaded.shape.model_id, device=machine.device, dtype=dtype)
    loaded.model.to(machine.device)
    return loaded


def rounding(changed: int, requests: int) -> str:
    """What to say of requests whose text is the resident model's in the same passes, but not that of prompts alone."""
    return (
        f"{changed} of {requests} requests got another text than their prompts alone: rounding, for the resident "
        "model run in the same passes gives the same. Batches change the last bits, and tokens that are as good as "
        "equal change places."
    )


class _Shown:
    """Tells a reporter how a run goes, now and then: it must not slow the passes down."""

    def __init__(self, report: Reporter, total: int) -> None:
        self._report, self._total = report, total
        self._finished, self._last_s = 0, -_SHOW_EVERY_S

    def __call__(self, finished: int, in_progress: int, waiting: int) -> None:
        now_s = time.monotonic()
        if finished < self._total and now_s - self._last_s < _SHOW_EVERY_S:
            return
        self._last_s = now_s
        self._report.phase(f"{in_progress} at work, {waiting} waiting")
        self._report.advance(finished - self._finished)
        self._finished = finished

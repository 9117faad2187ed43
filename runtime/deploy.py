"""One deployed run: the model under a policy, measured, and its text compared with the resident model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch

from ..simulator.policy.spec import PolicyFile, check_shape
from ..simulator.result import MemoryResult, Result, TextChange
from ..tracer.blocks import Tier
from ..tracer.errors import UsageError
from ..tracer.generate import Generated, Prompt, StepObserver
from ..tracer.images import image_reader
from ..tracer.live import LiveFile, WatchedPasses
from ..tracer.load import LoadedModel, choose_device, load_model
from ..tracer.memory import SilentObserver
from ..tracer.placement import choose_residency, choose_tier, use_threads
from ..tracer.probe import command_line
from ..tracer.prompts import MAX_PROMPT_TOKENS, choose_prompts, read_prompts, tokenize
from ..tracer.quantities import LinkSpec
from ..tracer.records import to_json
from ..tracer.types import ModelShape
from .machine import Machine, Watch, device_name, generate_all
from .paths.files import load_predictor
from .paths.model import PathModel
from .room import check_room
from .run_size import held_out
from .session import Session
from .watch import SessionSums


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What a measured run needs beside its policy.

    `memory` is what the device may hold, as text; None: what it has free. A `machine` file has measured peaks of
    working tensors for the memory plan. `live` is a file that says how the run goes.
    """

    model: str | None = None
    prompts: Path | None = None
    limit: int | None = 12
    batch_size: int = 1
    max_new_tokens: int = 32
    device: str = "auto"
    dtype: str = "auto"
    link: str | None = None
    tier: str = "ram"
    threads: int | None = None
    pin: bool = True
    check_text: bool = True
    paths: Path | None = None
    memory: str | None = None
    machine: Path | None = None
    live: Path | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A loaded model with its prompts, and the resident model's text if it could be had."""

    loaded: LoadedModel
    device: torch.device
    link: LinkSpec | None
    tier: Tier
    prompts: list[Prompt]


def prepare(request: RunRequest, policy: PolicyFile) -> Prepared:
    """Load what a policy was made for and the prompts to run. Raises ResourceError, PolicyError."""
    prepared = load(request, request.model or policy.shape.model_id, held_out_from=policy)
    check_shape(policy.shape, prepared.loaded.shape)
    return prepared


def load(request: RunRequest, model: str, *, held_out_from: PolicyFile | None) -> Prepared:
    """Load a model and its prompts, leaving out those a policy was tuned on."""
    if request.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {request.max_new_tokens}.")
    device = choose_device(request.device)
    tier = choose_tier(request.tier)
    use_threads(request.threads, device)
    link = LinkSpec.parse(request.link) if request.link else None
    texts = read_prompts(request.prompts)
    if held_out_from is not None:
        texts = held_out(texts, held_out_from)
    loaded = load_model(model, device=device, dtype=request.dtype, tier=tier)
    texts = choose_prompts(texts, request.limit)
    images = image_reader(loaded, texts)
    prompts = tokenize(loaded.tokenizer, texts, MAX_PROMPT_TOKENS, images)
    if images is not None:
        images.require_batches(prompts, texts, request.batch_size)
    return Prepared(loaded, device, link, tier, prompts)


def path_predictor(
    folder: Path | None, device: torch.device, shape: ModelShape
) -> PathModel | None:
    """The path predictor in a folder, on a device. Raises InputError, PolicyError if it is for another shape."""
    if folder is None:
        return None
    model, card = load_predictor(folder, device)
    check_shape(card.shape, shape)
    return model


def reference_text(
    prepared: Prepared,
    request: RunRequest,
    say: Callable[[str], None],
    live: LiveFile | None = None,
) -> list[Generated] | None:
    """The resident model's own text; None, said aloud, if it does not fit the device."""
    loaded = prepared.loaded
    if choose_residency("auto", loaded.shape, prepared.device) == "stream":
        say("The resident model does not fit the device; its text is not compared.")
        return None
    loaded.model.to(prepared.device)
    if live is not None:
        live.phase("the resident model's text", len(prepared.prompts) * request.max_new_tokens)
    return generate_all(
        loaded,
        prepared.prompts,
        batch_size=request.batch_size,
        max_new_tokens=request.max_new_tokens,
        observer=None if live is None else WatchedPasses(SilentObserver(), live),
    )


def same_text(one: Sequence[Generated], other: Sequence[Generated]) -> bool:
    """Whether every sequence has the same tokens."""
    return [g.token_ids for g in one] == [g.token_ids for g in other]


def text_change(one: Sequence[Generated], resident: Sequence[Generated]) -> TextChange:
    """How far a lossy run's text went from the resident model's."""
    others = {g.sequence: g.token_ids for g in one}
    pairs = [(others.get(g.sequence, []), g.token_ids) for g in resident]
    return TextChange(
        sequences=len(pairs),
        sequences_changed=sum(mine != theirs for mine, theirs in pairs),
        tokens=sum(max(len(mine), len(theirs)) for mine, theirs in pairs),
        tokens_changed=sum(a != b for mine, theirs in pairs for a, b in zip_longest(mine, theirs)),
    )


def deploy(policy: PolicyFile, request: RunRequest, *, say: Callable[[str], None]) -> Result:
    """Run a policy for real and measure it. Raises ResourceError before the model is loaded if it does not fit."""
    check_room(policy, request)
    with LiveFile(request.live, "deploy", command_line()) as live:
        return _deployed(policy, request, say, live)


def _deployed(
    policy: PolicyFile, request: RunRequest, say: Callable[[str], None], live: LiveFile
) -> Result:
    prepared = prepare(request, policy)
    spec = policy.behaviour
    say(f"{prepared.loaded.shape.model_id} on {prepared.device}: {spec.label}")
    live.tell(model_id=policy.shape.model_id, device=device_name(prepared.device), label=spec.label)
    reference = reference_text(prepared, request, say, live) if request.check_text else None
    machine = Machine(
        prepared.loaded,
        prepared.device,
        link=prepared.link,
        tier=prepared.tier,
        pin=request.pin,
        trace_id=policy.trace,
        paths=path_predictor(request.paths, prepared.device, policy.shape),
    )
    live.tell(link=machine.link_name, link_origin=machine.link_origin)
    live.phase("warming up and measuring memory")
    machine.watch = _watch(live, len(prepared.prompts) * request.max_new_tokens)
    try:
        record, outputs = machine.run(
            spec,
            prepared.prompts,
            batch_size=request.batch_size,
            max_new_tokens=request.max_new_tokens,
        )
        is_same = same_text(outputs, reference) if reference is not None else None
        result = machine.result(record, spec, batch_size=request.batch_size, same_tokens=is_same)
        if reference is None or spec.is_lossless:
            return result
        return replace(result, text=text_change(outputs, reference))
    finally:
        machine.close()


def _watch(live: LiveFile, most_tokens: int) -> Watch:
    """Tells a live file of the timed run: its memory when it begins, then its passes."""

    def begin(session: Session, memory: MemoryResult) -> StepObserver:
        live.tell(memory={name: size for name, size in to_json(memory).items() if size})
        sums = SessionSums(session)
        live.phase("running under the policy", most_tokens, sums)
        return WatchedPasses(session, live, after=sums)

    return begin

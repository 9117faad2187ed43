"""One traced run from request to folder: load, measure the link, generate, measure memory, publish."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from .blocks import BlockLayout, HostBlocks, SlotArena
from .console import Reporter
from .errors import UsageError
from .generate import Generated, Prompt, greedy
from .hooks import installed
from .images import image_reader
from .kernels import measure_group_s
from .link import link_name, measure_link
from .live import LiveFile, LiveReporter, live_path
from .load import LoadedModel, choose_device, load_model
from .memory import SilentObserver, measure_memory, spread_by_size
from .placement import choose_residency, hardware_profile, use_threads
from .probe import command_line, machine_name, provenance
from .prompts import (
    MAX_PROMPT_TOKENS,
    PromptText,
    as_chat,
    batches,
    choose_prompts,
    is_teacher_forced,
    labelled,
    read_prompts,
    teacher_forced,
    tokenize,
)
from .quantities import LinkSpec, format_bytes, format_seconds
from .record import Recorder, Recording, ResidentExperts, record_run, stream_handlers
from .resume import (
    Identity,
    Resumed,
    go_on,
    has_begun,
    held,
    identity_of,
    prompts_sha256,
    require_same,
    weights_sha256,
)
from .schema import Manifest
from .store import Trace
from .types import HardwareProfile, MemoryPoint, RunSettings
from .unfinished import is_complete, read_header
from .writer import Header, TraceWriter, partial_path, publish

MAX_LOOKAHEAD = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """What `expertflow-trace run` was asked for."""

    out: Path
    model: str = "embedded"
    prompts: Path | None = None
    limit: int | None = None
    batch_size: int = 1
    max_new_tokens: int = 32
    device: str = "auto"
    dtype: str = "auto"
    residency: str = "auto"
    link: str | None = None
    lookahead: int = 1
    revision: str | None = None
    threads: int | None = None
    store_text: bool = False
    redact: bool = False
    overwrite: bool = False
    resume: bool = False
    chat: bool = False
    teacher_forced: bool | None = None
    scores: int = 0
    seed: int = 0


ProgressMaker = Callable[..., AbstractContextManager[Reporter]]


def trace_run(
    request: TraceRequest, *, progress: ProgressMaker, say: Callable[[str], None]
) -> tuple[Manifest, dict[str, Any]]:
    """Trace one run. Returns the manifest and a summary for people.

    Raises UsageError, InputError, ResourceError; an interrupted run leaves `<out>.partial`.
    """
    _check(request)
    run = _prepared(request)
    done = _complete(run) if request.resume else None
    if done is not None:
        say(f"{request.out} is complete; there is nothing to resume.")
        return done, _summary(done, _generated_tokens(request.out))
    begun = run.begun() if request.resume else None
    if request.resume and begun is None:
        say(f"{partial_path(request.out)} is not there, so the run starts from its beginning.")
    settled = begun.header if begun is not None else run.header(say)
    with (
        TraceWriter(
            request.out,
            shape=settled.shape,
            hardware=settled.hardware,
            run=settled.run,
            provenance=settled.provenance,
            recorded=settled.recorded,
            overwrite=request.overwrite,
            kept=begun.files if begun is not None else None,
        ) as writer,
        held(writer.partial),
        progress("tracing", run.most_tokens) as report,
        LiveFile(live_path(request.out), "run", command_line()) as live,
    ):
        if begun is not None:
            say(f"Going on with batch {begun.batches}, after {begun.sequences} sequences.")
            report.advance(begun.generated)
        live.tell(**run.told(settled.hardware))
        outputs, memory = run.record(writer, LiveReporter(report, live), begun, live)
        manifest = writer.close(
            memory=memory, warnings=[*_warnings(settled.hardware), *run.loaded.notes]
        )
    generated = sum(len(one.token_ids) for one in outputs)
    return manifest, _summary(manifest, generated + (begun.generated if begun else 0))


def _prepared(request: TraceRequest) -> _TracedRun:
    texts = choose_prompts(read_prompts(request.prompts), request.limit)
    texts = labelled(as_chat(texts) if request.chat else texts)
    link = LinkSpec.parse(request.link) if request.link else None
    device = choose_device(request.device)
    threads = use_threads(request.threads, device)
    torch.manual_seed(request.seed)
    loaded = load_model(
        request.model, device=device, dtype=request.dtype, revision=request.revision
    )
    is_forced = is_teacher_forced(texts, request.teacher_forced)
    images = image_reader(loaded, texts)
    if is_forced:
        prompts = teacher_forced(
            loaded.tokenizer, texts, MAX_PROMPT_TOKENS, request.max_new_tokens, images
        )
    else:
        prompts = tokenize(loaded.tokenizer, texts, MAX_PROMPT_TOKENS, images)
    if images is not None:
        images.require_batches(prompts, texts, request.batch_size)
        loaded = replace(loaded, modalities=images.modalities)
    recording = Recording(
        lookahead=min(request.lookahead, loaded.max_lookahead),
        token_ids=not request.redact,
        text=request.store_text,
        template=any(text.template for text in texts),
        scores=_scores(request.scores, loaded),
    )
    wanted = request.residency
    if request.resume and wanted == "auto" and has_begun(partial_path(request.out)):
        wanted = read_header(partial_path(request.out)).run.residency
    residency = choose_residency(wanted, loaded.shape, device)
    return _TracedRun(
        request, loaded, device, threads, residency, prompts, texts, recording, link, is_forced
    )


def _complete(run: _TracedRun) -> Manifest | None:
    """The finished trace that `--resume` finds, or the one that only had to be moved into place."""
    out, partial = run.request.out, partial_path(run.request.out)
    if partial.is_dir() and is_complete(partial):
        if out.exists() and not run.request.overwrite:
            raise UsageError(f"{out} exists. Choose another name, or pass --overwrite.")
        publish(partial, out)
    elif partial.exists() or not out.exists():
        return None
    manifest = Trace.open(out).manifest
    before = Header(
        shape=manifest.shape,
        hardware=manifest.hardware,
        run=manifest.run,
        provenance=manifest.provenance,
        recorded=manifest.recorded,
    )
    require_same(out, identity_of(before), run.identity())
    return manifest


@dataclass(slots=True)
class _TracedRun:
    """The parts of one run that both ways of living share."""

    request: TraceRequest
    loaded: LoadedModel
    device: torch.device
    threads: int
    residency: Literal["resident", "stream"]
    prompts: list[Prompt]
    texts: list[PromptText]
    recording: Recording
    link: LinkSpec | None
    is_forced: bool

    @property
    def most_tokens(self) -> int:
        """Tokens generated if no sequence ends early."""
        return len(self.prompts) * self.request.max_new_tokens

    @property
    def stream_slots(self) -> int:
        """Room for two tokens' experts: enough for decode, and waves show in prefill."""
        return min(self.loaded.shape.num_experts, 2 * self.loaded.shape.top_k)

    def identity(self) -> Identity:
        """What this run is, known before anything is measured."""
        extra = {
            "prompts_sha256": prompts_sha256(self.texts, self.prompts),
            "weights_sha256": weights_sha256(self.loaded.model),
        }
        if self.residency == "stream":
            extra["slots"] = str(self.stream_slots)
        return Identity(
            shape=self.loaded.shape,
            run=RunSettings(
                batch_size=self.request.batch_size,
                max_new_tokens=self.request.max_new_tokens,
                residency=self.residency,
                experts_implementation=self.loaded.implementation,
                lookahead=self.recording.lookahead,
                extra=extra,
            ),
            recorded=recorded_names(self.recording),
            provenance=provenance(
                self.request.seed, "teacher-forced" if self.is_forced else "own-generation"
            ),
            device=str(self.device),
            machine=machine_name(str(self.device)),
            threads=self.threads,
            link=self.link.text if self.link else link_name(self.device),
        )

    def begun(self) -> Resumed | None:
        """What a run of the same kind left, cut back to its whole batches; None if there is nothing.

        Raises UsageError if it was another run, or is still going.
        """
        partial = partial_path(self.request.out)
        if not has_begun(partial):
            if partial.is_dir() and not any(partial.iterdir()):
                partial.rmdir()  # killed before it wrote a word
            return None
        with held(partial):
            require_same(partial, identity_of(read_header(partial)), self.identity())
            return go_on(partial)

    def header(self, say: Callable[[str], None]) -> Header:
        """What this run is, and the machine as measured now."""
        own = self.identity()
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        say(
            f"{own.shape.model_id} on {self.device}, {self.residency}, {threads}; measuring the link"
        )
        return Header(
            shape=own.shape,
            hardware=self.profile(),
            run=own.run,
            provenance=own.provenance,
            recorded=own.recorded,
        )

    def told(self, hardware: HardwareProfile) -> dict[str, object]:
        """What a live file says of the run before it begins; the KV cache is the most that it can take."""
        shape = self.loaded.shape
        is_resident = self.residency == "resident"
        longest = max(
            len(batch) * max(len(prompt.token_ids) for prompt in batch)
            + len(batch) * self.request.max_new_tokens
            for batch in batches(self.prompts, self.request.batch_size)
        )
        return {
            "model_id": shape.model_id,
            "device": f"{hardware.name} ({hardware.device})",
            "label": "resident" if is_resident else "experts streamed one by one",
            "link": hardware.link.name,
            "link_origin": hardware.link.origin,
            "memory": {
                "non_expert_weights": shape.non_expert_bytes,
                "experts": shape.expert_bytes
                * (shape.total_experts if is_resident else self.stream_slots),
                "kv_cache": shape.kv_bytes_per_token * longest,
            },
        }

    def record(
        self, writer: TraceWriter, report: Reporter, begun: Resumed | None, live: LiveFile
    ) -> tuple[list[Generated], list[MemoryPoint]]:
        """Run what is left of the prompts. What was recorded reaches the writer even if it is cut off."""
        way = self.resident if self.residency == "resident" else self.stream
        return way(writer, report, begun, live)

    def profile(self) -> HardwareProfile:
        measured = measure_link(
            self.device,
            time.perf_counter,
            block_bytes=self.loaded.shape.expert_bytes,
            link=self.link,
        )
        first = self.loaded.layers[0]
        group_s = measure_group_s(
            first,
            BlockLayout.of(first),
            self.loaded.shape,
            self.device,
            self.loaded.implementation,
        )
        name = machine_name(str(self.device))
        return hardware_profile(self.device, measured, self.threads, name, group_s)

    def resident(
        self, writer: TraceWriter, report: Reporter, begun: Resumed | None, live: LiveFile
    ) -> tuple[list[Generated], list[MemoryPoint]]:
        """The model as it is, stock experts timed in place."""
        self.loaded.model.to(self.device)
        self._warm_up()
        recorder = self._recorder(writer, begun)
        outputs = self._record(
            recorder, report, lambda la: ResidentExperts(recorder, la), begun, live
        )
        report.phase("measuring memory")
        return outputs, measure_memory(self.loaded, self._memory_batches(), self.device)

    def stream(
        self, writer: TraceWriter, report: Reporter, begun: Resumed | None, live: LiveFile
    ) -> tuple[list[Generated], list[MemoryPoint]]:
        """Experts on the host, loaded on demand, each copy timed."""
        loaded = self.loaded
        blocks = HostBlocks(loaded.layers, pin=self.device.type == "cuda")
        loaded.model.to(self.device)
        arena = SlotArena(blocks.layout, self.stream_slots, self.device)
        recorder = self._recorder(writer, begun)
        make = stream_handlers(recorder, blocks, arena, self.device, self.link)
        try:
            outputs = self._record(recorder, report, make, begun, live)
            report.phase("measuring memory")
            scratch = Recorder(loaded, None, self.device, self.recording)
            make = stream_handlers(scratch, blocks, arena, self.device, self.link)
            with installed(loaded.model, loaded.layers, make):
                memory = measure_memory(
                    loaded, self._memory_batches(), self.device, observer=scratch
                )
            assert scratch.engine is not None
            scratch.engine.close()
        finally:
            if recorder.engine is not None:
                recorder.engine.close()
            blocks.close()
        return outputs, memory

    def _recorder(self, writer: TraceWriter, begun: Resumed | None) -> Recorder:
        """A recorder that goes on counting, and on the same clock, where the run was cut off."""
        recorder = Recorder(self.loaded, writer, self.device, self.recording)
        if begun is not None:
            recorder.timer.origin -= begun.clock_s
            recorder.transfers = begun.transfers
        return recorder

    def _record(
        self,
        recorder: Recorder,
        report: Reporter,
        make: Any,
        begun: Resumed | None,
        live: LiveFile,
    ) -> list[Generated]:
        live.phase("tracing", self.most_tokens, recorder.seen)
        if begun is not None:
            live.resumed(begun.generated)
        try:
            return record_run(
                recorder,
                self.prompts,
                self.texts,
                batch_size=self.request.batch_size,
                max_new_tokens=self.request.max_new_tokens,
                make=make,
                advance=report.advance,
                first_batch=begun.batches if begun else 0,
                first_step=begun.steps if begun else 0,
                live=live,
            )
        finally:
            recorder.write()

    def _memory_batches(self) -> list[Any]:
        return spread_by_size(list(batches(self.prompts, self.request.batch_size)), 3)

    def _warm_up(self) -> None:
        """First passes compile kernels and fault pages in; they are no part of the run."""
        greedy(
            self.loaded.model,
            self.prompts[: self.request.batch_size],
            max_new_tokens=4,
            eos_ids=frozenset(),
            pad_id=self.loaded.pad_id,
            first_step=0,
            observer=SilentObserver(),
        )


def _check(request: TraceRequest) -> None:
    if not 0 <= request.lookahead <= MAX_LOOKAHEAD:
        raise UsageError(f"--lookahead must lie between 0 and 3, got {request.lookahead}.")
    if request.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {request.max_new_tokens}.")
    if request.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {request.batch_size}.")
    if request.out.exists() and not (request.resume or request.overwrite):
        raise UsageError(f"{request.out} exists. Choose another name, or pass --overwrite.")


def _scores(most: int, loaded: LoadedModel) -> int:
    shape = loaded.shape
    if most and not shape.top_k <= most <= shape.num_experts:
        raise UsageError(
            f"--scores must be 0 or lie between the model's top-k and its experts, {shape.top_k} and "
            f"{shape.num_experts}, got {most}."
        )
    return most


def recorded_names(recording: Recording) -> tuple[str, ...]:
    """What a manifest says was recorded."""
    names = ["routing", "steps", "transfers"]
    names += [f"lookahead_{depth}" for depth in range(1, recording.lookahead + 1)]
    if recording.weights:
        names.append("weights")
    if recording.token_ids:
        names.append("token_ids")
    if recording.text:
        names.append("text")
    if recording.scores:
        names.append(f"scores_{recording.scores}")
    if recording.template:
        names.append("template")
    return tuple(names)


def _warnings(profile: HardwareProfile) -> list[str]:
    spread = max(curve.spread for curve in profile.link.curves if not curve.busy)
    if spread <= 0.5:
        return []
    return [
        f"The link's timings scatter by {spread:.0%} (interquartile range over median): the machine is "
        "busy, and forecasts from this trace will be rough. Trace again on a quiet machine."
    ]


def _generated_tokens(out: Path) -> int:
    return sum(Trace.open(out).table("sequences", ["generated_tokens"])[0].to_pylist())


def _summary(manifest: Manifest, generated: int) -> dict[str, Any]:
    profile = manifest.hardware
    curve = profile.link.curve(pinned=profile.device.startswith("cuda"), busy=False)
    copy_s = curve.copy_s(manifest.shape.expert_bytes)
    return {
        "trace_id": manifest.trace_id,
        "model": manifest.shape.model_id,
        "device": f"{profile.name} ({profile.device})",
        "residency": manifest.run.residency,
        "text": manifest.provenance.text,
        "sequences": manifest.rows("sequences"),
        "generated_tokens": generated,
        "routing_rows": manifest.rows("routing"),
        "expert": format_bytes(manifest.shape.expert_bytes),
        "copy_of_one_expert": f"{format_seconds(copy_s)} ({profile.link.origin} link: "
        f"{profile.link.name})",
    }

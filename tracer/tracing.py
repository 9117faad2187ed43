"""One traced run from request to folder: load, measure the link, generate, measure memory, publish."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .blocks import BlockLayout, HostBlocks, SlotArena
from .console import Reporter
from .errors import UsageError
from .generate import Generated, Prompt, greedy
from .hooks import installed
from .kernels import measure_group_s
from .link import measure_link
from .load import LoadedModel, choose_device, load_model
from .memory import SilentObserver, measure_memory, spread_by_size
from .placement import choose_residency, hardware_profile, use_threads
from .probe import machine_name, provenance
from .prompts import MAX_PROMPT_TOKENS, PromptText, batches, choose_prompts, read_prompts, tokenize
from .quantities import LinkSpec, format_bytes, format_seconds
from .record import Recorder, Recording, ResidentExperts, record_run, stream_handlers
from .schema import Manifest
from .types import HardwareProfile, MemoryPoint, RunSettings
from .writer import TraceWriter

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
    seed: int = 0


ProgressMaker = Callable[..., AbstractContextManager[Reporter]]


def trace_run(
    request: TraceRequest, *, progress: ProgressMaker, say: Callable[[str], None]
) -> tuple[Manifest, dict[str, Any]]:
    """Trace one run. Returns the manifest and a summary for people.

    Raises UsageError, InputError, ResourceError; an interrupted run leaves `<out>.partial`.
    """
    _check(request)
    texts = choose_prompts(read_prompts(request.prompts), request.limit)
    link = LinkSpec.parse(request.link) if request.link else None
    device = choose_device(request.device)
    threads = use_threads(request.threads, device)
    torch.manual_seed(request.seed)
    loaded = load_model(
        request.model, device=device, dtype=request.dtype, revision=request.revision
    )
    prompts = tokenize(loaded.tokenizer, texts, MAX_PROMPT_TOKENS)
    residency = choose_residency(request.residency, loaded.shape, device)
    say(f"{loaded.shape.model_id} on {device}, {residency}, {threads} threads; measuring the link")
    recording = Recording(
        lookahead=min(request.lookahead, loaded.shape.num_moe_layers - 1),
        token_ids=not request.redact,
        text=request.store_text,
    )
    run = _TracedRun(request, loaded, device, prompts, texts, recording, link)
    profile = run.profile(threads)
    with (
        TraceWriter(
            request.out,
            shape=loaded.shape,
            hardware=profile,
            run=RunSettings(
                batch_size=request.batch_size,
                max_new_tokens=request.max_new_tokens,
                residency=residency,
                experts_implementation=loaded.implementation,
                lookahead=recording.lookahead,
                extra={} if residency == "resident" else {"slots": str(run.stream_slots)},
            ),
            provenance=provenance(request.seed, "own-generation"),
            recorded=recorded_names(recording),
            overwrite=request.overwrite,
        ) as writer,
        progress("tracing", len(prompts) * request.max_new_tokens) as report,
    ):
        if residency == "resident":
            outputs, memory = run.resident(writer, report)
        else:
            outputs, memory = run.stream(writer, report)
        warnings = _warnings(profile)
        manifest = writer.close(memory=memory, warnings=warnings)
    return manifest, _summary(manifest, outputs, profile)


@dataclass(slots=True)
class _TracedRun:
    """The parts of one run that both ways of living share."""

    request: TraceRequest
    loaded: LoadedModel
    device: torch.device
    prompts: list[Prompt]
    texts: list[PromptText]
    recording: Recording
    link: LinkSpec | None

    @property
    def stream_slots(self) -> int:
        """Room for two tokens' experts: enough for decode, and waves show in prefill."""
        return min(self.loaded.shape.num_experts, 2 * self.loaded.shape.top_k)

    def profile(self, threads: int) -> HardwareProfile:
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
        return hardware_profile(self.device, measured, threads, name, group_s)

    def resident(
        self, writer: TraceWriter, report: Reporter
    ) -> tuple[list[Generated], list[MemoryPoint]]:
        """The model as it is, stock experts timed in place."""
        self.loaded.model.to(self.device)
        self._warm_up()
        recorder = Recorder(self.loaded, writer, self.device, self.recording)
        outputs = self._record(recorder, writer, report, lambda la: ResidentExperts(recorder, la))
        report.phase("measuring memory")
        return outputs, measure_memory(self.loaded, self._memory_batches(), self.device)

    def stream(
        self, writer: TraceWriter, report: Reporter
    ) -> tuple[list[Generated], list[MemoryPoint]]:
        """Experts on the host, loaded on demand, each copy timed."""
        loaded = self.loaded
        blocks = HostBlocks(loaded.layers, pin=self.device.type == "cuda")
        loaded.model.to(self.device)
        arena = SlotArena(blocks.layout, self.stream_slots, self.device)
        recorder = Recorder(loaded, writer, self.device, self.recording)
        make = stream_handlers(recorder, blocks, arena, self.device, self.link)
        try:
            outputs = self._record(recorder, writer, report, make)
            recorder.write()
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

    def _record(
        self, recorder: Recorder, writer: TraceWriter, report: Reporter, make: Any
    ) -> list[Generated]:
        outputs = record_run(
            recorder,
            self.prompts,
            self.texts,
            writer,
            batch_size=self.request.batch_size,
            max_new_tokens=self.request.max_new_tokens,
            make=make,
            advance=report.advance,
        )
        recorder.write()
        return outputs

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
    return tuple(names)


def _warnings(profile: HardwareProfile) -> list[str]:
    spread = max(curve.spread for curve in profile.link.curves if not curve.busy)
    if spread <= 0.5:
        return []
    return [
        f"The link's timings scatter by {spread:.0%} (interquartile range over median): the machine is "
        "busy, and forecasts from this trace will be rough. Trace again on a quiet machine."
    ]


def _summary(
    manifest: Manifest, outputs: list[Generated], profile: HardwareProfile
) -> dict[str, Any]:
    curve = profile.link.curve(pinned=profile.device.startswith("cuda"), busy=False)
    copy_s = curve.copy_s(manifest.shape.expert_bytes)
    return {
        "trace_id": manifest.trace_id,
        "model": manifest.shape.model_id,
        "device": f"{profile.name} ({profile.device})",
        "residency": manifest.run.residency,
        "sequences": len(outputs),
        "generated_tokens": sum(len(one.token_ids) for one in outputs),
        "routing_rows": manifest.rows("routing"),
        "expert": format_bytes(manifest.shape.expert_bytes),
        "copy_of_one_expert": f"{format_seconds(copy_s)} ({profile.link.origin} link: "
        f"{profile.link.name})",
    }

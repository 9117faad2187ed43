"""Records a real run: routing, step times and transfers of a model that generates text.

Resident: the model runs as it is, with the stock experts function timed in place. Stream: its experts stay
in packed host blocks and cross the link when demanded, each copy timed, so that a model larger than the
device can be traced too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from .blocks import HostBlocks, SlotArena, StandIn
from .copies import Copy, CopyEngine, copy_engine
from .gates import GateTap, ranked
from .generate import Generated, Prompt, StepTokens, greedy
from .hooks import ExpertLayer, gate_choice, install, stock_function
from .live import LiveFile, Seen, WatchedPasses
from .load import LoadedModel
from .prompts import PromptText, batches
from .quantities import LinkSpec
from .routing_rows import RoutingRows, distinct_count
from .schema import STEPS, TRANSFERS, sequences_schema
from .slotwise import SlotCompute, combine
from .timing import StepInfo, StepTimer, step_timer
from .types import ExpertKey
from .writer import TraceWriter

_ROWS_PER_TABLE = 4096
_FLUSH_EVERY_S = 5.0
"""A kill costs at most this much of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What to record beside the chosen experts."""

    lookahead: int = 1
    weights: bool = True
    token_ids: bool = True
    text: bool = False
    scores: int = 0
    """Likeliest experts per token whose gate scores are kept; 0 for none, else at least top_k."""
    template: bool = False


class Recorder:
    """Drives one traced run; without a writer it drops what it sees. Implements StepObserver."""

    def __init__(
        self,
        loaded: LoadedModel,
        writer: TraceWriter | None,
        device: torch.device,
        recording: Recording,
        timer: StepTimer | None = None,
    ) -> None:
        self.loaded = loaded
        self.recording = recording
        self.timer = timer or step_timer(device)
        self._writer = writer
        self.routing = RoutingRows(
            num_experts=loaded.shape.num_experts,
            top_k=loaded.shape.top_k,
            lookahead=recording.lookahead,
            scores=recording.scores,
            has_weights=recording.weights,
            has_token_ids=recording.token_ids,
            modalities=loaded.modalities,
        )
        self._info: StepInfo | None = None
        self.engine: CopyEngine | None = None
        self.transfers = 0
        self.moved_bytes = 0
        self._stall_s = 0.0
        self._first_row = 0
        self._ended: list[pa.Table] = []
        self._later_gates = [
            _later_gates(loaded.layers, layer, recording.lookahead) for layer in loaded.layers
        ]
        self._flushed_s = self.timer.now()
        self._tap: GateTap | None = None

    @property
    def step(self) -> int:
        """Number of the current forward pass."""
        assert self._info is not None
        return self._info.step

    def begin_step(self, info: StepInfo, tokens: StepTokens) -> None:
        """See generate.StepObserver."""
        self._info = info
        self.routing.begin(info, tokens)
        self._first_row = len(self.timer.rows.rows)
        self.timer.begin(info)

    def end_step(self) -> float:
        """See generate.StepObserver."""
        seconds = self.timer.end()
        if self.engine is not None:
            self._stall_s += self.timer.rows.lap_s("stall_s", self._first_row)
        self._write_if_due()
        return seconds

    def seen(self) -> Seen:
        """What a live file tells of the run; a run that streams keeps nothing, so it has no hits."""
        return Seen(
            bytes_moved=self.moved_bytes, stall_s=self._stall_s, has_link=self.engine is not None
        )

    def end_batch(self, sequences: pa.Table) -> None:
        """A batch has come to its end: keep the rows of its sequences."""
        self._ended.append(sequences)
        self._write_if_due()

    def record(
        self,
        layer: int,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        lookahead: dict[int, torch.Tensor],
        scores: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Keep one event's routing: tensors are [tokens, top_k], arrays of `scores` (ids, scores) [tokens, m].

        Raises ResourceError for routing that a trace of this model could not say.
        """
        self.routing.add(layer, chosen, weights, lookahead, scores)

    def lookahead(self, layer: int, hidden_states: torch.Tensor) -> dict[int, torch.Tensor]:
        """What the next layers' gates pick from this layer's hidden state, on the host."""
        size, top_k = hidden_states.shape[-1], self.loaded.shape.top_k
        return {
            depth: gate_choice(gate, hidden_states, top_k).cpu()
            for depth, gate, input_size in self._later_gates[layer]
            if size == input_size
        }

    def scores(
        self, layer: int, top_k_index: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The likeliest experts of each token and the gate's scores of them, if they are recorded."""
        if self._tap is None:
            return None
        found = self._tap.scores(layer, top_k_index, weights, self.loaded.shape.num_experts)
        ids = ranked(found, chosen.numpy(), self.recording.scores)
        return ids.astype(np.uint16), np.take_along_axis(found, ids, 1).astype(np.float16)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the gates while the context is open, if their scores are recorded."""
        self._tap = GateTap(self.loaded.layers) if self.recording.scores else None
        try:
            yield
        finally:
            if self._tap is not None:
                self._tap.close()
            self._tap = None

    def write(self) -> None:
        """Hand everything collected to the writer, and make it durable every few seconds."""
        steps = self.timer.rows.take()
        ended, self._ended = self._ended, []
        if self._writer is None:
            self.routing.drop()
            return
        # In this order: appending may flush, a step is whole once its row here is on disk, and a batch
        # has ended once its sequences are.
        self._write_transfers(self._writer)
        routing = self.routing.take()
        if routing is not None:
            self._writer.append("routing", routing)
        if steps:
            self._writer.append("steps", _labelled(pa.table(steps), STEPS))
        for sequences in ended:
            self._writer.append("sequences", sequences)
        if self._is_late():
            self._writer.flush()
            self._flushed_s = self.timer.now()

    def _write_if_due(self) -> None:
        # Turning rows into tables has a price of its own, whatever their number.
        if self.routing.rows >= _ROWS_PER_TABLE or self._is_late():
            self.write()

    def _is_late(self) -> bool:
        return self.timer.now() - self._flushed_s > _FLUSH_EVERY_S

    def _write_transfers(self, writer: TraceWriter) -> None:
        copies = self.engine.take_records() if self.engine else []
        if not copies:
            return
        numbers = range(self.transfers, self.transfers + len(copies))
        self.transfers += len(copies)
        assert self.engine is not None
        stream = self.engine.stream_names[0]
        columns = {
            "transfer": list(numbers),
            "step": [c.step for c in copies],
            "layer": [c.key.layer for c in copies],
            "expert": [c.key.expert for c in copies],
            "bytes": [c.source.numel() for c in copies],
            "why": [c.why for c in copies],
            "stream": [stream] * len(copies),
            "queued_s": [c.queued_s for c in copies],
            "start_s": [c.start_s for c in copies],
            "end_s": [c.end_s for c in copies],
            "needed_s": [c.needed_s for c in copies],
            "pinned": [self.engine.pinned] * len(copies),
        }
        writer.append("transfers", _labelled(pa.table(columns), TRANSFERS))


class ResidentExperts:
    """Handler that records and lets the stock function compute."""

    def __init__(self, recorder: Recorder, layer: ExpertLayer) -> None:
        self._recorder = recorder
        self._layer = layer.index
        self._stock = stock_function(layer.module, recorder.loaded.implementation)
        self._top_k = recorder.loaded.shape.top_k
        self._looks_ahead = recorder.recording.lookahead > 0
        # Where the host computes, its clock says it all, and one call per event is enough.
        self._is_on_host = type(recorder.timer) is StepTimer and not recorder.recording.scores

    def __call__(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """See tracer.hooks.ExpertsHandler."""
        if not self._is_on_host:
            return self._in_laps(module, hidden_states, top_k_index, top_k_weights)
        recorder = self._recorder
        entered = foreseen = perf_counter()
        lookahead: dict[int, torch.Tensor] = {}
        if self._looks_ahead:
            lookahead = recorder.lookahead(self._layer, hidden_states)
            foreseen = perf_counter()
        recorder.routing.add(self._layer, top_k_index, top_k_weights, lookahead)
        distinct = self._top_k if recorder.routing.tokens == 1 else distinct_count(top_k_index)
        kept = perf_counter()
        output = self._stock(module, hidden_states, top_k_index, top_k_weights)
        recorder.timer.event(self._layer, distinct, entered, foreseen, kept, perf_counter())
        return output

    def _in_laps(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        timer = self._recorder.timer
        chosen = _observe(self._recorder, self._layer, hidden_states, top_k_index, top_k_weights)
        output = self._stock(module, hidden_states, top_k_index, top_k_weights)
        timer.lap("experts_s")
        timer.leave(self._layer, distinct=distinct_count(chosen), waves=1)
        timer.skip()
        return output


class StreamedExperts:
    """Handler that loads every demanded expert through a small arena, in waves if it must."""

    def __init__(
        self, recorder: Recorder, layer: ExpertLayer, blocks: HostBlocks, arena: SlotArena
    ) -> None:
        self._recorder = recorder
        self._layer = layer.index
        self._blocks = blocks
        self._arena = arena
        self._compute = SlotCompute(
            StandIn(layer.module, arena.part(range(arena.slots))),
            stock_function(layer.module, recorder.loaded.implementation),
            num_experts=recorder.loaded.shape.num_experts,
            first_slot=0,
        )

    @torch.inference_mode()
    def __call__(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """See tracer.hooks.ExpertsHandler."""
        timer = self._recorder.timer
        observed = _observe(self._recorder, self._layer, hidden_states, top_k_index, top_k_weights)
        chosen = observed.numpy()
        distinct = np.unique(chosen).tolist()
        size = self._arena.slots
        waves = [distinct[start : start + size] for start in range(0, len(distinct), size)]
        partial: torch.Tensor | None = None
        for experts in waves:
            self._load(experts)
            slots = range(len(experts))
            partial = self._compute.wave(experts, slots, hidden_states, chosen, partial)
            timer.lap("experts_s")
        assert partial is not None
        output = combine(partial, hidden_states, top_k_weights)
        timer.lap("experts_s")
        timer.leave(self._layer, distinct=len(distinct), waves=len(waves))
        timer.skip()
        return output

    def _load(self, experts: Sequence[int]) -> None:
        recorder = self._recorder
        assert recorder.engine is not None
        copies = [
            Copy(key, self._blocks.block(key), self._arena.slot(slot), "demand", recorder.step)
            for slot, key in enumerate(ExpertKey(self._layer, expert) for expert in experts)
        ]
        recorder.engine.submit(copies)
        recorder.moved_bytes += sum(copy.source.numel() for copy in copies)
        recorder.timer.lap("decision_s")
        recorder.engine.wait(copies)
        recorder.timer.lap("stall_s")


def _later_gates(
    layers: Sequence[ExpertLayer], layer: ExpertLayer, depths: int
) -> list[tuple[int, nn.Module, int]]:
    """Depth, gate and input size of the layers behind one whose gates can be applied early."""
    behind = layers[layer.index + 1 : layer.index + 1 + depths]
    return [
        (depth, later.gate, later.input_size)
        for depth, later in enumerate(behind, start=1)
        if later.gate is not None and later.tower == layer.tower
    ]


def _observe(
    recorder: Recorder,
    layer: int,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Read one event's routing back and keep it; the tracer's own work is not charged to the run."""
    timer = recorder.timer
    timer.enter()
    chosen = top_k_index.cpu()
    timer.lap("readback_s")
    lookahead: dict[int, torch.Tensor] = {}
    if recorder.recording.lookahead:
        lookahead = recorder.lookahead(layer, hidden_states)
        timer.lap("lookahead_s")
    scores = recorder.scores(layer, top_k_index, chosen, top_k_weights)
    recorder.record(layer, chosen, top_k_weights, lookahead, scores)
    timer.skip()
    return chosen


def record_run(
    recorder: Recorder,
    prompts: Sequence[Prompt],
    texts: Sequence[PromptText],
    *,
    batch_size: int,
    max_new_tokens: int,
    make: Callable[[ExpertLayer], Any],
    advance: Callable[[int], None],
    first_batch: int = 0,
    first_step: int = 0,
    live: LiveFile | None = None,
) -> list[Generated]:
    """Generate for all prompts, batch by batch, recording; `advance` hears of tokens done, `live` of passes.

    The last rows stay with the recorder until its `write`.
    A resumed run leaves the batches before `first_batch` out and counts its steps from `first_step`.
    """
    loaded = recorder.loaded
    observer = recorder if live is None else WatchedPasses(recorder, live)
    restore = install(loaded.model, loaded.layers, make)
    outputs: list[Generated] = []
    step = first_step
    try:
        for number, batch in enumerate(batches(prompts, batch_size)):
            if number < first_batch:
                continue
            with recorder.listening():
                generated = greedy(
                    loaded.model,
                    batch,
                    max_new_tokens=max_new_tokens,
                    eos_ids=loaded.eos_ids,
                    pad_id=loaded.pad_id,
                    first_step=step,
                    observer=observer,
                )
            step = recorder.step + 1
            recorder.end_batch(_sequences(number, batch, generated, texts, recorder.recording))
            outputs += generated
            advance(sum(len(one.token_ids) for one in generated))
    finally:
        restore()
    return outputs


def stream_handlers(
    recorder: Recorder,
    blocks: HostBlocks,
    arena: SlotArena,
    device: torch.device,
    link: LinkSpec | None,
) -> Callable[[ExpertLayer], StreamedExperts]:
    """Prepare streaming: the recorder gets a copy engine, layers get handlers."""
    recorder.engine = copy_engine(device, recorder.timer.now, pinned=blocks.pinned, link=link)
    return lambda layer: StreamedExperts(recorder, layer, blocks, arena)


def _sequences(
    batch_number: int,
    batch: Sequence[Prompt],
    generated: Sequence[Generated],
    texts: Sequence[PromptText],
    recording: Recording,
) -> pa.Table:
    rows = []
    for prompt, one in zip(batch, generated, strict=True):
        text = texts[prompt.sequence]
        rows.append(
            {
                "sequence": prompt.sequence,
                "prompt_id": text.prompt_id,
                "domain": text.domain,
                "batch": batch_number,
                "prompt_tokens": len(prompt.token_ids),
                "generated_tokens": len(one.token_ids),
                "finish": one.finish,
                "ttft_s": one.token_s[0],
                "prompt_sha256": text.sha256,
                "prompt_text": text.text if recording.text else None,
                "output_ids": one.token_ids if recording.token_ids else None,
                "template": text.template,
            }
        )
    return pa.Table.from_pylist(rows, schema=sequences_schema(template=recording.template))


def _labelled(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Turn text columns into the format's labels."""
    return table.select(schema.names).cast(schema)

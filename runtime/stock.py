"""Runs of a model as it stands, without a policy: what every policy is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..simulator.account import CopyRow, RunContext, RunRecord, summarize
from ..simulator.policy.spec import make_spec
from ..simulator.result import MemoryResult, Result
from ..tracer.generate import Generated, Prompt, StepTokens
from ..tracer.load import LoadedModel
from ..tracer.memory import SilentObserver, peaks
from ..tracer.probe import provenance
from ..tracer.prompts import batches
from ..tracer.timing import StepInfo, StepTimer, step_timer
from ..tracer.types import Origin
from .deploy import Prepared
from .machine import device_name, generate_all, no_collector, sequence_times

_WARM_UP_TOKENS = 3


class Stopwatch(SilentObserver):
    """Times whole passes. `step` is the pass that runs, -1 before the first."""

    def __init__(self, device: torch.device) -> None:
        self.timer: StepTimer = step_timer(device)
        self.step = -1

    def begin_step(self, info: StepInfo, tokens: StepTokens) -> None:
        """See generate.StepObserver."""
        self.step = info.step
        self.timer.begin(info)

    def end_step(self) -> float:
        """See generate.StepObserver."""
        return self.timer.end()


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What results say about a run without a policy: its short name, a label, and what carries the weights."""

    name: str
    label: str
    link: str = "none"
    link_origin: Origin = "measured"
    trace_id: str = ""
    warnings: tuple[str, ...] = ()


class PlainRuns:
    """A model ready to run as it stands. `memory` is its peak by class; `slots` are the experts always on the device.

    Whoever copies weights during a pass adds to `copies` and tells the timer of `watch`. A short warm-up comes first.
    """

    def __init__(
        self,
        prepared: Prepared,
        words: Words,
        memory: MemoryResult,
        *,
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        self.watch = Stopwatch(prepared.device)
        self.copies: list[CopyRow] = []
        self.memory = memory
        self._prepared, self._words = prepared, words
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens

    def warm_up(self) -> None:
        """A few passes whose times are dropped."""
        generate_all(
            self._prepared.loaded,
            self._prepared.prompts[:1],
            batch_size=1,
            max_new_tokens=_WARM_UP_TOKENS,
            observer=self.watch,
        )
        self._take()

    def run(self) -> tuple[Result, list[Generated]]:
        """Generate for all prompts, and what it took."""
        prompts = self._prepared.prompts
        with no_collector():
            outputs = generate_all(
                self._prepared.loaded,
                prompts,
                batch_size=self._batch_size,
                max_new_tokens=self._max_new_tokens,
                observer=self.watch,
            )
        steps, copies = self._take()
        record = RunRecord(steps, copies, [], sequence_times(prompts, outputs), self.memory)
        return self._result(record), outputs

    def _take(self) -> tuple[dict[str, list[object]], list[CopyRow]]:
        copies, self.copies = self.copies, []
        return self.watch.timer.rows.take(), copies

    def _result(self, record: RunRecord) -> Result:
        shape, words = self._prepared.loaded.shape, self._words
        slots = round(self.memory.slots / shape.expert_bytes)
        context = RunContext(
            source="measured",
            spec=make_spec(slots=max(1, slots)),
            shape=shape,
            trace_id=words.trace_id,
            device=device_name(self._prepared.device),
            link=words.link,
            link_origin=words.link_origin,
            batch_size=self._batch_size,
            provenance=provenance(0, "own-generation"),
            warnings=words.warnings,
        )
        # Nothing decides here, so there is neither a policy to name nor a log to replay.
        return replace(
            summarize(record, context),
            label=words.label,
            policy={"baseline": words.name},
            policy_hash="",
            slots=slots,
        )


def stock_runs(
    prepared: Prepared, *, batch_size: int, max_new_tokens: int, trace_id: str = ""
) -> PlainRuns:
    """The resident model under transformers alone. The caller has seen that it fits the device."""
    loaded = prepared.loaded
    loaded.model.to(prepared.device)
    held = MemoryResult(
        non_expert_weights=loaded.shape.non_expert_bytes,
        slots=loaded.shape.total_experts * loaded.shape.expert_bytes,
        kv_cache=0,
        activations=0,
    )
    runs = PlainRuns(
        prepared,
        Words(name="stock", label="all resident, stock transformers", trace_id=trace_id),
        with_working(held, prepared, batch_size),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    runs.warm_up()
    return runs


def with_working(held: MemoryResult, prepared: Prepared, batch_size: int) -> MemoryResult:
    """Add the peak of KV cache and working tensors, measured on the largest batch with the model as it is now.

    On CUDA that peak holds what is staged as well, which is taken out again.
    """
    loaded = prepared.loaded
    found = peaks(loaded, _largest(prepared, batch_size), prepared.device)
    info, peak = max(found, key=lambda item: item[1])
    kv_bytes = min(peak, loaded.shape.kv_bytes_per_token * info.batch * info.context)
    staged = held.staging if prepared.device.type == "cuda" else 0
    return replace(held, kv_cache=kv_bytes, activations=max(0, peak - kv_bytes - staged))


def _largest(prepared: Prepared, batch_size: int) -> Sequence[Prompt]:
    """The batch whose first pass has the most tokens, padding included."""
    found = batches(prepared.prompts, batch_size)
    return max(found, key=lambda batch: len(batch) * max(len(p.token_ids) for p in batch))


def count_weights(loaded: LoadedModel) -> tuple[int, int]:
    """Bytes of weights that are where they can be computed with: of experts, and of all else."""
    experts = {
        id(getattr(layer.module, name)) for layer in loaded.layers for name in layer.weight_names
    }
    found = [0, 0]
    for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
        if tensor.device.type != "meta":
            found[id(tensor) not in experts] += tensor.numel() * tensor.element_size()
    return found[0], found[1]

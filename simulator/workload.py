"""What a model asked for, step by step: the driver-independent side of a replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..tracer.errors import TraceError
from ..tracer.schema import WHOLE_STEP
from ..tracer.store import NO_EXPERT, Trace
from ..tracer.types import ExpertKey, Phase


@dataclass(frozen=True, slots=True)
class EventDemand:
    """One layer event: its distinct experts ascending, and the look-ahead groups if recorded."""

    layer: int
    experts: tuple[int, ...]
    lookahead: Mapping[int, list[list[int]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepDemand:
    """One forward pass: its size, its events in layer order, and the sequences that got a token."""

    step: int
    phase: Phase
    batch: int
    tokens: int
    context: int
    sequences: tuple[int, ...]
    events: tuple[EventDemand, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """A whole replay. `prompt_tokens` is by sequence number."""

    steps: tuple[StepDemand, ...]
    prompt_tokens: Mapping[int, int]
    batch_size: int
    num_layers: int
    num_experts: int
    lookahead: int

    def events(self) -> list[tuple[ExpertKey, ...]]:
        """All events in order, for members that know the future."""
        return [
            tuple(ExpertKey(event.layer, expert) for expert in event.experts)
            for step in self.steps
            for event in step.events
        ]

    def popularity(self) -> list[list[int]]:
        """Demands of each expert by layer: counts[layer][expert] over all events."""
        counts = [[0] * self.num_experts for _ in range(self.num_layers)]
        for step in self.steps:
            for event in step.events:
                row = counts[event.layer]
                for expert in event.experts:
                    row[expert] += 1
        return counts

    def mean_distinct(self, phase: Phase) -> float:
        """Mean distinct experts per event in one phase; 0 without such steps."""
        sizes = [len(e.experts) for s in self.steps if s.phase == phase for e in s.events]
        return float(np.mean(sizes)) if sizes else 0.0


def workload_of(trace: Trace) -> Workload:
    """Read a trace's routing as a workload. Raises TraceError if it has none."""
    rows = trace.routing_arrays()
    if not len(rows.step):
        raise TraceError(f"{trace.path} holds no routing rows; nothing can be replayed.")
    # Row order inside an event is the order of tokens; (step, layer) blocks are contiguous after this.
    order = np.lexsort((np.arange(len(rows.step)), rows.layer, rows.step))
    step, layer = rows.step[order], rows.layer[order]
    experts = rows.experts[order]
    lookahead = {depth: ids[order] for depth, ids in rows.lookahead.items()}
    starts = np.flatnonzero(np.r_[True, (np.diff(step) != 0) | (np.diff(layer) != 0)])
    ends = np.r_[starts[1:], len(step)]
    events: dict[int, list[EventDemand]] = {}
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        number, place = int(step[start]), int(layer[start])
        ahead = {
            depth: _predicted(ids[start:end])
            for depth, ids in lookahead.items()
            if place + depth < trace.shape.num_moe_layers
        }
        distinct = tuple(np.unique(experts[start:end]).tolist())
        events.setdefault(number, []).append(EventDemand(place, distinct, ahead))
    return _assemble(trace, events, _tokens_of(rows))


def _predicted(ids: np.ndarray) -> list[list[int]]:
    """One group per token that has a prediction."""
    return ids[(ids != NO_EXPERT).all(axis=1)].tolist()


def _tokens_of(rows: object) -> dict[int, tuple[int, ...]]:
    """Sequences with a real token in each step, from the first layer's rows."""
    first = (rows.layer == 0) & ~rows.is_pad  # type: ignore[attr-defined]
    steps, sequences = rows.step[first], rows.sequence[first]  # type: ignore[attr-defined]
    found: dict[int, dict[int, None]] = {}
    for step, sequence in zip(steps.tolist(), sequences.tolist(), strict=True):
        found.setdefault(step, {})[sequence] = None
    return {step: tuple(members) for step, members in found.items()}


def _assemble(
    trace: Trace,
    events: Mapping[int, Sequence[EventDemand]],
    sequences: Mapping[int, tuple[int, ...]],
) -> Workload:
    table = trace.table("steps", columns=["step", "layer", "phase", "batch", "tokens", "context"])
    columns = table.to_pydict()
    steps: list[StepDemand] = []
    for place, layer in enumerate(columns["layer"]):
        if layer != WHOLE_STEP:
            continue
        number = columns["step"][place]
        steps.append(
            StepDemand(
                step=number,
                phase=columns["phase"][place],
                batch=columns["batch"][place],
                tokens=columns["tokens"][place],
                context=columns["context"][place],
                sequences=sequences.get(number, ()),
                events=tuple(events.get(number, ())),
            )
        )
    if not steps:
        raise TraceError(
            f"{trace.path} holds no times of whole passes (table steps); nothing can be replayed. "
            "Record the trace again."
        )
    steps.sort(key=lambda step: step.step)
    prompts = trace.table("sequences", columns=["sequence", "prompt_tokens"]).to_pydict()
    return Workload(
        steps=tuple(steps),
        prompt_tokens=dict(zip(prompts["sequence"], prompts["prompt_tokens"], strict=True)),
        batch_size=trace.manifest.run.batch_size,
        num_layers=trace.shape.num_moe_layers,
        num_experts=trace.shape.num_experts,
        lookahead=trace.manifest.run.lookahead,
    )

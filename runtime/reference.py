"""The resident model traced in place: its text is what runs under a policy must equal, its routing what is forecast."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..simulator.policy.spec import PolicySpec
from ..simulator.workload import Workload, workload_of
from ..tracer.generate import Generated, Prompt
from ..tracer.link import measure_link
from ..tracer.placement import hardware_profile
from ..tracer.probe import machine_name, provenance
from ..tracer.prompts import PromptText, batches
from ..tracer.record import Recorder, Recording, ResidentExperts, record_run
from ..tracer.store import Trace
from ..tracer.tracing import recorded_names
from ..tracer.types import RunSettings
from ..tracer.writer import TraceWriter
from .deploy import Prepared
from .paths.data import routed
from .paths.model import PathModel
from .paths.predict import path_table


@dataclass(frozen=True, slots=True)
class Reference:
    """What the resident model gave: the text and its routing."""

    outputs: list[Generated]
    workload: Workload


def recording_for(spec: PolicySpec, prepared: Prepared) -> Recording:
    """What a forecast of a policy needs of the routing: look-ahead ids, and scores if it routes anew."""
    has_gates = all(layer.gate is not None for layer in prepared.loaded.layers)
    depth = max(1, spec.lookahead_depth) if has_gates else 0
    # Another routing is predicted from what the gates gave all experts.
    scores = prepared.loaded.shape.num_experts if spec.reroutes else 0
    return Recording(lookahead=depth, weights=scores > 0, scores=scores)


def reference_of(
    prepared: Prepared,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    new_tokens: Sequence[int],
    recording: Recording,
    paths: PathModel | None = None,
) -> Reference:
    """Generate for prompts as the resident model does and keep the routing; `new_tokens` are each prompt's at most.

    Prompts that share a batch get the same number of tokens.
    """
    loaded, device = prepared.loaded, prepared.device
    loaded.model.to(device)
    numbered = [replace(prompt, sequence=number) for number, prompt in enumerate(prompts)]
    texts = [PromptText(str(prompt.sequence), "", "") for prompt in numbered]
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
                batch_size=batch_size,
                max_new_tokens=max(new_tokens),
                residency="resident",
                experts_implementation=loaded.implementation,
                lookahead=recording.lookahead,
            ),
            provenance=provenance(0, "own-generation"),
            recorded=recorded_names(recording),
        ) as writer:
            recorder = Recorder(loaded, writer, device, recording)
            outputs = _recorded(recorder, numbered, texts, batch_size, new_tokens)
            recorder.write()
            writer.close()
        trace = Trace.open(out)
        workload = workload_of(trace)
        if paths is not None:
            found = routed(trace)
            everybody = np.arange(len(found.number))
            most = 2 * loaded.shape.top_k
            workload = workload.with_paths(path_table(paths, found, everybody, most))
    return Reference(outputs, workload)


def _recorded(
    recorder: Recorder,
    prompts: Sequence[Prompt],
    texts: Sequence[PromptText],
    batch_size: int,
    new_tokens: Sequence[int],
) -> list[Generated]:
    """All prompts, in runs of batches that get the same number of tokens."""
    firsts = [batch[0].sequence for batch in batches(prompts, batch_size)]
    starts = [first for first in firsts if first == 0 or new_tokens[first] != new_tokens[first - 1]]
    outputs: list[Generated] = []
    step = 0
    for first, last in zip(starts, [*starts[1:], len(prompts)], strict=True):
        outputs += record_run(
            recorder,
            prompts[:last],
            texts,
            batch_size=batch_size,
            max_new_tokens=new_tokens[first],
            make=lambda layer: ResidentExperts(recorder, layer),
            advance=lambda tokens: None,
            first_batch=first // batch_size,
            first_step=step,
        )
        step = recorder.step + 1
    return outputs

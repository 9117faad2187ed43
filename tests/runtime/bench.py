"""A tiny model with its resident text, its trace at two batch sizes, and runs under any policy."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from expertflow.runtime.machine import Machine, generate_all
from expertflow.runtime.paths.model import PathModel, PathShape
from expertflow.simulator.account import CopyRow
from expertflow.simulator.costs import CostModel, Linear, PhaseCosts
from expertflow.simulator.engine import simulate
from expertflow.simulator.policy.checked import tiny_lessons
from expertflow.simulator.policy.log import Entry
from expertflow.simulator.policy.registry import allocations, caches, predictors
from expertflow.simulator.policy.spec import PolicyFile, PolicySpec, make_spec, write_policy
from expertflow.simulator.workload import Workload, workload_of
from expertflow.tracer.console import progress
from expertflow.tracer.generate import Prompt
from expertflow.tracer.load import LoadedModel, load_model
from expertflow.tracer.prompts import PromptText, tokenize
from expertflow.tracer.quantities import LinkSpec
from expertflow.tracer.store import Trace
from expertflow.tracer.tracing import TraceRequest, trace_run
from expertflow.tracer.types import ModelShape

from tests.models import TEXTS as ALL_TEXTS
from tests.models import tiny, write_prompts

CPU = torch.device("cpu")
NEW_TOKENS = 5
TEXTS = ALL_TEXTS[:5]
SIZES = (1, 4)
SLOW = LinkSpec.parse("20MB/s+20us")
"""A copy takes as long as a layer: prefetches come late."""
CRAWLING = LinkSpec.parse("4MB/s")
"""A copy takes longer than a layer: prefetches pile up and are given up."""


def deployable(registry) -> list[str]:
    return [name for name in registry.names() if "future" not in registry.get(name).needs]


CACHES = deployable(caches)
ALLOCATIONS = deployable(allocations)
PREDICTORS = deployable(predictors)


@dataclass(frozen=True)
class Run:
    """What one run under a policy left behind."""

    texts: list[list[int]]
    log: list[Entry]
    steps: dict[str, list]
    copies: list[CopyRow]


class Bench:
    """See the module docstring. Some sequences end early, so that steps do not line up by chance."""

    def __init__(self, folder: Path, *, device: torch.device = CPU, dtype: str = "auto"):
        self.folder = folder
        self.device = device
        self.prompts_file = write_prompts(folder / "prompts.jsonl", TEXTS)
        self.model = tiny("olmoe", eos_token_id=_common_token(device, dtype))
        self.loaded: LoadedModel = load_model(str(self.model), device=device, dtype=dtype)
        self.loaded.model.to(device)
        self.shape = self.loaded.shape
        texts = [PromptText(str(n), "", text) for n, text in enumerate(TEXTS)]
        self.prompts: list[Prompt] = tokenize(self.loaded.tokenizer, texts, 64)
        self.resident = {size: self._resident(size) for size in SIZES}
        self.workloads = {size: self._traced(size, str(device), dtype) for size in SIZES}
        self.popularity = self.workloads[1].popularity()
        self.machine = Machine(self.loaded, device, paths=tiny_paths(self.shape).to(device))
        self.run = functools.cache(self._run)

    def spec(self, slots: int, cache="lru", allocation="equal", predictor="none", **more):
        return make_spec(
            slots=slots,
            cache=cache,
            allocation=allocation,
            predictor=predictor,
            **(tiny_lessons(self.shape) | {"popularity": self.popularity} | more),
        )

    def simulated(self, spec: PolicySpec, size: int) -> list[Entry]:
        return list(simulate(self.workloads[size], spec, self.shape, COSTS).log)

    def policy_file(self, path: Path, spec: PolicySpec, **changes) -> Path:
        fields = {
            "behaviour": spec,
            "behaviour_hash": spec.behaviour_hash(),
            "shape": self.shape,
            "budget": f"{spec.slots}slots",
            "trace": "none",
        }
        write_policy(path, PolicyFile(**{**fields, **changes}))
        return path

    def close(self) -> None:
        self.machine.close()

    def _resident(self, size: int) -> list[list[int]]:
        outputs = generate_all(
            self.loaded, self.prompts, batch_size=size, max_new_tokens=NEW_TOKENS
        )
        return [one.token_ids for one in outputs]

    def _traced(self, size: int, device: str, dtype: str) -> Workload:
        request = TraceRequest(
            out=self.folder / f"trace-{size}",
            model=str(self.model),
            prompts=self.prompts_file,
            batch_size=size,
            max_new_tokens=NEW_TOKENS,
            residency="resident",
            device=device,
            dtype=dtype,
            threads=1,
        )
        trace_run(request, progress=progress, say=lambda words: None)
        return workload_of(Trace.open(request.out))

    def _run(
        self,
        slots: int,
        cache: str,
        allocation: str,
        predictor: str,
        size: int,
        link: LinkSpec | None = None,
    ) -> Run:
        self.machine.link = link
        with self.machine.session(self.spec(slots, cache, allocation, predictor)) as session:
            outputs = generate_all(
                self.loaded,
                self.prompts,
                observer=session,
                batch_size=size,
                max_new_tokens=NEW_TOKENS,
            )
            run = Run(
                [one.token_ids for one in outputs],
                session.log,
                session.take_steps(),
                list(session.copies()),
            )
        self.machine.link = None
        return run


def tiny_paths(shape: ModelShape) -> PathModel:
    """A path predictor that has learned nothing: what it says is wrong, but always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PathModel(
            PathShape(
                vocab_size=shape.vocab_size,
                num_layers=shape.num_moe_layers,
                num_experts=shape.num_experts,
                top_k=shape.top_k,
                hidden=8,
                feedforward=16,
                heads=2,
                head_size=4,
            )
        ).eval()


def _common_token(device: torch.device, dtype: str) -> int:
    """A token that some sequences meet in the middle: it becomes the end mark."""
    loaded = load_model(str(tiny()), device=device, dtype=dtype)
    loaded.model.to(device)
    texts = [PromptText(str(n), "", text) for n, text in enumerate(TEXTS)]
    prompts = tokenize(loaded.tokenizer, texts, 64)
    outputs = generate_all(loaded, prompts, batch_size=1, max_new_tokens=NEW_TOKENS)
    return outputs[1].token_ids[1]


_PHASE = PhaseCosts(
    mixer=Linear((1e-4, 0.0, 0.0, 0.0, 0.0)),
    experts=Linear((1e-4, 0.0, 0.0, 0.0, 0.0, 0.0)),
    head=Linear((1e-4, 0.0, 0.0)),
    decision=Linear((1e-5, 0.0, 0.0)),
    readback_s=1e-5,
    lookahead=Linear((1e-5, 0.0, 0.0)),
)
COSTS = CostModel(
    prefill=_PHASE,
    decode=_PHASE,
    expert_bytes=6144,
    copy_s=2e-4,
    busy_copy_s=2e-4,
    wake_s=0.0,
    chunk_bytes=4096,
    num_experts=8,
)
"""Any machine: with demand loads only, decisions do not depend on time."""

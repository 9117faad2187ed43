"""A model under one policy: the driver of the decision core (driver.py), and all it needs to know of the model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from ..simulator.account import CopyRow
from ..simulator.policy.base import Regrouping
from ..simulator.policy.log import Entry
from ..simulator.policy.registry import misses, predictors
from ..simulator.policy.residency import Pool
from ..simulator.policy.spec import PolicySpec
from ..simulator.policy.units import regrouping_of
from ..simulator.regroup import asks_paths
from ..tracer.blocks import HostBlocks
from ..tracer.errors import UsageError
from ..tracer.generate import StepTokens
from ..tracer.hooks import install
from ..tracer.load import LoadedModel
from ..tracer.quantities import LinkSpec
from ..tracer.timing import StepInfo, StepTimer, step_timer
from ..tracer.types import ExpertKey, ModelShape
from .cpu_experts import CpuThread
from .driver import Driver
from .experts import OffloadedExperts
from .paths.live import LivePaths
from .paths.model import PathModel
from .reroute import LiveRouting
from .settled import Settled
from .store import ExpertStore


class Session:
    """Runs `loaded` under `spec` until closed. The blocks outlive it, so policies can be compared.

    Implements tracer.generate.StepObserver. If the policy regroups batches, `scheduler` does, and `chosen` holds the
    experts [tokens, k] of the last pass's tokens by layer (runtime/units.py). Without `keep_log` no log is
    kept, for sessions that live long; whoever makes one takes the rows of steps and copies after each pass. `paths`
    is a trained path predictor, for policies that ask one. Raises PolicyError if the policy was made for another
    shape, UsageError if it needs the future, gates the model does not have, or a predictor that is not given,
    ResourceError if the slots do not fit. `settles`: see settled.py. Whatever it raises, the model is as it was. A
    pass that fails leaves the session fit for the next one.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        blocks: HostBlocks,
        spec: PolicySpec,
        device: torch.device,
        *,
        link: LinkSpec | None = None,
        keep_log: bool = True,
        paths: PathModel | None = None,
        settles: bool = True,
    ) -> None:
        self.shape: ModelShape = loaded.shape
        self.implementation = loaded.implementation
        self._log: list[Entry] = []
        self.timer: StepTimer = step_timer(device)
        self._core = spec.build(loaded.shape, log=self._log if keep_log else None)
        self.scheduler: Regrouping | None = regrouping_of(spec.build_scheduler())
        self.chosen: dict[int, np.ndarray] | None = None if self.scheduler is None else {}
        self.path_model: PathModel | None = None
        self._gates = [layer.gate for layer in loaded.layers]
        self.lookahead = self._lookahead_depth(spec)
        self.device = device
        self.tokens: StepTokens | None = None
        self.reads_routing = spec.reads_routing
        self.loads_whole_layers = spec.loads_whole_layers
        self.needs_weights = "gate_weights" in spec.needs()
        with ExitStack() as undo:
            self.store = ExpertStore(
                blocks, spec.slots, device, self.timer.now, link=link, writes_back=spec.writes_back
            )
            undo.callback(self.store.close)
            self.driver = Driver(self._core, self.store, self.timer.lap)
            self.driver.warm()
            total = loaded.shape.total_experts
            self.settled = Settled(
                self._core, self.driver, total if settles and spec.may_settle(total) else None
            )
            self.paths = self._live_paths(spec, paths)
            if self.paths is not None:
                undo.callback(self.paths.close)
            self.routing = LiveRouting(loaded, spec) if spec.reroutes else None
            if self.routing is not None:
                undo.callback(self.routing.close)
            self.cpu = CpuThread() if _computes_on_cpu(spec) else None
            if self.cpu is not None:
                undo.callback(self.cpu.close)
            undo.callback(
                install(loaded.model, loaded.layers, lambda layer: OffloadedExperts(self, layer))
            )
            self._undo = undo.pop_all()

    @property
    def log(self) -> list[Entry]:
        """Every decision so far, in order; empty without `keep_log`."""
        self.settled.tell()
        return self._log

    @property
    def outcomes(self) -> dict[str, int]:
        """Hits, lates and misses so far."""
        self.settled.tell()
        return self.driver.outcomes

    def pool(self, layer: int) -> Pool:
        """The pool a layer's experts live in."""
        return next(pool for pool in self._core.pools if layer in pool.layers)

    def slots(self, layer: int) -> list[int]:
        """Where a layer's experts are, all of which must be resident."""
        found = [self._core.slot_of(ExpertKey(layer, e)) for e in range(self.shape.num_experts)]
        return [slot for slot in found if slot is not None]

    def gate(self, layer: int) -> nn.Module | None:
        """The router of a layer, None past the last."""
        return self._gates[layer] if layer < len(self._gates) else None

    def prepare(self) -> None:
        """What follows is done for the next pass, before it begins."""
        self.timer.prepare()

    def begin_step(self, info: StepInfo, tokens: StepTokens | None = None) -> None:
        """A forward pass starts."""
        self.driver.step = info.step
        self.driver.is_prefill = info.phase == "prefill"
        self.tokens = tokens
        self.timer.begin(info)
        if self.paths is not None and tokens is not None:
            self.paths.begin(tokens, info.batch)

    def end_step(self) -> float:
        """A forward pass has ended; returns its seconds."""
        return self.timer.end()

    def copies(self) -> list[CopyRow]:
        """Every copy so far, with its times."""
        return self.store.rows()

    def take_steps(self) -> dict[str, list[Any]]:
        """Rows of the steps table so far; starts a new table."""
        return self.timer.rows.take()

    def close(self) -> None:
        """Give the model its stock experts function back and stop copying. Nothing happens the second time."""
        self._undo.close()

    @property
    def reads_tokens(self) -> bool:
        """Whether the policy wants to know which tokens are fed."""
        return self.reads_routing or self.paths is not None

    def _live_paths(self, spec: PolicySpec, model: PathModel | None) -> LivePaths | None:
        if "paths" not in spec.needs():
            return None
        if model is None:
            raise UsageError(
                f"{asks_paths(spec)} needs a trained path predictor: `deploy POLICY --paths DIR`, or "
                "offload(…, paths=DIR). Make one with `expertflow-trace train-predictor TRACE --out DIR`."
            )
        wanted = (self.shape.num_moe_layers, self.shape.num_experts, self.shape.top_k)
        got = (model.shape.num_layers, model.shape.num_experts, model.shape.top_k)
        if got != wanted:
            raise UsageError(
                f"The path predictor is for (layers, experts, top-k) {got}, but {self.shape.model_id} has {wanted}. "
                "Train one on a trace of this model."
            )
        self.path_model = model
        if "paths" not in predictors.get(spec.predictor.name).needs:
            return None  # the scheduler asks before passes begin
        return LivePaths(model, 2 * self.shape.top_k)

    def _lookahead_depth(self, spec: PolicySpec) -> int:
        if spec.lookahead_depth == 0:
            return 0
        if any(gate is None for gate in self._gates):
            raise UsageError(
                f"predictor {spec.predictor.name!r} applies the gates of later layers early, but this "
                "model's gates could not be found. Choose predictor none."
            )
        return spec.lookahead_depth


def _computes_on_cpu(spec: PolicySpec) -> bool:
    return not getattr(misses.get(spec.misses.name), "loads_all", False)

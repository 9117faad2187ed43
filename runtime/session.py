"""A model under one policy: the runtime's driver of the decision core.

It keeps the order of the simulator's driver (simulator/engine.py): finished prefetches are reported before
an event is asked for, prefetches go out behind the event's last demand loads, and an event is released when
it has been computed. There is no branch on the policy here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..simulator.account import CopyRow
from ..simulator.policy.base import Demand, Facts, Load, Regrouping, Signals
from ..simulator.policy.log import Entry
from ..simulator.policy.registry import misses, predictors
from ..simulator.policy.residency import Pool
from ..simulator.policy.spec import PolicySpec
from ..simulator.policy.units import regrouping_of
from ..simulator.regroup import asks_paths
from ..tracer.blocks import HostBlocks
from ..tracer.copies import Copy
from ..tracer.errors import UsageError
from ..tracer.generate import StepTokens
from ..tracer.hooks import install
from ..tracer.load import LoadedModel
from ..tracer.quantities import LinkSpec
from ..tracer.timing import StepInfo, StepTimer, step_timer
from ..tracer.types import ModelShape
from .experts import OffloadedExperts
from .paths.live import LivePaths
from .paths.model import PathModel
from .reroute import LiveRouting
from .store import ExpertStore

_FORGET_EVERY = 64
"""Passes after which a session without a log drops its rows."""


class Session:
    """Runs `loaded` under `spec` until closed. The blocks outlive it, so policies can be compared.

    Implements tracer.generate.StepObserver. If the policy regroups batches, `scheduler` does, and `chosen` holds the
    experts [tokens, k] of the last pass's tokens by layer (runtime/units.py). Without `keep_log` only counters are
    kept, for sessions that live long. `paths` is a trained path predictor, for policies that ask one. Raises
    PolicyError if the policy was made for another shape, UsageError if it needs the future, gates the model does not
    have, or a predictor that is not given.
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
    ) -> None:
        self.shape: ModelShape = loaded.shape
        self.implementation = loaded.implementation
        self.log: list[Entry] = []
        self.outcomes = {"hits": 0, "lates": 0, "misses": 0}
        self.timer: StepTimer = step_timer(device)
        self._core = spec.build(loaded.shape, log=self.log if keep_log else None)
        if not getattr(misses.get(spec.misses.name), "loads_all", False):
            raise UsageError(
                f"misses {spec.misses.name!r} cannot be deployed yet: the runtime loads every missing "
                "expert. Use `--misses load`, or stay in the simulator."
            )
        self.scheduler: Regrouping | None = regrouping_of(spec.build_scheduler())
        self.chosen: dict[int, np.ndarray] | None = None if self.scheduler is None else {}
        self.path_model: PathModel | None = None
        self._gates = [layer.gate for layer in loaded.layers]
        self.lookahead = self._lookahead_depth(spec)
        self.paths = self._live_paths(spec, paths)
        self.routing = LiveRouting(loaded, spec) if spec.reroutes else None
        self.store = ExpertStore(
            blocks, spec.slots, device, self.timer.now, link=link, writes_back=spec.writes_back
        )
        self._step = -1
        self._is_prefill = True
        self.tokens: StepTokens | None = None
        self.reads_routing = spec.reads_routing
        self.loads_whole_layers = spec.loads_whole_layers
        self.needs_weights = "gate_weights" in spec.needs()
        self._keeps_log = keep_log
        self._restore: Callable[[], None] = install(
            loaded.model, loaded.layers, lambda layer: OffloadedExperts(self, layer)
        )
        self.store.wait(self.store.submit(-1, self._core.warm()))

    def pool(self, layer: int) -> Pool:
        """The pool a layer's experts live in."""
        return next(pool for pool in self._core.pools if layer in pool.layers)

    def gate(self, layer: int) -> nn.Module | None:
        """The router of a layer, None past the last."""
        return self._gates[layer] if layer < len(self._gates) else None

    def prepare(self) -> None:
        """What follows is done for the next pass, before it begins."""
        self.timer.prepare()

    def begin_step(self, info: StepInfo, tokens: StepTokens | None = None) -> None:
        """A forward pass starts."""
        self._step = info.step
        self._is_prefill = info.phase == "prefill"
        self.tokens = tokens
        self.timer.begin(info)
        if self.paths is not None and tokens is not None:
            self.paths.begin(tokens, info.batch)

    def end_step(self) -> float:
        """A forward pass has ended; returns its seconds."""
        seconds = self.timer.end()
        if not self._keeps_log and self._step % _FORGET_EVERY == 0:
            self.take_steps()
            self.store.count_bytes()
        return seconds

    def demand(
        self, layer: int, experts: Sequence[int], tokens: Sequence[int], weights: Sequence[float]
    ) -> Demand:
        """Report finished prefetches, ask the core, carry out its cancels.

        `tokens` and `weights` are by expert, as in policy.base.Facts.
        """
        for key in self.store.arrived():
            self._core.loaded(self._step, key)
        facts = Facts(self._is_prefill, tuple(tokens), tuple(weights))
        answer = self._core.demand(self._step, layer, experts, facts)
        for key in answer.cancels:
            self.store.cancel(key)
        self.outcomes["hits"] += answer.hits
        self.outcomes["lates"] += answer.lates
        self.outcomes["misses"] += answer.misses
        return answer

    def submit(self, loads: Sequence[Load]) -> list[Copy]:
        """Start an event's demand loads."""
        return self.store.submit(self._step, loads)

    def prefetch(self, layer: int, signals: Signals) -> None:
        """Ask the predictor and start what it wants."""
        self.store.submit(self._step, self._core.predict(self._step, layer, signals))

    def release(self, layer: int) -> None:
        """The event has been computed."""
        self._core.release(self._step, layer)

    def copies(self) -> list[CopyRow]:
        """Every copy so far, with its times."""
        return self.store.rows()

    def take_steps(self) -> dict[str, list[Any]]:
        """Rows of the steps table so far; starts a new table."""
        return self.timer.rows.take()

    def close(self) -> None:
        """Give the model its stock experts function back and stop copying."""
        self._restore()
        self.store.close()
        if self.routing is not None:
            self.routing.close()
        if self.paths is not None:
            self.paths.close()

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

"""Picks the engine of a prediction: the compiled one where it can, the reference engine otherwise; same floats."""

from __future__ import annotations

import importlib.util
from typing import Literal

from ..tracer.types import ModelShape
from .account import RunTotals, totals_of
from .costs import CostModel
from .engine import simulate
from .policy.spec import PolicySpec
from .reroute import rerouted_source
from .source import Recorded, Source
from .whole_layers import as_demanded
from .workload import Workload

Engine = Literal["compiled", "reference"]


def engine_for(spec: PolicySpec) -> Engine:
    """The engine a policy runs on: compiled if numba is installed and all its members have compiled twins."""
    if importlib.util.find_spec("numba") is None:
        return "reference"
    from .compiled.replay import has_twin

    return "compiled" if has_twin(spec) else "reference"


def run(
    source: Workload | Source, spec: PolicySpec, shape: ModelShape, costs: CostModel
) -> tuple[RunTotals, Engine]:
    """Run a workload, or what arrives, under a policy; which engine it was is the second value.

    The policy's routing is applied here, for both engines (reroute.py), and so is layer streaming (whole_layers.py).
    """
    engine = engine_for(spec)
    if isinstance(source, Recorded):
        source = source.workload
    source = as_demanded(rerouted_source(source, spec.routing), spec)
    if engine == "reference":
        return totals_of(simulate(source, spec, shape, costs)), engine
    from .compiled.replay import replay
    from .compiled.server import serve

    if isinstance(source, Workload):
        return replay(source, spec, shape, costs), engine
    return serve(source, spec, shape, costs), engine

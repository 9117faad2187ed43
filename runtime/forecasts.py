"""Forecasts of runs on a machine that is at hand, from costs that were measured with it."""

from __future__ import annotations

from collections.abc import Mapping

from ..simulator.costs import CostModel
from ..simulator.forecast import Forecaster
from ..simulator.own_costs import OwnCosts
from ..simulator.paths import PathCosts
from ..simulator.workload import Workload
from ..tracer.probe import provenance
from .machine import Machine, device_name


def forecaster_of(
    machine: Machine,
    workload: Workload,
    costs: CostModel,
    *,
    path_costs: PathCosts | None = None,
    own_costs: Mapping[tuple[str, ...], OwnCosts] | None = None,
) -> Forecaster:
    """Predictions of `workload` on `machine`; `costs` hold the policy's time and asking for copies already."""
    return Forecaster(
        workload=workload,
        costs=costs,
        shape=machine.loaded.shape,
        trace_id=machine.trace_id,
        device=device_name(machine.device),
        link=machine.link_name,
        link_origin=machine.link_origin,
        submit_s=0.0,
        decision_is_measured=True,
        provenance=provenance(0, "own-generation"),
        path_costs=path_costs,
        own_costs=own_costs or {},
    )

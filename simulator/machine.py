"""A calibrated machine as a file: what the runtime itself cost, for forecasts from any trace of the model.

A trace of a resident model shows the model's times and the link's; what offloading adds (colder caches,
copies beside compute, bookkeeping) only the runtime can show. `expertflow-trace calibrate` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..tracer.errors import InputError
from ..tracer.records import from_json, read_json
from ..tracer.types import ModelShape, Origin, Provenance
from .costs import CostModel

MACHINE_FORMAT = "expertflow.machine/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFile:
    """`machine.json`. `costs` hold for `shape` on `device` behind `link`; nobody measured them if `is_declared`."""

    costs: CostModel
    shape: ModelShape
    device: str
    link: str
    link_origin: Origin
    batch_size: int
    provenance: Provenance
    is_declared: bool = False
    format: str = MACHINE_FORMAT


def read_machine(path: Path) -> MachineFile:
    """Read and check a machine file. Raises InputError naming the file."""
    document = read_json(path)
    found = document.get("format") if isinstance(document, dict) else None
    if found != MACHINE_FORMAT:
        raise InputError(
            f"{path} is not a machine file: format is {found!r}, expected {MACHINE_FORMAT!r}. "
            "Make one with `expertflow-trace calibrate --out machine.json`."
        )
    return from_json(MachineFile, document, path.name)

"""Predicted paths on disk, for replays: a predictor's card and the experts it names, read without torch.

`train-predictor` (runtime) writes a folder: `card.json`, the weights, and per trace `paths/<trace id>.npz` with what
the predictor says of the tokens of prompts that it was neither trained nor stopped on. Only those may judge it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..tracer.errors import InputError, UsageError
from ..tracer.outputs import taking_place
from ..tracer.quantities import format_seconds
from ..tracer.records import from_json, read_json
from ..tracer.store import NO_EXPERT
from ..tracer.types import ModelShape, Phase, Provenance
from .costs import CostModel, Linear, PhaseCosts
from .policy.spec import check_shape
from .split import batch_numbers

if TYPE_CHECKING:
    from .forecast import Forecaster

Part = Literal["train", "validation", "held_out"]
PATHS_FORMAT = "expertflow.path_predictor/1"
CARD = "card.json"
WEIGHTS = "predictor.safetensors"
_ARRAYS = ("sequence", "position", "experts")
_FLOAT_BYTES = 4
"""Of one weight of a predictor, which are kept in float32."""


@dataclass(frozen=True, slots=True)
class PromptPart:
    """One prompt of the trace a predictor was trained on, and what it served for."""

    prompt_id: str
    sha256: str
    domain: str
    part: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class PathLatency:
    """Measured seconds of a predictor on one device: reading a prompt, and one decode step, by batch size.

    `points` are (batch, prompt seconds, step seconds), ascending in batch.
    """

    device: str
    prompt_tokens: int
    points: tuple[tuple[int, float, float], ...]

    def seconds(self, phase: Phase, batch: int) -> float:
        """Of one pass, linear between the measured batches and level beyond them."""
        sizes, prompt, step = zip(*self.points, strict=True)
        return float(np.interp(batch, sizes, prompt if phase == "prefill" else step))

    def unit_s(self, phase: Phase, sequences: int) -> float:
        """Of one pass over the sequences of several batches: in proportion beyond the largest measured batch."""
        return self.seconds(phase, sequences) * max(1.0, sequences / self.points[-1][0])


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorCard:
    """`card.json`: what a path predictor is, what it has seen, and how good it was on what it had not seen.

    `predictor` are the sizes of the network, `training` the settings and the course of the training.
    """

    predictor: Mapping[str, Any]
    weights_sha256: str
    shape: ModelShape
    trace_id: str
    prompts: tuple[PromptPart, ...]
    training: Mapping[str, Any]
    metrics: Mapping[str, Any]
    latency: PathLatency
    provenance: Provenance
    format: str = PATHS_FORMAT

    def seen(self) -> frozenset[str]:
        """Hashes of the prompts it learned from or was stopped by."""
        return frozenset(prompt.sha256 for prompt in self.prompts if prompt.part != "held_out")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PathTable:
    """Predicted experts [tokens, layers, m], likeliest first, by the tokens' sequence and position: [tokens]."""

    sequence: np.ndarray
    position: np.ndarray
    experts: np.ndarray

    def at(self, sequence: np.ndarray, position: np.ndarray, layer: np.ndarray) -> np.ndarray:
        """Experts [rows, m] of rows; NO_EXPERT where nothing was predicted."""
        found = np.full((len(sequence), self.experts.shape[2]), NO_EXPERT, np.uint16)
        if not len(self.sequence):
            return found
        span = np.int64(max(self.position.max(), position.max(initial=0))) + 2
        # Padding stands at position −1.
        keys = self.sequence * span + self.position + 1
        asked = sequence * span + position + 1
        order = np.argsort(keys, kind="stable")
        place = np.minimum(np.searchsorted(keys, asked, sorter=order), len(keys) - 1)
        is_there = keys[order[place]] == asked
        found[is_there] = self.experts[order[place[is_there]], layer[is_there]]
        return found


def read_card(folder: Path) -> PredictorCard:
    """Read and check a predictor's card. Raises InputError."""
    path = folder / CARD
    document = read_json(path)
    found = document.get("format") if isinstance(document, dict) else None
    if found != PATHS_FORMAT:
        raise InputError(
            f"{path}: its format is {found!r}, expected {PATHS_FORMAT!r}. Make a predictor with "
            f"`expertflow-trace train-predictor TRACE --out {folder}`."
        )
    return from_json(PredictorCard, document, str(path))


def paths_file(folder: Path, trace_id: str) -> Path:
    """Where a predictor's folder keeps the predicted paths of a trace."""
    return folder / "paths" / f"{trace_id}.npz"


def write_paths(path: Path, table: PathTable) -> None:
    """Write predicted paths, atomically."""
    with taking_place(path) as place, place.open("wb") as file:
        np.savez_compressed(file, **{name: getattr(table, name) for name in _ARRAYS})


def read_paths(path: Path, shape: ModelShape) -> PathTable:
    """Read predicted paths and check them against a model's shape. Raises InputError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as cause:
        raise InputError(f"{path} does not hold predicted paths: {cause}.") from None
    experts = arrays["experts"]
    is_sound = (
        experts.ndim == 3
        and experts.dtype == np.uint16
        and experts.shape[1] == shape.num_moe_layers
        and all(arrays[name].shape == experts.shape[:1] for name in ("sequence", "position"))
        and bool((experts < shape.num_experts).all())
    )
    if not is_sound:
        raise InputError(
            f"{path} does not fit {shape.model_id}: it is damaged or of another model."
        )
    arrays |= {name: arrays[name].astype(np.int64) for name in ("sequence", "position")}
    return PathTable(**arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class PathCosts:
    """What a predictor adds to a machine's costs: seconds per pass by phase, and bytes of its weights.

    The first layer of a pass waits for it, as it names the experts of all layers at once. `latency` is what was
    measured of it, for those who ask it apart from the passes (regroup.py).
    """

    pass_s: Mapping[str, float] = field(default_factory=dict)
    num_bytes: int = 0
    latency: PathLatency | None = None

    def of_prompts(self) -> PathCosts:
        """The same with nothing for decode steps."""
        return replace(self, pass_s={**self.pass_s, "decode": 0.0})

    def charged(self, costs: CostModel, member_s: float = 0.0) -> CostModel:
        """Charge it, and the policy member's own `member_s`, in place of gates applied early.

        Asking for prefetches costs what it did.
        """

        def of(phase: Phase) -> PhaseCosts:
            found = costs.phase(phase)
            asking = Linear((member_s, 0.0, found.lookahead.weights[2]))
            return replace(found, lookahead=asking, pass_lookahead_s=self.pass_s[phase])

        return replace(costs, prefill=of("prefill"), decode=of("decode"))


def judged_on_paths(ready: Forecaster, folder: Path) -> Forecaster:
    """The same predictions on batches of held-out prompts only, with what the predictor in `folder` says of them.

    Its measured time is charged to the first layer of a pass, as if nothing ran beside it. Raises UsageError
    if no batch consists of held-out prompts only, InputError for a damaged folder.
    """
    card = read_card(folder)
    check_shape(card.shape, ready.shape)
    path = paths_file(folder, ready.trace_id)
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no predicted paths of this trace ({ready.trace_id}). Add them with "
            f"`expertflow-trace train-predictor TRACE --predict-with {folder}`."
        )
    table = read_paths(path, ready.shape)
    workload = ready.workload
    steps = workload.steps
    members = np.isin(steps.members, table.sequence)
    batch = batch_numbers(workload)
    batch_of_member = np.repeat(batch, np.diff(steps.member_ptr))
    strangers = np.bincount(batch_of_member, ~members, minlength=int(batch[-1]) + 1)
    is_held_out = (strangers == 0)[batch] & (np.diff(steps.member_ptr) > 0)
    held, total = len(np.unique(table.sequence)), len(np.unique(steps.members))
    if not is_held_out.any():
        raise UsageError(
            f"No batch of this trace consists of held-out prompts only ({held} of {total} are held out, batches of "
            f"{workload.batch_size}), and a predictor is not judged on what it has seen. Trace other prompts with "
            "`expertflow-trace run --prompts …` and add their paths with "
            f"`expertflow-trace train-predictor TRACE --predict-with {folder}`."
        )
    chosen = workload.select(np.flatnonzero(is_held_out))
    pass_s = {
        phase: card.latency.seconds(phase, workload.batch_size) for phase in ("prefill", "decode")
    }
    judged = len(np.unique(chosen.steps.members))
    note = (
        f"Judged on {judged} of {total} prompts, which the path predictor has not seen; its own time "
        f"({format_seconds(pass_s['decode'])} per decode step on {card.latency.device}) is charged to "
        "policies that ask it."
    )
    return replace(
        ready,
        workload=chosen.with_paths(table),
        path_costs=PathCosts(
            pass_s=pass_s,
            latency=card.latency,
            num_bytes=_FLOAT_BYTES * int(card.training.get("parameters", 0)),
        ),
        warnings=(*ready.warnings, note),
    )

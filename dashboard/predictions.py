"""Predictions for pages: a trace and a machine made ready once, single answers kept, everything by the engine.

Policies learn from one half of the batches and are judged on the other, as `tune` and `sweep` do. Of long traces the
beginning is replayed (excerpt.py), and `Desk.passes` says how much of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from ..simulator.account import RunRecord
from ..simulator.arrivals import read_arrivals
from ..simulator.engines import engine_for
from ..simulator.feasible import feasible
from ..simulator.forecast import Forecaster, forecaster
from ..simulator.hardware import machine_of, parse_link
from ..simulator.judge import DEFAULT_LINK, Judge, judge_of
from ..simulator.machine import read_machine
from ..simulator.policy.base import LESSONS
from ..simulator.policy.registry import FAMILIES, allocations, caches, predictors
from ..simulator.policy.spec import Member, PolicySpec, check_shape, make_spec
from ..simulator.result import Result
from ..simulator.serving import MAX_STEP_TOKENS, Serving, ServingSettings, serve
from ..simulator.token_table import TokenTable
from ..tracer.errors import ExpertFlowError
from ..tracer.schema import Manifest
from ..tracer.store import Trace
from .data import BAD_INPUT, Catalog, FileKey, Found, Problem, file_key, reason_of, trace_key
from .excerpt import beginning

OWN: Final = "own"
"""The link of the machine itself."""
_LOG_EXPERTS: Final = 12_000
"""Demanded experts that a simulated timeline covers at most; the reference engine takes about a second for them."""

Kind = Literal["trace", "file", "gpu"]


@dataclass(frozen=True, slots=True)
class MachineChoice:
    """Whose times are used: the trace's own, a calibrated machine's, or a declared GPU's."""

    kind: Kind
    name: str
    path: Path | None = None

    @property
    def label(self) -> str:
        """How a reader is told."""
        texts = {
            "trace": "the trace’s own times",
            "file": f"calibrated: {self.name}",
            "gpu": f"declared: {self.name} behind {DEFAULT_LINK}",
        }
        return texts[self.kind]

    @property
    def option(self) -> str:
        """What `simulate` is told."""
        return {"trace": "", "file": f"--machine {self.path}", "gpu": f"--gpu {self.name}"}[
            self.kind
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One configuration as asked. `link` is OWN or what `--link` takes; `batch` None replays the recorded batches."""

    slots: int
    cache: str = "lru"
    allocation: str = "equal"
    predictor: str = "none"
    params: tuple[tuple[str, float], ...] = ()
    link: str = OWN
    batch: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Desk:
    """A trace on a machine, ready to be asked. `key` names both and everything that was read for them."""

    key: tuple[Any, ...]
    whole: Forecaster = field(repr=False)
    judge: Judge = field(repr=False)
    passes: int
    total_passes: int | None

    @property
    def shape_experts(self) -> int:
        """Experts of the whole model."""
        return self.whole.shape.total_experts


def machines_for(catalog: Catalog, trace: Found[Manifest]) -> list[MachineChoice]:
    """Machines that predictions for a trace can be made on, the most trustworthy first."""
    found: list[MachineChoice] = []
    for machine in catalog.machines:
        try:
            check_shape(machine.value.shape, trace.value.shape)
        except ExpertFlowError:
            continue
        found.append(MachineChoice("file", machine.name, machine.path))
    if "steps" in trace.value.recorded:
        found.append(MachineChoice("trace", "trace"))
    if trace.value.shape.expert_bytes > 0:
        from ..simulator.hardware_profiles import GPUS

        found += [MachineChoice("gpu", name) for name in GPUS]
    return found


def desk_for(trace: Found[Manifest], machine: MachineChoice) -> Desk | Problem:
    """Get ready, once per version of the files; or say what is wrong with them."""
    try:
        machine_key = file_key(machine.path) if machine.path else None
        return _desk(trace_key(trace), machine, machine_key)
    except (*BAD_INPUT, ExpertFlowError) as error:
        return Problem(f"{trace.name}: prediction", reason_of(error, trace.path, trace.path))


@lru_cache(maxsize=4)
def _desk(key: FileKey, machine: MachineChoice, machine_key: FileKey | None) -> Desk:
    opened = Trace.open(Path(key.path).parent)
    total = opened.manifest.rows("routing")
    cut = beginning(opened)
    ready = _forecaster(cut, machine)
    return Desk(
        key=(key, machine, machine_key),
        whole=ready,
        judge=judge_of(ready, with_curves=True),
        passes=len(ready.workload.steps),
        total_passes=None if cut is opened else _all_passes(ready, cut, total),
    )


def _forecaster(trace: Trace, machine: MachineChoice) -> Forecaster:
    if machine.kind == "trace":
        return forecaster(trace)
    if machine.kind == "gpu":
        return forecaster(trace, machine=machine_of(trace.shape, machine.name, DEFAULT_LINK))
    assert machine.path is not None
    return forecaster(trace, machine=read_machine(machine.path))


def _all_passes(ready: Forecaster, cut: Trace, total_rows: int) -> int:
    """Passes of the whole trace, about: as many rows each as in the beginning."""
    rows = cut.manifest.rows("routing")
    return round(len(ready.workload.steps) * total_rows / max(rows, 1))


_compiling = threading.Lock()
_compiled: set[str] = set()


def is_warm() -> bool:
    """Whether the engine answers at once; it is compiled at the first question of a process."""
    return "engine" in _compiled


def warm(desk: Desk) -> None:
    """Compile what questions need, once per process (Numba keeps the result on disk for the next one)."""
    with _compiling:
        if is_warm():
            return
        slots = max(1, desk.shape_experts // 2)
        for predictor in ("none", "synthetic", "gate_lookahead"):
            if engine_for(make_spec(slots=slots)) == "compiled" and can_predict(desk, predictor):
                ask(desk, Question(slots=slots, predictor=predictor))
        _compiled.add("engine")


def can_predict(desk: Desk, predictor: str) -> bool:
    """Whether the trace can feed a predictor."""
    needs = predictors.get(predictor).needs
    return feasible(needs, desk.whole.workload, desk.whole.costs)


def members(desk: Desk, family: Literal["cache", "allocation", "predictor"]) -> list[str]:
    """Lossless members of a family that can be deployed and that this trace can feed."""
    registry = {"cache": caches, "allocation": allocations, "predictor": predictors}[family]
    return [
        name
        for name in registry.names()
        if registry.get(name).is_lossless
        and "future" not in registry.get(name).needs
        and feasible(registry.get(name).needs, desk.whole.workload, desk.whole.costs)
    ]


def spec_of(desk: Desk, question: Question) -> PolicySpec:
    """The policy of a question, taught by the learning half. Raises UsageError."""
    lessons = tuple(sorted(predictors.get(question.predictor).needs & set(LESSONS)))
    taught = _taught(desk.key, lessons) if lessons else desk.judge
    return make_spec(
        slots=question.slots,
        cache=question.cache,
        allocation=question.allocation,
        predictor=question.predictor,
        predictor_params=dict(question.params),
        popularity=taught.popularity,
        curves=taught.curves,
        lessons=taught.lessons,
    )


@lru_cache(maxsize=8)
def _taught(key: tuple[Any, ...], lessons: tuple[str, ...]) -> Judge:
    return judge_of(_desk(*key).whole, with_curves=True, lessons=lessons)


def ask(desk: Desk, question: Question, *, with_bounds: bool = False) -> Result:
    """The predicted result of a configuration. Raises UsageError for what cannot be."""
    return _answer(desk.key, question, with_bounds)


@lru_cache(maxsize=4096)
def _answer(key: tuple[Any, ...], question: Question, with_bounds: bool) -> Result:
    desk = _desk(*key)
    ready = desk.judge.forecaster
    if question.link != OWN:
        link = parse_link(question.link)
        ready = replace(
            ready, costs=ready.costs.with_link(link), link=link.text, link_origin="declared"
        )
    spec = spec_of(desk, question)
    serving = _serving(key, spec, question.batch) if question.batch else None
    return ready.predict(spec, with_bounds=with_bounds, serving=serving)


def _serving(key: tuple[Any, ...], spec: PolicySpec, batch: int) -> Serving:
    """So many users who ask again once answered: batches of this size, made of the recorded sequences."""
    table = _tokens(key)
    found = read_arrivals(f"closed:{batch}", limit=table.num_sequences)
    settings = ServingSettings(max_batch=batch, max_step_tokens=max(MAX_STEP_TOKENS, batch))
    return serve(table, spec, found, settings)


@lru_cache(maxsize=4)
def _tokens(key: tuple[Any, ...]) -> TokenTable:
    return TokenTable.of(_desk(*key).judge.forecaster.workload)


def grid(
    desk: Desk,
    names: Sequence[str],
    slots: Iterable[int],
    *,
    link: str = OWN,
    advance: Callable[[], None] = lambda: None,
) -> list[tuple[str, Result]]:
    """Each cache at each size, on demand only; kept, so that a second look costs nothing."""
    found: list[tuple[str, Result]] = []
    for name in names:
        for size in slots:
            found.append((name, ask(desk, Question(slots=size, cache=name, link=link))))
            advance()
    return found


def smallest(desk: Desk, question: Question, wanted: float, low: int, high: int) -> int:
    """The fewest slots from `low` (too few) to `high` (enough) with `wanted` tokens/s, within 1 % of the model."""
    grain = max(1, desk.shape_experts // 100)
    while high - low > grain:
        middle = (low + high) // 2
        enough = ask(desk, replace(question, slots=middle)).tokens_per_s >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return high


def floor_slots(desk: Desk) -> int:
    """Fewest slots with which every decode event fits its layer's share: below it no cache can hit by recency."""
    workload = desk.judge.forecaster.workload
    sizes = np.diff(workload.ptr)[workload.event_is_decode()]
    return int(sizes.max(initial=0)) * workload.num_layers


def record(desk: Desk, spec: PolicySpec, link: str = OWN) -> tuple[RunRecord, int]:
    """The raw rows of a simulated run of the first passes, decision log included, and how many passes that is."""
    return _record(desk.key, spec.behaviour_hash(), link, _Held(spec))


class _Held:
    """Carries a policy into a cache that is keyed by its hash."""

    def __init__(self, spec: PolicySpec) -> None:
        self.spec = spec

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=8)
def _record(key: tuple[Any, ...], policy: str, link: str, held: _Held) -> tuple[RunRecord, int]:
    ready = _desk(*key).whole
    workload = ready.workload
    if link != OWN:
        declared = parse_link(link)
        ready = replace(ready, costs=ready.costs.with_link(declared), link=declared.text)
    demanded = workload.ptr[workload.event_ptr[1:]]
    passes = max(1, int(np.searchsorted(demanded, _LOG_EXPERTS)))
    passes = min(passes, len(workload.steps))
    cut = replace(ready, workload=workload.select(np.arange(passes)))
    return cut.record(held.spec), passes


def member_lines(spec: PolicySpec) -> list[tuple[str, Member, str]]:
    """Family, member and the first sentences of its own description, in the order people read them."""
    found: list[tuple[str, Member, str]] = []
    for family in FAMILIES:
        member = spec.members[family.kind]
        text = (family.get(member.name).__doc__ or "").strip()
        found.append((family.kind, member, " ".join(text.split("\n\n")[0].split())))
    return found

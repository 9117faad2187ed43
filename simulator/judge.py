"""Predicts single points of a sweep: what a policy learns comes from one half, the verdict from the other."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..tracer.errors import ExpertFlowError, UsageError
from ..tracer.records import to_json
from ..tracer.store import Trace
from .feasible import lacking
from .forecast import Forecaster, forecaster
from .hardware import machine_of, parse_cpu_expert, parse_link
from .layer_times import layer_times
from .lessons import lessons_of
from .machine import MachineFile, read_machine
from .paths import judged_on_paths
from .policy.base import LESSONS
from .policy.registry import FAMILIES, Registry
from .policy.spec import AS_ROUTED, Member, PolicySpec, depth_of, make_spec
from .reroute import rerouted
from .result import Result
from .space import Point
from .split import split_by_batch
from .sweep_row import Row, failed_row, row_of
from .workload import Workload

DEFAULT_LINK = "pcie4x16"
"""The declared link of a declared GPU where none is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Predicts points on the judging half of a trace.

    `curves` and `lessons` are there if a member needs them. `is_held_out` is false where a single batch had to serve
    for learning and judging. What was learned is of tokens under `routing`; for
    others it is learned again, from `learn`.
    """

    forecaster: Forecaster
    popularity: Sequence[Sequence[int]]
    curves: Sequence[Sequence[int]] | None = None
    lessons: Mapping[str, Any] = field(default_factory=dict)
    is_held_out: bool = True
    learn: Workload | None = None
    routing: Member = AS_ROUTED
    others: dict[str, Judge] = field(default_factory=dict, compare=False)

    def predict(self, point: Point) -> Row:
        """The line of one point; what fails is recorded in it."""
        began = time.perf_counter()
        ready = self.forecaster
        try:
            ready = self._behind(point.link)
            spec = self._spec(point, ready)
            result = ready.predict(spec, with_bounds=False)
        except Exception as cause:
            return failed_row(
                point,
                str(cause)
                if isinstance(cause, ExpertFlowError)
                else f"{type(cause).__name__}: {cause}",
                link=ready.link,
                link_origin=ready.link_origin,
                seconds=time.perf_counter() - began,
            )
        return row_of(
            point,
            spec,
            result,
            seconds=time.perf_counter() - began,
            engine=getattr(result, "engine", "reference"),
        )

    def result(self, point: Point) -> Result:
        """The whole prediction of a point, without bounds. Raises UsageError."""
        ready = self._behind(point.link)
        return ready.predict(self._spec(point, ready), with_bounds=False)

    def spec(self, point: Point) -> PolicySpec:
        """The policy of a point with what the learning half taught. Raises UsageError."""
        return self._spec(point, self._behind(point.link))

    def machine_hash(self) -> str:
        """Sixteen hex digits over the machine that predicts, its own link included."""
        ready = self.forecaster
        document = [
            to_json(ready.costs),
            ready.device,
            ready.link,
            ready.link_origin,
            ready.submit_s,
            ready.decision_is_measured,
            to_json(ready.shape),
        ]
        return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16]

    def require(self, members: Iterable[tuple[str, Member]]) -> None:
        """Refuse members, given by family, that cannot run here whatever the budget. Raises UsageError."""
        families = {family.kind: family for family in FAMILIES}
        workload = self.forecaster.workload
        for kind, member in members:
            needs = families[kind].get(member.name).needs
            if what := lacking(needs, workload, self.forecaster.costs):
                raise UsageError(f"{kind} {member.name!r} needs {what}.")
            found = families[kind].get(member.name)
            depth = depth_of(found, member.params) if "lookahead" in needs else 0
            if depth > workload.lookahead:
                raise UsageError(
                    f"{kind} {member.name!r} at depth {depth} needs look-ahead ids that deep, but the "
                    f"trace recorded {workload.lookahead}. Trace again with --lookahead {depth}."
                )
            taught = {
                need: self.lessons[need] for need in LESSONS if need in needs & self.lessons.keys()
            }
            if "layer_times" in needs:
                taught["layer_times"] = layer_times(self.forecaster.costs, workload)
            if needs <= {"lookahead", "gate_weights", "routing", *taught}:
                _build(families[kind], replace(member, params={**taught, **member.params}))

    def _behind(self, link: str | None) -> Forecaster:
        if link is None:
            return self.forecaster
        declared = parse_link(link)
        return replace(
            self.forecaster,
            costs=self.forecaster.costs.with_link(declared),
            link=declared.text,
            link_origin=declared.origin,
        )

    def _under(self, routing: Member) -> Judge:
        """The same, taught by tokens under another routing."""
        if routing == self.routing or self.learn is None:
            return self
        name = str(routing)
        if name not in self.others:
            self.others[name] = replace(
                self,
                **_taught(self.learn, routing, self.lessons, with_curves=self.curves is not None),
                routing=routing,
            )
        return self.others[name]

    def _spec(self, point: Point, ready: Forecaster) -> PolicySpec:
        names = {kind: member.name for kind, member in point.members.items()}
        taught = self._under(point.members.get("routing", AS_ROUTED))
        spec = make_spec(
            slots=point.slots,
            cache=names["cache"],
            predictor=names["predictor"],
            allocation=names["allocation"],
            scheduler=names["scheduler"],
            misses=names["misses"],
            routing=names.get("routing", AS_ROUTED.name),
            popularity=taught.popularity,
            curves=taught.curves,
            cpu_times=ready.costs.cpu_times(),
            layer_times=(
                layer_times(ready.costs, ready.workload) if "layer_times" in point.needs else None
            ),
            lessons=taught.lessons,
        )
        asked = {
            kind: replace(spec.members[kind], params={**spec.members[kind].params, **member.params})
            for kind, member in point.members.items()
            if member.params
        }
        return replace(spec, **asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """All it takes to prepare the same predictions in another process."""

    trace: Path
    machine: Path | None = None
    gpu: str | None = None
    expert_table: Path | None = None
    link: str | None = None
    cpu_expert: str | None = None
    with_curves: bool = False
    lessons: tuple[str, ...] = ()
    paths: Path | None = None

    def judge(self) -> Judge:
        """Read the trace and the machine, and learn."""
        return judge_of(self.forecaster(), with_curves=self.with_curves, lessons=self.lessons)

    def forecaster(self) -> Forecaster:
        """Read the trace and the machine. Raises UsageError for machines that contradict each other."""
        opened = Trace.open(self.trace)
        # A declared machine is made with its link; others may be put behind a declared one.
        link = parse_link(self.link) if self.link is not None and self.gpu is None else None
        ready = forecaster(opened, link=link, machine=self._machine(opened))
        if self.paths is not None:
            ready = judged_on_paths(ready, self.paths)
        if self.cpu_expert is None:
            return ready
        return replace(
            ready,
            costs=replace(ready.costs, cpu_expert=parse_cpu_expert(self.cpu_expert)),
            warnings=(*ready.warnings, f"Experts on the CPU: {self.cpu_expert}, declared."),
        )

    def _machine(self, opened: Trace) -> MachineFile | None:
        if self.machine is not None and self.gpu is not None:
            raise UsageError("--machine and --gpu both name a machine; give one of them.")
        if self.expert_table is not None and self.gpu is None:
            raise UsageError("--expert-table belongs to a declared GPU; name it with --gpu.")
        if self.gpu is not None:
            return machine_of(opened.shape, self.gpu, self.link or DEFAULT_LINK, self.expert_table)
        return read_machine(self.machine) if self.machine is not None else None


def judge_of(
    ready: Forecaster,
    *,
    with_curves: bool = False,
    lessons: Iterable[str] = (),
    learn_from_all: bool = False,
    routing: Member = AS_ROUTED,
) -> Judge:
    """Learn on half of the batches of a forecaster's workload, to judge on the others.

    `lessons` are the tables to learn (policy.base.LESSONS); others are left out. They are learned under `routing`.
    With `learn_from_all` learn from all of them: for the policy that is deployed, once it has been chosen.
    """
    learn, judged = split_by_batch(ready.workload)
    if learn_from_all:
        learn = ready.workload
    return Judge(
        forecaster=replace(ready, workload=judged),
        **_taught(learn, routing, lessons, with_curves=with_curves),
        is_held_out=judged is not learn,
        learn=learn,
        routing=routing,
    )


def _taught(
    learn: Workload, routing: Member, lessons: Iterable[str], *, with_curves: bool
) -> dict[str, Any]:
    """What a workload teaches under a routing."""
    learn = rerouted(learn, routing)
    return {
        "popularity": learn.popularity(),
        "curves": _curves(learn) if with_curves else None,
        "lessons": lessons_of(learn, lessons),
    }


def _build(family: Registry, member: Member) -> None:
    try:
        family.build(member.name, dict(member.params))
    except (ValueError, TypeError) as cause:
        raise UsageError(f"{family.kind} {member} is not possible: {cause}") from None


def _curves(learn: Workload) -> Sequence[Sequence[int]]:
    from .curves import layer_curves

    return layer_curves(learn)

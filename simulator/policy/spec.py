"""A policy as data: what `tune` writes, `simulate` replays and the runtime runs.

A spec names its members and their parameters and says for which model shape it was made. `behaviour_hash`
covers everything that changes a decision, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

from ...tracer.errors import PolicyError, UsageError
from ...tracer.records import from_json, read_json, to_json, write_json
from ...tracer.types import ModelShape
from .base import LESSONS, BaseCache, Routing, Scheduler
from .future import Future
from .log import Entry
from .registry import (
    FAMILIES,
    Registry,
    allocations,
    caches,
    misses,
    predictors,
    routings,
    schedulers,
)
from .residency import Pool, Residency

POLICY_FORMAT = "expertflow.policy/1"
_BOUND = (
    "{kind} {name!r} needs to know the future: it is a bound for the simulator and cannot be deployed. Choose another "
    "with `expertflow-trace list`."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A member of a family by name, with the parameters that differ from its defaults."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = {k: v for k, v in self.params.items() if isinstance(v, (int, float, str))}
        inside = ", ".join(f"{key}={value}" for key, value in shown.items())
        return f"{self.name}({inside})" if inside else self.name


AS_ROUTED = Member(name="as_routed")
IN_ORDER = Member(name="fcfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """See the module docstring. `slots` is the number of experts that fit on the device."""

    cache: Member
    predictor: Member
    allocation: Member
    scheduler: Member
    slots: int
    misses: Member = Member(name="load")
    routing: Member = AS_ROUTED

    @property
    def members(self) -> dict[str, Member]:
        """Members by family, in the order people read them."""
        return {
            "cache": self.cache,
            "allocation": self.allocation,
            "predictor": self.predictor,
            "scheduler": self.scheduler,
            "misses": self.misses,
            "routing": self.routing,
        }

    @property
    def code(self) -> tuple[str, ...]:
        """Its members in words, without its size: policies whose own code takes the same time."""
        return tuple(str(member) for member in self.members.values())

    def needs(self) -> frozenset[str]:
        """What must be there before this policy can run."""
        found: set[str] = set()
        for family in FAMILIES:
            found |= family.get(self.members[family.kind].name).needs
        return frozenset(found)

    @property
    def is_lossless(self) -> bool:
        """Whether the text is guaranteed to stay the same."""
        return all(family.get(self.members[family.kind].name).is_lossless for family in FAMILIES)

    @property
    def predicts(self) -> bool:
        """Whether there is a predictor whose time must be accounted for."""
        return self.predictor.name != "none"

    @property
    def reroutes(self) -> bool:
        """Whether tokens may be computed by other experts than the router chose."""
        return self.routing != AS_ROUTED

    @property
    def writes_back(self) -> bool:
        """Whether an evicted expert crosses the link as well."""
        return getattr(misses.get(self.misses.name), "writes_back", False)

    @property
    def loads_whole_layers(self) -> bool:
        """Whether a layer waits for all of its experts, whatever the router chose."""
        return getattr(predictors.get(self.predictor.name), "loads_whole_layers", False)

    @property
    def reads_routing(self) -> bool:
        """Whether the predictor looks at what single tokens chose."""
        return "routing" in predictors.get(self.predictor.name).needs

    @property
    def lookahead_depth(self) -> int:
        """How many layers ahead gates must be applied early; 0 if no member asks for it."""
        if "lookahead" not in self.needs():
            return 0
        return depth_of(predictors.get(self.predictor.name), self.predictor.params)

    def may_settle(self, total_experts: int) -> bool:
        """Whether, once every expert is in a slot, nothing is left to decide, and nobody listens to how events go."""
        keeps = caches.get(self.cache.name).released is BaseCache.released
        listens = self.predicts or self.reroutes or "gate_weights" in self.needs()
        return self.slots >= total_experts and keeps and not listens and self.scheduler == IN_ORDER

    def describe(self) -> dict[str, str]:
        """The policy in words, for results."""
        return {
            **{family: str(member) for family, member in self.members.items()},
            "slots": str(self.slots),
        }

    @property
    def label(self) -> str:
        """A short name: cache, allocation unless equal, predictor unless none, slots."""
        parts = [str(self.cache)]
        if self.allocation.name != "equal":
            parts.append(str(self.allocation))
        if self.predicts:
            parts.append(str(self.predictor))
        if self.scheduler != IN_ORDER:
            parts.append(str(self.scheduler))
        if self.misses.name != "load":
            parts.append(f"misses {self.misses.name}")
        if self.reroutes:
            parts.append(str(self.routing))
        return " + ".join(parts) + f" @ {self.slots} slots"

    def behaviour_hash(self) -> str:
        """Sixteen hex digits over everything that changes a decision."""
        document = to_json(self)
        if self.misses == Member(name="load"):
            del document["misses"]  # policies older than the family keep their hash
        if self.routing == AS_ROUTED:
            del document["routing"]
        text = json.dumps(document, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def with_slots(self, slots: int) -> PolicySpec:
        """The same policy at another size."""
        return replace(self, slots=slots)

    def build(
        self,
        shape: ModelShape,
        *,
        future: Future | None = None,
        log: list[Entry] | None = None,
    ) -> Residency:
        """Make the live decision core.

        Raises UsageError if a member needs the future and none is given, or if there is no slot.
        """
        if self.slots < 1:
            raise UsageError(f"A policy needs at least 1 slot, got {self.slots}.")
        shares = allocations.build(self.allocation.name, dict(self.allocation.params)).divide(
            shape.num_moe_layers, shape.num_experts, self.slots
        )
        pools: list[Pool] = []
        first = 0
        for share in shares:
            cache = caches.build(self.cache.name, self._params("cache", future))
            cache.size(share.slots)
            staging = cache.staging(shape.num_experts)
            end = first + share.slots + staging
            pools.append(Pool(share.layers, range(first, end), cache, staging))
            first = end
        return Residency(
            pools,
            predictors.build(self.predictor.name, self._params("predictor", future)),
            misses.build(self.misses.name, dict(self.misses.params)),
            num_experts=shape.num_experts,
            future=future,
            log=log,
        )

    def build_scheduler(self, *, knows_future: bool = False) -> Scheduler:
        """Make the live scheduler. Raises UsageError if it needs a future that is not known."""
        name = self.scheduler.name
        if "future" in schedulers.get(name).needs and not knows_future:
            raise UsageError(_BOUND.format(kind="scheduler", name=name))
        return schedulers.build(name, dict(self.scheduler.params))

    def build_routing(self) -> Routing:
        """Make the live routing."""
        return build_routing(self.routing)

    def _params(self, family: str, future: Future | None) -> dict[str, Any]:
        member = self.members[family]
        params = dict(member.params)
        registry = next(f for f in FAMILIES if f.kind == family)
        if "future" in registry.get(member.name).needs:
            if future is None:
                raise UsageError(_BOUND.format(kind=family, name=member.name))
            params["future"] = future
        return params


def build_routing(member: Member) -> Routing:
    """Make a routing from its name and parameters. Raises UsageError."""
    return routings.build(member.name, dict(member.params))


def depth_of(member: type, params: Mapping[str, Any]) -> int:
    """Layers ahead at which a member wants gates applied, 1 if it takes no such parameter.

    The parameter is `depth`, or what the member's `depth_param` names: a member that names one looks that deep at most
    and chooses by itself.
    """
    name, default = _own_depth(member)
    return int(params.get(name, default))


@cache
def _own_depth(member: type) -> tuple[str, int]:
    name = getattr(member, "depth_param", "depth")
    found = signature(member).parameters.get(name)
    return name, 1 if found is None or found.default is found.empty else found.default


def make_spec(
    *,
    slots: int,
    cache: str = "lru",
    predictor: str = "none",
    allocation: str = "equal",
    scheduler: str = "fcfs",
    misses: str = "load",
    routing: str = AS_ROUTED.name,
    popularity: Sequence[Sequence[int]] | None = None,
    curves: Sequence[Sequence[int]] | None = None,
    cpu_times: Mapping[str, float] | None = None,
    layer_times: Mapping[str, float] | None = None,
    lessons: Mapping[str, Any] | None = None,
    predictor_params: Mapping[str, Any] | None = None,
    cache_params: Mapping[str, Any] | None = None,
    routing_params: Mapping[str, Any] | None = None,
    scheduler_params: Mapping[str, Any] | None = None,
) -> PolicySpec:
    """Build a spec from names, checking each.

    What a trace or a machine teaches is given to the members that need it: `popularity[layer][expert]` demands,
    `curves[layer][slots]` hits of an LRU of so many slots, `cpu_times` as Sooner takes them, `layer_times` as
    simulator.layer_times gives them; `lessons` are tables by need for predictors that learn (simulator.lessons). Raises
    UsageError for unknown names and for needs not met.
    """
    learned = {
        "popularity": popularity,
        "curves": curves,
        "cpu_times": cpu_times,
        "layer_times": layer_times,
        **dict.fromkeys(LESSONS),
        **(lessons or {}),
    }
    given = {
        "predictor": predictor_params,
        "cache": cache_params,
        "routing": routing_params,
        "scheduler": scheduler_params,
    }
    names = {
        "cache": cache,
        "predictor": predictor,
        "allocation": allocation,
        "scheduler": scheduler,
        "misses": misses,
        "routing": routing,
    }
    members = {
        registry.kind: _member(registry, names[registry.kind], learned, given.get(registry.kind))
        for registry in FAMILIES
    }
    return PolicySpec(slots=slots, **members)


def _member(
    registry: Registry,
    name: str,
    learned: Mapping[str, Any],
    given: Mapping[str, Any] | None,
) -> Member:
    params: dict[str, Any] = {}
    for need in sorted(registry.get(name).needs & learned.keys()):
        if learned[need] is None:
            raise UsageError(
                f"{registry.kind} {name!r} needs {_TEACHERS[need]}, and there is none."
            )
        if need == "cpu_times":
            params.update(learned[need])
        else:
            is_as_it_is = need == "layer_times" or need in LESSONS
            params[need] = learned[need] if is_as_it_is else [list(row) for row in learned[need]]
    return Member(name=name, params=params | dict(given or {}))


_TEACHERS = {
    "popularity": "popularity counts of a trace",
    "curves": "hit curves of a trace by layer",
    "cpu_times": "times of an expert on the CPU (calibrate --cpu-experts, or declare it with --cpu-expert 2ms+0.3ms)",
    "layer_times": "the times of a copy and of a layer (simulator.layer_times)",
    "forest": "a forest that corrects early gates, learned from a trace",
    "transitions": "counts of experts by the expert before them, learned from a trace",
    "token_table": "experts by token id, learned from a trace",
    "activations": "activation matrices of sequences, learned from a trace",
    "maps": "token paths, learned from a trace",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFile:
    """`policy.json`: the spec, the shape it fits, and the evidence it was chosen on."""

    behaviour: PolicySpec
    behaviour_hash: str
    shape: ModelShape
    budget: str
    trace: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    format: str = POLICY_FORMAT


def write_policy(path: Path, policy: PolicyFile) -> None:
    """Write `policy.json` atomically."""
    write_json(path, policy)


def read_policy(path: Path) -> PolicyFile:
    """Read and check `policy.json`. Raises PolicyError."""
    try:
        document = read_json(path, PolicyError)
    except RecursionError:
        raise PolicyError(f"{path} is not readable JSON: nested too deep.") from None
    found = document.get("format") if isinstance(document, dict) else None
    if found != POLICY_FORMAT:
        raise PolicyError(
            f"{path} is not a policy file: format is {found!r}, expected {POLICY_FORMAT!r}. "
            "Make one with `expertflow-trace tune TRACE --budget 0.5 --out policy.json`."
        )
    try:
        policy = from_json(PolicyFile, document, path.name)
    except PolicyError:
        raise
    except Exception as cause:
        raise PolicyError(f"{path} is damaged: {cause}") from None
    if policy.behaviour.behaviour_hash() != policy.behaviour_hash:
        raise PolicyError(
            f"{path} was changed by hand: its behaviour hash does not match. Run `expertflow-trace tune` "
            "again, or pass the members to `simulate`."
        )
    return policy


def check_shape(made_for: ModelShape, found: ModelShape) -> None:
    """Refuse a policy made for another model. Raises PolicyError naming what differs."""
    for name in ("num_moe_layers", "num_experts", "top_k"):
        wanted, got = getattr(made_for, name), getattr(found, name)
        if wanted != got:
            raise PolicyError(
                f"The policy was made for {made_for.model_id} ({name} {wanted}), but "
                f"{found.model_id} has {got}. Tune on a trace of this model."
            )

"""What offloading is measured against, as runs like any other: results of one shape, one text, one budget.

Two run without a policy: the model as transformers runs it, and Accelerate's device map. The others are policies from
the families; the plainest ones that are in use elsewhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..simulator.budget import parse_budget
from ..simulator.policy.spec import PolicyFile, PolicySpec, check_shape, make_spec
from ..simulator.result import Result
from ..tracer.errors import ResourceError, UsageError, unknown_name
from ..tracer.generate import Generated
from ..tracer.load import choose_device, load_model
from ..tracer.placement import choose_residency, choose_tier
from ..tracer.types import ModelShape
from .accelerated import accelerated_runs, drop_weights
from .deploy import Prepared, RunRequest, load, path_predictor, same_text
from .machine import Machine
from .room import Room, room_of, unloaded
from .run_size import largest, policy_size, prompts_to_run
from .stock import PlainRuns, stock_runs

BASELINES_FORMAT = "expertflow.baselines/1"
POLICY = "policy"
"""The name of the policy that is compared with the baselines."""

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Baseline:
    """One way to run a model. `spec` makes its policy from the shape and the slots; None: it runs without one."""

    name: str
    words: str
    spec: Callable[[ModelShape, int], PolicySpec] | None = None


def whole_layer(shape: ModelShape, slots: int) -> PolicySpec:
    """Every layer crosses the link in every pass, into room for two of them or what there is."""
    return make_spec(
        slots=min(slots, 2 * shape.num_experts),
        cache="fifo",
        predictor="whole_layer",
        allocation="global",
        popularity=unknown_popularity(shape),
    )


def all_resident(shape: ModelShape, slots: int) -> PolicySpec:
    """Every expert in a slot from the start, whatever the budget: what the runtime itself costs."""
    del slots
    return make_spec(
        slots=shape.total_experts, cache="static", popularity=unknown_popularity(shape)
    )


def unknown_popularity(shape: ModelShape) -> list[list[int]]:
    """Counts of a trace that nobody has recorded: all experts alike."""
    return [[0] * shape.num_experts] * shape.num_moe_layers


BASELINES: tuple[Baseline, ...] = (
    Baseline("stock", "everything on the device, transformers alone"),
    Baseline("resident", "everything on the device, in this runtime", all_resident),
    Baseline("accelerate", "Accelerate's device map: layers that do not fit come in every pass"),
    Baseline("whole_layer", "layer streaming: every expert of every layer, a layer ahead", whole_layer),
    Baseline(
        "on_demand",
        "what the router asks for, kept no longer than it is used",
        lambda shape, slots: make_spec(slots=slots, cache="none"),
    ),
    Baseline(
        "lru_write_back",
        "LRU in equal shares; what it evicts crosses the link as well (Mixtral-offloading)",
        lambda shape, slots: make_spec(slots=slots, misses="write_back"),
    ),
    Baseline(
        "lru",
        "LRU in equal shares",
        lambda shape, slots: make_spec(slots=slots),
    ),
)  # fmt: skip
NAMES = tuple(baseline.name for baseline in BASELINES)
_WHOLE = ("stock", "resident")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineRequest:
    """What to run: baselines by name, the budget they share, a policy beside them, and how often each is run."""

    run: RunRequest
    budget: str = "0.5"
    names: Sequence[str] = NAMES
    policy: PolicyFile | None = None
    repeats: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineReport:
    """Results by name, each the repeat in the middle by speed, and why others were left out."""

    model_id: str
    slots: int
    results: Mapping[str, Result]
    skipped: Mapping[str, str]
    format: str = BASELINES_FORMAT


def chosen(names: Sequence[str]) -> tuple[Baseline, ...]:
    """Baselines by name, in the order of the list. Raises UsageError."""
    for name in names:
        if name not in NAMES:
            raise unknown_name("baseline", name, NAMES)
    if not names:
        raise UsageError(f"No baseline is named; known: {', '.join(NAMES)}.")
    return tuple(baseline for baseline in BASELINES if baseline.name in names)


def count_runs(request: BaselineRequest) -> int:
    """Timed runs at most, for the progress bar."""
    return request.repeats * (len(chosen(request.names)) + (request.policy is not None))


def run_baselines(
    request: BaselineRequest, *, say: Callable[[str], None], advance: Advance
) -> BaselineReport:
    """Run them on the same prompts and the same room. Raises ResourceError if none of them can be run."""
    wanted = {baseline.name: baseline for baseline in chosen(request.names)}
    if request.repeats < 1:
        raise UsageError(f"--repeats must be at least 1, got {request.repeats}.")
    run, policy = request.run, request.policy
    model = run.model or (policy.shape.model_id if policy else "embedded")
    room = _room(model, run, policy)
    shape = room.needs.shape
    slots = policy.behaviour.slots if policy else parse_budget(request.budget, shape)
    specs = {
        name: baseline.spec(shape, slots)
        for name, baseline in wanted.items()
        if baseline.spec is not None
    }
    if policy is not None:
        specs[POLICY] = policy.behaviour
    plain = [name for name, baseline in wanted.items() if baseline.spec is None]
    skipped = _refused(room, plain, specs, slots)
    if len(skipped) == len(plain) + len(specs):
        raise ResourceError(" ".join(dict.fromkeys(skipped.values())))
    # Models that run as they stand are all in memory, whatever the policies' tier is.
    rounds = _Rounds(
        request, load(replace(run, tier="ram"), model, held_out_from=policy), slots, advance
    )
    rounds.skipped |= skipped
    say(f"{model} on {room.device}: {slots} slots for those that offload")
    runs_stock = "stock" in plain and "stock" not in skipped
    if runs_stock or run.check_text:
        rounds.stock(is_wanted=runs_stock)
    if runs_accelerate := "accelerate" in plain and "accelerate" not in skipped:
        rounds.accelerate()
    if specs := {name: spec for name, spec in specs.items() if name not in skipped}:
        if runs_accelerate or run.tier != "ram":
            rounds.load_again(model)  # Accelerate has taken the model to pieces
        rounds.policies(specs)
    if not rounds.results:
        raise ResourceError(" ".join(dict.fromkeys(rounds.skipped.values())))
    order = [*(name for name in NAMES if name in rounds.results), POLICY]
    return BaselineReport(
        model_id=shape.model_id,
        slots=slots,
        results={name: rounds.results[name] for name in order if name in rounds.results},
        skipped=rounds.skipped,
    )


def _room(model: str, run: RunRequest, policy: PolicyFile | None) -> Room:
    """What runs of a model need beside their slots. Whatever the tier, it is loaded into memory first."""
    found = unloaded(model, run)
    if policy is not None:
        check_shape(policy.shape, found.shape)
        size = policy_size(policy, run, model)
    else:
        prompts = prompts_to_run(run, model, held_out_from=None)
        size = largest(prompts, run.batch_size, run.max_new_tokens)
    room = room_of(found, size, run)
    return replace(room, needs=replace(room.needs, streams=False))


def _refused(
    room: Room, plain: Sequence[str], specs: Mapping[str, PolicySpec], slots: int
) -> dict[str, str]:
    """Those that have no room, each with the reason. `plain` ones pack no experts beside the model."""
    total = room.needs.shape.total_experts
    as_it_is = replace(room, needs=replace(room.needs, on_disk=True))
    skipped: dict[str, str] = {}
    for name in (*plain, *specs):
        try:
            if name == "accelerate":
                as_it_is.require(slots)
            elif name in _WHOLE:
                (as_it_is if name in plain else room).require_all(
                    total,
                    f"Baseline {name!r} keeps every expert on the device.",
                    "Use a device with more memory for it.",
                )
            else:
                room.require(specs[name].slots)
        except ResourceError as cause:
            skipped[name] = str(cause)
    if "stock" in plain and "stock" not in skipped:
        skipped |= _without_stock(room)
    return skipped


def _without_stock(room: Room) -> dict[str, str]:
    if choose_residency("auto", room.needs.shape, choose_device(room.device)) == "resident":
        return {}
    why = f"The resident model does not fit {room.device}, so no text is compared."
    return {"stock": why}


class _Rounds:
    """Runs what was asked for and keeps the results. `text` is the resident model's, None if it was not had."""

    def __init__(
        self, request: BaselineRequest, prepared: Prepared, slots: int, advance: Advance
    ) -> None:
        self.prepared = prepared
        self.results: dict[str, Result] = {}
        self.skipped: dict[str, str] = {}
        self._request, self._run, self._slots = request, request.run, slots
        self._advance = advance
        self._trace_id = request.policy.trace if request.policy else ""
        self._text: list[Generated] | None = None

    def stock(self, *, is_wanted: bool) -> None:
        """The resident model, whose text the others must give."""
        shape, device = self.prepared.loaded.shape, self.prepared.device
        if choose_residency("auto", shape, device) == "stream":
            return
        runs = stock_runs(self.prepared, **self._sizes(), trace_id=self._trace_id)
        if not is_wanted:
            self._text = runs.run()[1]
            return
        self._plain("stock", runs)

    def accelerate(self) -> None:
        """The model under Accelerate. Left out, with the reason, if others are asked for and it cannot run."""
        try:
            with accelerated_runs(
                self.prepared, slots=self._slots, **self._sizes(), trace_id=self._trace_id
            ) as runs:
                self._plain("accelerate", runs)
        except ResourceError as cause:
            self.skipped["accelerate"] = str(cause)

    def load_again(self, model: str) -> None:
        """Load the model for the policies, in place of the one that is there."""
        drop_weights(self.prepared.loaded.model)
        tier = choose_tier(self._run.tier)
        device = self.prepared.device
        loaded = load_model(model, device=device, dtype=self._run.dtype, tier=tier)
        self.prepared = replace(self.prepared, loaded=loaded, tier=tier)

    def policies(self, specs: Mapping[str, PolicySpec]) -> None:
        """Those that are policies, in turns, so that a machine that drifts is the same to all."""
        run, prepared = self._run, self.prepared
        machine = Machine(
            prepared.loaded,
            prepared.device,
            link=prepared.link,
            tier=prepared.tier,
            pin=run.pin,
            trace_id=self._trace_id,
            paths=path_predictor(run.paths, prepared.device, prepared.loaded.shape),
        )
        try:
            self._in_turns(machine, specs)
        finally:
            machine.close()

    def _in_turns(self, machine: Machine, specs: Mapping[str, PolicySpec]) -> None:
        prompts, size = self.prepared.prompts, self._run.batch_size
        memory = {n: machine.peak_memory(spec, prompts, size) for n, spec in specs.items()}
        found: dict[str, list[Result]] = {name: [] for name in specs}
        for _ in range(self._request.repeats):
            for name, spec in specs.items():
                record, outputs = machine.run(spec, prompts, memory=memory[name], **self._sizes())
                is_same = self._is_same(outputs)
                found[name].append(
                    machine.result(record, spec, batch_size=size, same_tokens=is_same)
                )
                self._advance(1)
        self.results |= {name: in_the_middle(runs) for name, runs in found.items()}

    def _plain(self, name: str, runs: PlainRuns) -> None:
        found: list[Result] = []
        for _ in range(self._request.repeats):
            result, outputs = runs.run()
            if name == "stock" and self._run.check_text:
                self._text = self._text or outputs
            found.append(replace(result, same_tokens=self._is_same(outputs)))
            self._advance(1)
        self.results[name] = in_the_middle(found)

    def _is_same(self, outputs: Sequence[Generated]) -> bool | None:
        return None if self._text is None else same_text(outputs, self._text)

    def _sizes(self) -> dict[str, int]:
        return {"batch_size": self._run.batch_size, "max_new_tokens": self._run.max_new_tokens}


def in_the_middle(repeats: Sequence[Result]) -> Result:
    """The repeat in the middle by speed (the slower of two); its text is the same only if that of all is."""
    middle = statistics.median_low(result.tokens_per_s for result in repeats)
    result = next(result for result in repeats if result.tokens_per_s == middle)
    if all(repeat.same_tokens is not False for repeat in repeats):
        return result
    return replace(result, same_tokens=False)

"""`expertflow-trace simulate`: predict one policy on a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...tracer.commands.options import (
    Budget,
    CpuExpert,
    DeclaredLink,
    ExpertTable,
    Gpu,
    Json,
    MachinePath,
    PathsDir,
    ResultOut,
    TraceDir,
    policy_place,
)
from ...tracer.console import print_json, print_rows, say
from .arrival_options import (
    ArrivalOptions,
    Arrivals,
    ArrivalSpeed,
    Lengths,
    MaxBatch,
    MaxStepTokens,
    Prefill,
    Requests,
    Seed,
)
from .member_params import (
    CacheParam,
    PredictorParam,
    RoutingName,
    RoutingParam,
    SchedulerName,
    SchedulerParam,
)
from .timeline_options import TimelineOut, TimelineSteps, draw_run

_OF_POLICY = (
    "budget",
    "cache",
    "predictor",
    "allocation",
    "scope",
    "misses",
    "scheduler",
    "routing",
    "cache_param",
    "predictor_param",
    "scheduler_param",
    "routing_param",
)
"""Options that a policy file answers."""


def simulate(
    context: typer.Context,
    trace: TraceDir,
    budget: Budget = "0.5",
    cache: Annotated[str, typer.Option(help="Who is evicted; see `list`.")] = "lru",
    cache_param: CacheParam = None,
    predictor: Annotated[str, typer.Option(help="Who is prefetched; see `list`.")] = "none",
    predictor_param: PredictorParam = None,
    allocation: Annotated[
        str | None, typer.Option(help="How slots are divided over layers; default: equal.")
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(help="layer (allocation equal) or global: whether layers share slots."),
    ] = None,
    misses: Annotated[str, typer.Option(help="Load, or compute on the CPU; see `list`.")] = "load",
    scheduler: SchedulerName = "fcfs",
    scheduler_param: SchedulerParam = None,
    routing: RoutingName = "as_routed",
    routing_param: RoutingParam = None,
    policy: Annotated[Path | None, typer.Option(help="A policy.json instead of the names.")] = None,
    link: DeclaredLink = None,
    machine: MachinePath = None,
    gpu: Gpu = None,
    paths: PathsDir = None,
    expert_table: ExpertTable = None,
    cpu_expert: CpuExpert = None,
    arrivals: Arrivals = None,
    max_batch: MaxBatch = None,
    requests: Requests = None,
    arrival_speed: ArrivalSpeed = None,
    lengths: Lengths = None,
    prefill: Prefill = None,
    max_step_tokens: MaxStepTokens = None,
    seed: Seed = None,
    policy_out: Annotated[
        Path | None,
        typer.Option(
            help="Write the policy as policy.json, to deploy it.",
            dir_okay=False,
            callback=policy_place,
        ),
    ] = None,
    timeline: TimelineOut = None,
    timeline_steps: TimelineSteps = None,
    out: ResultOut = None,
    as_json: Json = False,
) -> None:
    """Predict throughput, latency, traffic and memory of a policy.

    Example: expertflow-trace simulate traces/demo/trace --cache lru --predictor none --budget 0.5
    """
    from ...tracer.errors import UsageError
    from ...tracer.records import to_json, write_json
    from ...tracer.store import Trace
    from ..budget import parse_budget
    from ..judge import Opening, judge_of
    from ..policy.registry import caches, predictors, routings, schedulers
    from ..policy.spec import Member, check_shape, make_spec, read_policy, write_policy
    from ..policy_file import policy_of
    from ..report import result_rows
    from ..scope import chosen_allocation
    from .member_params import parse_params

    ready = Opening(
        trace=trace,
        machine=machine,
        gpu=gpu,
        expert_table=expert_table,
        link=link,
        cpu_expert=cpu_expert,
        paths=paths,
    ).forecaster()
    if policy is not None:
        _require_unsaid(context)
        chosen = read_policy(policy)
        check_shape(chosen.shape, ready.shape)
        spec = chosen.behaviour
    else:
        routed = Member(name=routing, params=parse_params(routings, routing, routing_param))
        taught = judge_of(
            ready, with_curves=True, lessons=predictors.get(predictor).needs, routing=routed
        )
        spec = make_spec(
            slots=parse_budget(budget, ready.shape),
            cache=cache,
            cache_params=parse_params(caches, cache, cache_param),
            predictor=predictor,
            predictor_params=parse_params(predictors, predictor, predictor_param),
            allocation=chosen_allocation(allocation, scope),
            scheduler=scheduler,
            scheduler_params=parse_params(schedulers, scheduler, scheduler_param),
            misses=misses,
            routing=routing,
            routing_params=routed.params,
            popularity=taught.popularity,
            curves=taught.curves,
            **ready.times(),
            lessons=taught.lessons,
        )
    asked = ArrivalOptions(
        arrivals=arrivals,
        max_batch=max_batch,
        requests=requests,
        arrival_speed=arrival_speed,
        lengths=lengths,
        prefill=prefill,
        max_step_tokens=max_step_tokens,
        seed=seed,
    )
    if policy_out is not None and "future" in spec.needs():
        raise UsageError(
            f"{spec.label} knows the future: it is a bound and cannot be deployed. Leave --policy-out out."
        )
    result = ready.predict(spec, serving=asked.serving(ready.workload, spec))
    draw_run(timeline, timeline_steps, ready, spec, result)
    if out is not None:
        write_json(out, result)
    if policy_out is not None:
        evidence = {"predicted": to_json(result), "calibrated": machine is not None}
        named = policy_of(spec, Trace.open(trace), budget=budget, evidence=evidence)
        write_policy(policy_out, named)
        say(f"Wrote {policy_out}. Next: expertflow-trace deploy {policy_out}")
    if as_json:
        print_json(result)
    else:
        print_rows(f"Predicted: {result.label}", result_rows(result))


def _require_unsaid(context: typer.Context) -> None:
    """Raise UsageError for options written out that a policy file answers."""
    from ...tracer.errors import UsageError

    sources = {name: context.get_parameter_source(name) for name in _OF_POLICY}
    said = [name for name, source in sources.items() if source and source.name != "DEFAULT"]
    if said:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in said)
        raise UsageError(f"--policy brings its own members and parameters; leave {words} out.")

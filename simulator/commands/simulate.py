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
    ResultOut,
    TraceDir,
)
from ...tracer.console import print_json, print_rows
from .arrival_options import (
    ArrivalOptions,
    Arrivals,
    ArrivalSpeed,
    Lengths,
    MaxBatch,
    Prefill,
    Requests,
    Seed,
)
from .member_params import CacheParam, PredictorParam


def simulate(
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
    scheduler: Annotated[str, typer.Option(help="Which sequences run together.")] = "fcfs",
    policy: Annotated[Path | None, typer.Option(help="A policy.json instead of the names.")] = None,
    link: DeclaredLink = None,
    machine: MachinePath = None,
    gpu: Gpu = None,
    paths: Annotated[
        Path | None, typer.Option(help="Folder of a path predictor; judge on its held-out prompts.")
    ] = None,
    expert_table: ExpertTable = None,
    cpu_expert: CpuExpert = None,
    arrivals: Arrivals = None,
    max_batch: MaxBatch = None,
    requests: Requests = None,
    arrival_speed: ArrivalSpeed = None,
    lengths: Lengths = None,
    prefill: Prefill = None,
    seed: Seed = None,
    out: ResultOut = None,
    as_json: Json = False,
) -> None:
    """Predict throughput, latency, traffic and memory of a policy.

    Example: expertflow-trace simulate traces/demo/trace --cache lru --predictor none --budget 0.5
    """
    from ...tracer.errors import UsageError
    from ...tracer.records import write_json
    from ..budget import parse_budget
    from ..judge import Opening, judge_of
    from ..policy.registry import caches, predictors
    from ..policy.spec import check_shape, make_spec, read_policy
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
        if cache_param or predictor_param:
            raise UsageError(
                "--policy brings its own parameters; leave --cache-param and --predictor-param out."
            )
        chosen = read_policy(policy)
        check_shape(chosen.shape, ready.shape)
        spec = chosen.behaviour
    else:
        cache_params = parse_params(caches, cache, cache_param)
        predictor_params = parse_params(predictors, predictor, predictor_param)
        taught = judge_of(ready, with_curves=True, lessons=predictors.get(predictor).needs)
        spec = make_spec(
            slots=parse_budget(budget, ready.shape),
            cache=cache,
            cache_params=cache_params,
            predictor=predictor,
            predictor_params=predictor_params,
            allocation=chosen_allocation(allocation, scope),
            scheduler=scheduler,
            misses=misses,
            popularity=taught.popularity,
            curves=taught.curves,
            cpu_times=ready.costs.cpu_times(),
            lessons=taught.lessons,
        )
    asked = ArrivalOptions(
        arrivals=arrivals,
        max_batch=max_batch,
        requests=requests,
        arrival_speed=arrival_speed,
        lengths=lengths,
        prefill=prefill,
        seed=seed,
    )
    result = ready.predict(spec, serving=asked.serving(ready.workload, spec))
    if out is not None:
        write_json(out, result)
    if as_json:
        print_json(result)
    else:
        print_rows(f"Predicted: {result.label}", result_rows(result))

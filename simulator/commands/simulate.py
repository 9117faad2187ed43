"""`expertflow-trace simulate`: predict one policy on a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...tracer.commands.options import Budget, DeclaredLink, Json, MachinePath, ResultOut, TraceDir
from ...tracer.console import print_json, print_rows


def simulate(
    trace: TraceDir,
    budget: Budget = "0.5",
    cache: Annotated[str, typer.Option(help="Who is evicted; see `list`.")] = "lru",
    predictor: Annotated[str, typer.Option(help="Who is prefetched; see `list`.")] = "none",
    allocation: Annotated[str, typer.Option(help="How slots are divided over layers.")] = "equal",
    scheduler: Annotated[str, typer.Option(help="Which sequences run together.")] = "fcfs",
    policy: Annotated[Path | None, typer.Option(help="A policy.json instead of the names.")] = None,
    link: DeclaredLink = None,
    machine: MachinePath = None,
    out: ResultOut = None,
    as_json: Json = False,
) -> None:
    """Predict throughput, latency, traffic and memory of a policy.

    Example: expertflow-trace simulate traces/demo --cache lru --predictor none --budget 0.5
    """
    from ...tracer.quantities import LinkSpec
    from ...tracer.records import write_json
    from ...tracer.store import Trace
    from ..budget import parse_budget
    from ..forecast import forecaster
    from ..machine import read_machine
    from ..policy.spec import check_shape, make_spec, read_policy
    from ..report import result_rows
    from ..split import split_by_batch

    opened = Trace.open(trace)
    ready = forecaster(
        opened,
        link=LinkSpec.parse(link) if link else None,
        machine=read_machine(machine) if machine else None,
    )
    if policy is not None:
        chosen = read_policy(policy)
        check_shape(chosen.shape, opened.shape)
        spec = chosen.behaviour
    else:
        learn, _ = split_by_batch(ready.workload)
        spec = make_spec(
            slots=parse_budget(budget, opened.shape),
            cache=cache,
            predictor=predictor,
            allocation=allocation,
            scheduler=scheduler,
            popularity=learn.popularity(),
        )
    result = ready.predict(spec)
    if out is not None:
        write_json(out, result)
    if as_json:
        print_json(result)
    else:
        print_rows(f"Predicted: {result.label}", result_rows(result))

"""`expertflow-trace break-even`: how good a predictor would have to be."""

from __future__ import annotations

from typing import Annotated

import typer

from ...tracer.commands.options import (
    Budget,
    DeclaredLink,
    ExpertTable,
    Gpu,
    Json,
    MachinePath,
    ResultOut,
    TraceDir,
)
from ...tracer.console import print_json, print_rows, progress
from .member_params import CacheParam


def break_even(
    trace: TraceDir,
    budget: Budget = "0.5",
    cache: Annotated[str, typer.Option(help="Who is evicted; see `list`.")] = "lru",
    cache_param: CacheParam = None,
    allocation: Annotated[
        str | None, typer.Option(help="How slots are divided over layers; default: equal.")
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(help="layer (allocation equal) or global: whether layers share slots."),
    ] = None,
    precision: Annotated[
        float, typer.Option(help="Share of the experts it names that are needed.")
    ] = 1.0,
    latency: Annotated[str, typer.Option(help="Its own time for every layer, e.g. 200us.")] = "0",
    horizon: Annotated[int, typer.Option(min=1, help="Layer events it looks ahead.")] = 1,
    link: DeclaredLink = None,
    machine: MachinePath = None,
    gpu: Gpu = None,
    expert_table: ExpertTable = None,
    out: ResultOut = None,
    as_json: Json = False,
) -> None:
    """Say from which recall on a predictor would pay, before anyone trains it.

    Invented predictors of rising recall replace the policy's own. They know the future and err as asked, so this is a
    forecast for the simulator; nothing of it can be deployed.

    Example: expertflow-trace break-even traces/demo/trace --budget 0.25 --precision 0.5 --latency 200us
    """
    from ...tracer.quantities import format_seconds, parse_seconds
    from ...tracer.records import write_json
    from ..break_even import break_even as find
    from ..break_even import runs_of
    from ..budget import parse_budget
    from ..judge import Opening, judge_of
    from ..policy.registry import caches
    from ..policy.spec import make_spec
    from ..scope import chosen_allocation
    from .member_params import parse_params

    latency_s = parse_seconds(latency)
    cache_params = parse_params(caches, cache, cache_param)
    ready = Opening(
        trace=trace, machine=machine, gpu=gpu, expert_table=expert_table, link=link
    ).forecaster()
    taught = judge_of(ready, with_curves=True)
    spec = make_spec(
        slots=parse_budget(budget, ready.shape),
        cache=cache,
        cache_params=cache_params,
        allocation=chosen_allocation(allocation, scope),
        popularity=taught.popularity,
        curves=taught.curves,
    )
    with progress("trying recalls", runs_of(), "predictions") as report:
        found = find(
            ready,
            spec,
            precision=precision,
            latency_s=latency_s,
            horizon=horizon,
            advance=report.advance,
        )
    if out is not None:
        write_json(out, found)
    if as_json:
        print_json(found)
        return
    rows = [
        ("finding", found.finding),
        ("without prefetch", f"{found.without_tokens_per_s:.1f} tokens/s"),
    ]
    rows += [
        (
            f"recall {point.recall:g}",
            f"{point.tokens_per_s:.1f} tokens/s ({point.gain:+.1%}); stalled {format_seconds(point.stall_s)}; "
            f"{point.useful} in time, {point.late} late, {point.wasted} wasted, {point.harmful} harmful",
        )
        for point in found.points
    ]
    rows += [
        ("perfect and free", f"{found.perfect_tokens_per_s:.1f} tokens/s"),
        ("device", found.device),
        ("link", f"{found.link} ({found.link_origin})"),
    ]
    print_rows(f"Break-even of a predictor: {found.policy}", rows)

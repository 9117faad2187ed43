"""`expertflow-trace curve`: hit rate over memory, for every cache, with its floor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...tracer.commands.options import Json, TraceDir, result_place
from ...tracer.console import print_json, print_rows, progress


def curve(
    trace: TraceDir,
    caches: Annotated[str, typer.Option(help="Caches, separated by commas; see `list`.")] = (
        "lru,lfu,static,belady"
    ),
    scope: Annotated[
        str, typer.Option(help="layer: every layer has slots of its own; global: one pool for all.")
    ] = "layer",
    out: Annotated[
        Path | None,
        typer.Option(help="Write the curves here as JSON.", dir_okay=False, callback=result_place),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how many slots are worth their memory: decode hit rate by size, r, and the floor.

    LRU is measured at every size in one pass, by layer too (in the JSON).

    Example: expertflow-trace curve traces/demo/trace --caches lru,arc,belady
    """
    from ...tracer.errors import UsageError
    from ...tracer.records import to_json, write_json
    from ...tracer.store import Trace
    from ..capacity import SHARES, capacity_curve, lru_rates
    from ..costs import free_machine
    from ..feasible import lacking
    from ..policy.registry import caches as registry
    from ..scope import allocation_of
    from ..split import split_by_batch
    from ..workload import workload_of

    allocation = allocation_of(scope)
    names = [name.strip() for name in caches.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--caches names none; known: {', '.join(registry.names())}.")
    needs = {name: registry.get(name).needs for name in names}
    opened = Trace.open(trace)
    workload = workload_of(opened)
    for name in names:
        if what := lacking(needs[name], workload, free_machine(opened.shape)):
            raise UsageError(f"cache {name!r} needs {what}.")
    learn, judge = split_by_batch(workload)
    with progress("replaying", len(names) * len(SHARES), "sizes") as report:
        points = capacity_curve(
            judge,
            opened.shape,
            learn.popularity(),
            names=names,
            allocation=allocation,
            advance=report.advance,
        )
    document = {
        "format": "expertflow.curve/1",
        "trace_id": opened.manifest.trace_id,
        "scope": scope,
        "points": [to_json(point) for point in points],
        "lru": {name: rates.tolist() for name, rates in lru_rates(judge, scope=scope).items()},
    }
    if out is not None:
        write_json(out, document)
    if as_json:
        print_json(document)
        return
    rows = []
    for share in SHARES:
        here = [point for point in points if point.share == share]
        rates = ", ".join(f"{point.cache} {point.hit_rate:.1%}" for point in here)
        floor = "; below the floor: some event does not fit" if here[0].is_below_floor else ""
        rows.append((f"{share:.1%} ({here[0].slots})", f"{rates}; r {here[0].ratio:.2f}{floor}"))
    print_rows("Decode hit rate by share of experts (slots)", rows)

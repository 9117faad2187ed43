"""`expertflow-trace sweep`: predict many policies on a trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...tracer.commands.options import Json, MachinePath, TraceDir
from ...tracer.console import print_json, print_rows, progress, say, warn

if TYPE_CHECKING:
    from ..judge import Judge, Opening
    from ..space import Space
    from ..sweep import Plan


def sweep(
    trace: TraceDir,
    out: Annotated[
        Path, typer.Option(help="Folder for results.parquet and sweep.json.", file_okay=False)
    ],
    space: Annotated[
        Path | None, typer.Option(help="A TOML of what to try; default: all that fits the trace.")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Share of all experts (0.5), slots (128slots) or bytes (6GiB); repeat."),
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(help="A declared link, pcie4x16 or 25GB/s+10us; repeat for several."),
    ] = None,
    machine: MachinePath = None,
    gpu: Annotated[str | None, typer.Option(help="Predict for a declared GPU.")] = None,
    expert_table: Annotated[
        Path | None, typer.Option(help="Measured MoE layer times for --gpu.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Points at a time; default: one per core.")
    ] = None,
    executor: Annotated[str, typer.Option(help="process, ray or serial.")] = "process",
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Search with Optuna where there are more points than this."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search.")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Throw away what OUT holds, or continue it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Predict many policies, budgets and links, and show which of them are worth having.

    Writes OUT/results.parquet, one row per configuration, and OUT/sweep.json: what was tried, the Pareto
    front and the best per budget. The same command again continues where it stopped.

    Example: expertflow-trace sweep traces/demo/trace --out sweeps/demo
    """
    from ...tracer.errors import unknown_name
    from ..executors import EXECUTORS, make_executor
    from ..judge import DEFAULT_LINK, Opening
    from ..sweep import plan_of

    if executor not in EXECUTORS:
        raise unknown_name("executor", executor, EXECUTORS)
    opening = Opening(trace=trace, machine=machine, gpu=gpu, expert_table=expert_table)
    links = link or ([DEFAULT_LINK] if gpu else None)
    judge, opening, chosen, wanted = _prepared(opening, space, budget, links)
    if gpu and chosen.links == (DEFAULT_LINK,) and not link:
        say(f"Link: {DEFAULT_LINK}, declared; name another with --link.")
    plan = plan_of(chosen, wanted, trials=trials, seed=seed)
    work = make_executor(executor, judge, workers=workers, opening=opening)
    _run(judge, plan, work, out, fresh=fresh, as_json=as_json)


def _prepared(
    opening: Opening, path: Path | None, budgets: list[str] | None, links: list[str] | None
) -> tuple[Judge, Opening, Space, Any]:
    """The judge, how to open it elsewhere, and the space with the options in place of its own axes."""
    from dataclasses import replace

    from ...tracer.errors import InputError, UsageError
    from ..feasible import BUDGETS, builtin_space
    from ..judge import judge_of
    from ..space import corners
    from ..space_file import Search, parse_budgets, parse_links, read_space
    from ..sweep import needed_lessons, needs_curves

    ready = opening.forecaster()
    shape = ready.shape
    space = builtin_space(ready.workload, ready.costs, parse_budgets(BUDGETS, shape))
    wanted = Search()
    if path is not None:
        space, wanted = read_space(path, shape, space)
    if budgets:
        space = replace(space, budgets=parse_budgets(budgets, shape))
    if links:
        space = replace(space, links=parse_links(links))
    with_curves, lessons = needs_curves(space), needed_lessons(space)
    opening = replace(opening, with_curves=with_curves, lessons=lessons)
    judge = judge_of(ready, with_curves=with_curves, lessons=lessons)
    try:
        judge.require(corners(space))
    except UsageError as error:
        raise InputError(
            f"{path}: {error}"
        ) from None  # the built-in space holds nothing impossible
    return judge, opening, space, wanted


def _run(judge: Judge, plan: Plan, work: Any, out: Path, *, fresh: bool, as_json: bool) -> None:
    from dataclasses import replace

    from ...tracer.errors import ExpertFlowError
    from ..executors import SerialExecutor
    from ..sweep import document_of, missing, summed_up, sweep
    from ..sweep_folder import SweepFolder, toolkit

    folder = SweepFolder(out)
    document = document_of(judge, plan)
    before = folder.open(document, fresh=fresh)
    resumed = sum(not row.error for row in folder.rows.values())
    document = replace(document, counts={**document.counts, "resumed": resumed})
    for path in folder.damaged:
        warn(f"{path} cannot be read; its points are predicted again.")
    if before is not None and (old := toolkit(before)) != (now := toolkit(document)):
        warn(f"{out} was begun with version {old} of the toolkit; this is {now}.")
    if resumed:
        say(f"{out} holds {resumed} points already; predicting what is missing.")
    is_same_search = before is None or (before.space, before.search, before.seed) == (
        document.space,
        document.search,
        document.seed,
    )
    if plan.method == "grid" and not missing(plan.points, folder.rows):
        work = SerialExecutor(judge)  # nothing to start workers for
    known = [] if is_same_search else [row for row in folder.rows.values() if not row.error]
    try:
        with work, progress("sweeping", plan.total + len(known), "points") as report:
            keys = sweep(judge, plan, folder, work, advance=report.advance, known=known)
    except BaseException as cause:
        folder.stop(summed_up(document, list(folder.rows.values()), status="interrupted"))
        if isinstance(cause, KeyboardInterrupt):
            say(
                f"{len(folder.rows)} finished points are kept in {out}. Run the same command again to continue."
            )
        raise
    document = summed_up(document, [folder.rows[key] for key in keys], status="finished")
    folder.finish(document, keys)
    if not document.counts["predicted"]:
        raise ExpertFlowError(document.warnings[-1])
    kept = len(folder.rows)
    _show(document, {key: folder.rows[key] for key in keys}, out, kept, as_json=as_json)


def _show(document: Any, rows: dict[str, Any], out: Path, kept: int, *, as_json: bool) -> None:
    """Print what was asked for now; `kept` counts the rows of earlier sweeps in the folder too."""
    from ...tracer.records import to_json
    from ..sweep_folder import RESULTS
    from ..sweep_report import best_lines, front_lines

    for text in document.warnings:
        warn(text)
    if as_json:
        print_json({**to_json(document), "rows": list(rows.values())})
        return
    aims = ", ".join(document.search["objectives"])
    print_rows(
        f"Pareto front ({aims}) on {document.machine.device}, link "
        f"{', '.join(document.machine.links)}",
        front_lines(document, rows),
    )
    print_rows("Best", best_lines(document, rows))
    earlier = f", {kept - len(rows)} of earlier sweeps" if kept > len(rows) else ""
    say(f"Wrote {out / RESULTS} ({kept} rows{earlier}) and {out / 'sweep.json'}.")

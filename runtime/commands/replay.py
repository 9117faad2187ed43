"""`expertflow-trace replay`: run a model of real size, with random weights, on recorded routing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...simulator.commands.member_params import CacheParam, PredictorParam
from ...tracer.commands.options import (
    BatchSize,
    Budget,
    Device,
    DeviceMemory,
    Dtype,
    EmulatedLink,
    Json,
    Limit,
    ResultOut,
    Threads,
    Tier,
    result_place,
)
from ...tracer.console import print_json, print_rows, progress, say, warn

if TYPE_CHECKING:
    from ...simulator.policy.spec import PolicySpec
    from ...tracer.types import ModelShape
    from ..replay.run import Replay
    from ..room import Room


def replay(
    config: Annotated[
        str,
        typer.Argument(
            help="Shape by name (olmoe-1b-7b, gpt-oss-20b, qwen3-30b-a3b, mixtral-8x7b), or a folder with config.json.",
            metavar="CONFIG",
        ),
    ],
    trace: Annotated[
        Path | None, typer.Option(help="Trace folder whose routing is replayed.", metavar="DIR")
    ] = None,
    routing: Annotated[
        Path | None,
        typer.Option(
            help="Another tool's recording instead: npz, vLLM, SGLang, llama.cpp (docs/interop.md).",
            metavar="FILE",
        ),
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="A policy.json instead of the names.")] = None,
    budget: Budget = "0.5",
    slots: Annotated[int | None, typer.Option(help="Slots, instead of a budget.")] = None,
    cache: Annotated[str, typer.Option(help="Cache: who is evicted.")] = "lru",
    cache_param: CacheParam = None,
    predictor: Annotated[str, typer.Option(help="Predictor: who is prefetched.")] = "none",
    predictor_param: PredictorParam = None,
    allocation: Annotated[str, typer.Option(help="Slots to layers.")] = "equal",
    misses: Annotated[str, typer.Option(help="Answer to misses.")] = "load",
    batch_size: BatchSize = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate per sequence.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Cut prompts to this many tokens.")] = 64,
    limit: Limit = 12,
    device: Device = "auto",
    dtype: Dtype = "auto",
    link: EmulatedLink = None,
    tier: Tier = "ram",
    threads: Threads = None,
    no_pin: Annotated[bool, typer.Option("--no-pin", help="Do not page-lock host memory.")] = False,
    no_predict: Annotated[
        bool, typer.Option("--no-predict", help="Measure only: no calibration, no forecast.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    memory: DeviceMemory = None,
    out: ResultOut = None,
    predicted_out: Annotated[
        Path | None,
        typer.Option(help="Write the forecast here.", dir_okay=False, callback=result_place),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay recorded routing on a model of real size with random weights: real times and bytes, no real text.

    Routing of another shape is stretched (docs/gpu.md). A third of the sequences serves to calibrate and to learn from.

    Example: expertflow-trace replay olmoe-1b-7b --trace traces/demo/trace --budget 0.5 --cache lru
    """
    from ...simulator.report import result_rows
    from ...tracer.errors import NotValidatedError, UsageError
    from ...tracer.records import write_json
    from ..replay.run import CALIBRATION_RUNS, ReplayRequest, open_replay
    from ..replay.run import replay as run
    from .verify import check_line

    if (trace is None) == (routing is None):
        raise UsageError("Give the routing: either --trace DIR or --routing FILE.")
    if predicted_out is not None and no_predict:
        raise UsageError("--predicted-out asks for a forecast, and --no-predict for none.")
    request = ReplayRequest(
        config=config,
        trace=trace,
        routing=routing,
        batch_size=batch_size,
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        limit=limit,
        device=device,
        dtype=dtype,
        link=link,
        tier=tier,
        threads=threads,
        pin=not no_pin,
        seed=seed,
        memory=memory,
    )
    budget = budget if slots is None else f"{slots}slots"

    def require(room: Room) -> None:
        room.require(_slots(room.needs.shape, policy, budget))

    with progress("drawing weights", None, "experts") as report:
        opened = open_replay(request, say=say, advance=report.advance, require=require)
    try:
        spec = _spec(
            opened,
            policy=policy,
            budget=budget,
            names={
                "cache": cache,
                "predictor": predictor,
                "allocation": allocation,
                "misses": misses,
            },
            params={"cache": cache_param, "predictor": predictor_param},
        )
        runs = 1 if no_predict else CALIBRATION_RUNS + 1
        with progress("replaying", runs, "runs") as report:
            found = run(opened, spec, predicts=not no_predict, advance=report.advance)
    finally:
        opened.machine.close()
    for words in found.measured.warnings:
        warn(words)
    if out is not None:
        write_json(out, found.measured)
    if predicted_out is not None:
        write_json(predicted_out, found.predicted)
    if as_json:
        print_json(found.measured)
    else:
        rows = result_rows(found.measured)
        rows.append(("log replays", "yes" if found.measured.log_replays else "NO"))
        if found.checked is not None:
            rows += [(check.quantity, check_line(check)) for check in found.checked.checks]
        print_rows(f"Measured under replay: {found.measured.label}", rows)
    if found.measured.log_replays is False:
        raise NotValidatedError("The decision log does not replay.")


def _slots(shape: ModelShape, policy: Path | None, budget: str) -> int:
    """Slots of the policy to come."""
    from ...simulator.budget import parse_budget
    from ...simulator.policy.spec import check_shape, read_policy

    if policy is None:
        return parse_budget(budget, shape)
    chosen = read_policy(policy)
    check_shape(chosen.shape, shape)
    return chosen.behaviour.slots


def _spec(
    opened: Replay,
    *,
    policy: Path | None,
    budget: str,
    names: dict[str, str],
    params: dict[str, list[str] | None],
) -> PolicySpec:
    """The policy of a file, or made of names and of what other sequences teach."""
    from ...simulator.budget import parse_budget
    from ...simulator.commands.member_params import parse_params
    from ...simulator.lessons import lessons_of
    from ...simulator.policy.registry import caches, predictors
    from ...simulator.policy.spec import check_shape, make_spec, read_policy
    from ...tracer.errors import UsageError

    shape = opened.machine.loaded.shape
    if policy is not None:
        if any(params.values()):
            raise UsageError("--policy brings its own parameters; leave those of members out.")
        chosen = read_policy(policy)
        check_shape(chosen.shape, shape)
        return chosen.behaviour
    lesson = opened.lesson()
    return make_spec(
        slots=parse_budget(budget, shape),
        cache=names["cache"],
        predictor=names["predictor"],
        allocation=names["allocation"],
        misses=names["misses"],
        cache_params=parse_params(caches, names["cache"], params["cache"]),
        predictor_params=parse_params(predictors, names["predictor"], params["predictor"]),
        popularity=lesson.popularity(),
        lessons=lessons_of(lesson, predictors.get(names["predictor"]).needs - {"token_table"}),
    )

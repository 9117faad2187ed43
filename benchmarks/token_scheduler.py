"""The token scheduler: distinct experts, hits and time, net of what it costs, in the simulator and for real.

1. Text: the embedded model's held-out text, cut into prompts of six domains in mixed order. A path predictor learns on
   four fifths of the documents; the prompts of the others are run.
2. Batches in the order they came, the same in turns, and regrouped: by the routes of the tokens before, by predicted
   paths, and (simulated only) by the true routes. Behind an emulated link, with LRU; the measured runs take turns.
3. The same on published routing of gpt-oss-20b, simulated on a declared machine.

Exits 1 if a text differs or a log does not replay.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import GPT_OSS, ROOT, Report, Table, options_of, parser, shape_of, write_block
from bench_embedded import built, cut, hint, rows_of, traced
from expertflow.runtime.calibrate import Calibration
from expertflow.runtime.deploy import same_text
from expertflow.runtime.machine import Machine, device_name, generate_all
from expertflow.runtime.paths.build import add_paths
from expertflow.runtime.paths.files import load_predictor
from expertflow.simulator.forecast import Forecaster, forecaster
from expertflow.simulator.hardware import machine_of
from expertflow.simulator.machine import MachineFile
from expertflow.simulator.paths import judged_on_paths
from expertflow.simulator.policy.spec import PolicySpec, make_spec
from expertflow.simulator.result import MemoryResult, Result
from expertflow.simulator.workload import Rows, Steps, Workload, build_workload
from expertflow.tracer.generate import Generated, Prompt
from expertflow.tracer.load import LoadedModel, choose_device, load_model
from expertflow.tracer.placement import use_threads
from expertflow.tracer.probe import provenance
from expertflow.tracer.prompts import MAX_PROMPT_TOKENS, read_prompts, tokenize
from expertflow.tracer.quantities import LinkSpec, format_bytes, format_seconds

SCRIPT = "token_scheduler.py"
PAGE = ROOT / "docs" / "token-scheduler.md"
LINK = "1GB/s+20us"
BUDGETS = (0.25, 0.5)
NO_MEMORY = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)
GPU, BUS = "rtx4090", "pcie4x16"
GPT_OSS_KV = 24 * 2 * 8 * 64 * 2
"""Bytes of KV cache per token: layers, keys and values, heads of 64, at 16 bits (the model's config)."""


@dataclass(frozen=True)
class Size:
    """How much of everything. `runs` are (batch, batches in a unit, prompts, whether it is measured too)."""

    pieces: int | None
    new_tokens: int
    epochs: int
    runs: tuple[tuple[int, int, int, bool], ...]
    repeats: int
    published: int


RUNS = ((4, 2, 16, True), (4, 4, 16, False), (16, 2, 64, False), (16, 4, 64, True))
FULL = Size(400, 16, 15, RUNS, 2, 128)
QUICK = Size(40, 4, 1, ((4, 2, 8, True),), 1, 4)


@dataclass(frozen=True)
class Way:
    """One way to make batches: its name for readers, and the scheduler."""

    words: str
    scheduler: str
    params: dict[str, Any]

    @property
    def is_bound(self) -> bool:
        """Whether it cannot be run for real."""
        return self.scheduler == "route_oracle"


def ways_of(batches: int) -> list[Way]:
    """The ways that are compared, for units of so many batches."""
    return [
        Way("as they came", "fcfs", {}),
        Way("in turns", "fcfs", {"batches": batches}),
        Way("previous routes", "route_similarity", {"batches": batches}),
        Way("previous routes, any gain", "route_similarity", {"batches": batches, "min_gain": 0.0}),
        Way("predicted paths", "path_similarity", {"batches": batches}),
        Way("true routes (bound)", "route_oracle", {"batches": batches, "min_gain": 0.0}),
    ]


def main() -> None:
    """Learn, run, simulate, and say what was found."""
    options = options_of(parser(__doc__))
    size = QUICK if options.quick else FULL
    report = Report(SCRIPT, options)
    use_threads(1, choose_device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        embedded(report, Path(name), size)
    published(report, size)
    if options.write:
        write_block(PAGE, SCRIPT, report.text())
    options.write = False  # the other page is not ours
    report.finish()


# --- the embedded model --------------------------------------------------------------------------


def embedded(report: Report, folder: Path, size: Size) -> None:
    """Everything on the embedded model, predicted and measured."""
    learn, judge = divided(folder, size)
    card = built(
        traced(folder / "learn", learn, size.new_tokens, 16), folder / "predictor", size.epochs
    )
    device = choose_device("cpu")
    loaded = load_model(None, device=device)
    prompts = tokenize(loaded.tokenizer, read_prompts(judge), MAX_PROMPT_TOKENS)
    traces = {}
    for batch, _, count, _ in size.runs:
        if batch not in traces:
            traces[batch] = traced(folder / f"judge-{batch}", judge, size.new_tokens, batch, count)
            add_paths(traces[batch].path, folder / "predictor", device="cpu")
    loaded.model.to(device)
    texts = {
        batch: resident(loaded, prompts, batch, count, size) for batch, _, count, _ in size.runs
    }
    model, _ = load_predictor(folder / "predictor", device)
    machine = Machine(loaded, device, link=LinkSpec.parse(LINK), paths=model)
    rows: list[tuple[str, ...]] = []
    sound: list[bool] = []
    forecasters: dict[int, Forecaster] = {}
    for batch, batches, count, is_measured in size.runs:
        if batch not in forecasters:
            others = prompts[-max(4, batch) :]
            forecasters[batch] = calibrated(machine, others, traces[batch], batch, size, folder)
        ready = forecasters[batch]
        chosen = chosen_of(prompts, count)
        for budget in BUDGETS:
            hint(f"batch {batch}, units of {batches}, {budget:.0%}")
            where = f"{batches} × {batch}, {budget:.0%}"
            specs = [spec_of(way, budget, ready.shape.total_experts) for way in ways_of(batches)]
            measured: list[list[Result]] = [[] for _ in specs]
            if is_measured:
                measured = run_all(machine, specs, chosen, batch, size, texts[batch])
            sound += [bool(r.same_tokens and r.log_replays) for runs in measured for r in runs]
            for way, spec, runs in zip(ways_of(batches), specs, measured, strict=True):
                predicted = ready.predict(spec, with_bounds=False)
                rows.append((where, *line(way, predicted, runs)))
    machine.close()
    report.table(
        Table(
            f"Embedded model, LRU in equal shares, link emulated at {LINK}, {size.new_tokens} new tokens: the faster "
            f"of {size.repeats} runs, which take turns. Distinct: experts per decode pass and layer. Loaded: bytes of "
            "experts per generated token. Cost: choosing and moving, share of decoding time, predicted / measured",
            (
                "units × batch, budget", "batches", "distinct predicted", "measured", "decode hits predicted",
                "measured", "loaded per token", "decode tokens/s predicted", "measured", "cost", "choosing, each",
                "KV copied per token",
                "same text",
            ),
            rows,
        )
    )  # fmt: skip
    found = card.metrics["in_domain"]["decode"]["k"]
    report.note(
        f"The path predictor names {found['recall']:.0%} of the routed experts of prompts that it has not seen "
        f"({card.training['parameters']:,} parameters, trained for {card.training['seconds']:.0f} s)."
    )
    share = sum(sound) / len(sound)
    report.bar(
        "runs with the resident model's text and a log that replays",
        share,
        1.0,
        "",
        at_least=True,
        always=True,
    )


def divided(folder: Path, size: Size) -> tuple[Path, Path]:
    """Prompts to learn from and to judge on, of different documents; domains in mixed order."""
    pieces = rows_of(cut(folder, None))
    judged = [piece for piece in pieces if int(piece["id"].split("-")[1]) % 5 == 0]
    learned = [piece for piece in pieces if int(piece["id"].split("-")[1]) % 5]
    random.Random(3).shuffle(judged)
    need = max(count for _, _, count, _ in size.runs) + 16
    return written(folder / "learn.jsonl", learned[: size.pieces]), written(
        folder / "judge.jsonl", judged[:need]
    )


def written(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chosen_of(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The prompts of a trace with this limit (tracer.prompts.choose_prompts), numbered anew."""
    stride = len(prompts) / count
    picked = [prompts[int(place * stride)] for place in range(count)]
    return [Prompt(number, prompt.token_ids) for number, prompt in enumerate(picked)]


def resident(
    loaded: LoadedModel, prompts: Sequence[Prompt], batch: int, count: int, size: Size
) -> list[Generated]:
    """The resident model's own text, in batches as they came."""
    return generate_all(
        loaded, chosen_of(prompts, count), batch_size=batch, max_new_tokens=size.new_tokens
    )


def calibrated(
    machine: Machine, prompts: Sequence[Prompt], trace: Any, batch: int, size: Size, folder: Path
) -> Forecaster:
    """Predictions with the costs of this machine at this batch size, on prompts the predictor has not seen."""
    hint(f"calibrating at batch {batch}")
    calibration = Calibration(machine, prompts, batch_size=batch, max_new_tokens=size.new_tokens)
    costs = calibration.measure(lambda _: None)
    found = MachineFile(
        costs=costs,
        shape=machine.loaded.shape,
        device=device_name(machine.device),
        link=machine.link_name,
        link_origin=machine.link_origin,
        batch_size=batch,
        provenance=provenance(0, "own-generation"),
    )
    return judged_on_paths(forecaster(trace, machine=found), folder / "predictor")


def spec_of(way: Way, budget: float, total: int) -> PolicySpec:
    """LRU under a scheduler."""
    return make_spec(
        slots=round(budget * total), scheduler=way.scheduler, scheduler_params=way.params
    )


def run_all(
    machine: Machine,
    specs: Sequence[PolicySpec],
    prompts: Sequence[Prompt],
    batch: int,
    size: Size,
    text: Sequence[Generated],
) -> list[list[Result]]:
    """Every policy that can be run, in turns."""
    measured: list[list[Result]] = [[] for _ in specs]
    for _ in range(size.repeats):
        for runs, spec in zip(measured, specs, strict=True):
            if "future" in spec.needs():
                continue
            record, outputs = machine.run(
                spec, prompts, batch_size=batch, max_new_tokens=size.new_tokens, memory=NO_MEMORY
            )
            is_same = same_text(outputs, text)
            runs.append(machine.result(record, spec, batch_size=batch, same_tokens=is_same))
    return measured


def line(way: Way, predicted: Result, measured: Sequence[Result]) -> Iterator[str]:
    """Cells of one way."""
    run = max(measured, key=lambda result: result.decode.tokens_per_s, default=None)
    yield way.words
    yield f"{predicted.decode.mean_distinct:.2f}"
    yield f"{run.decode.mean_distinct:.2f}" if run else "–"
    yield f"{predicted.decode.hit_rate:.1%}"
    yield f"{run.decode.hit_rate:.1%}" if run else "–"
    yield format_bytes(predicted.decode.bytes_per_token)
    yield f"{predicted.decode.tokens_per_s:.1f}"
    yield f"{run.decode.tokens_per_s:.1f}" if run else "–"
    yield f"{share(predicted)} / {share(run) if run else '–'}"
    yield choosing(run or predicted)
    yield moved(predicted)
    yield "–" if not run else "yes" if all(r.same_tokens for r in measured) else "NO"


def share(result: Result) -> str:
    """Time spent on choosing batches and moving rows."""
    return f"{result.time.schedule_s / result.decode.seconds:.1%}"


def choosing(result: Result) -> str:
    """The scheduler's own time each time it was asked, a path predictor's with it."""
    found = result.regrouping
    return format_seconds(found.decision_s / found.asked) if found and found.asked else "–"


def moved(result: Result) -> str:
    """KV bytes copied per generated token."""
    found = result.regrouping
    if found is None:
        return "–"
    return format_bytes(found.kv_bytes / (result.tokens_per_s * result.time.total_s))


# --- published routing ---------------------------------------------------------------------------


def published(report: Report, size: Size) -> None:
    """Real routing of gpt-oss-20b on a declared machine; it has no prompts and no predicted paths."""
    if not GPT_OSS.path.exists():
        report.note(f"{GPT_OSS.name}: {GPT_OSS.path.name} is absent, not simulated.")
        return
    shape = replace(
        shape_of(24, GPT_OSS.num_experts, 4, 13_200_000),
        dtype="mxfp4",
        hidden_size=2880,
        kv_bytes_per_token=GPT_OSS_KV,
    )
    machine = machine_of(shape, GPU, BUS)
    rows: list[tuple[str, ...]] = []
    for batch, batches, _, _ in size.runs:
        workload = mixed(batch, 64, size.published)
        ready = Forecaster(
            workload=workload,
            costs=machine.costs,
            shape=shape,
            trace_id=GPT_OSS.name,
            device=machine.device,
            link=machine.link,
            link_origin=machine.link_origin,
            submit_s=0.0,
            decision_is_measured=True,
            is_declared=True,
            provenance=machine.provenance,
        )
        for budget in BUDGETS:
            for way in ways_of(batches):
                if way.scheduler == "path_similarity":
                    continue
                found = ready.predict(spec_of(way, budget, shape.total_experts), with_bounds=False)
                rows.append(
                    (
                        f"{batches} × {batch}, {budget:.0%}",
                        way.words,
                        f"{found.decode.mean_distinct:.2f}",
                        f"{found.decode.hit_rate:.1%}",
                        format_bytes(found.decode.bytes_per_token),
                        f"{found.decode.tokens_per_s:.1f}",
                        share(found),
                        choosing(found),
                        moved(found),
                    )
                )
    report.table(
        Table(
            f"{GPT_OSS.name}, 64 sequences of all its data sets in mixed order, {size.published} tokens each; "
            f"predicted on a declared {GPU} behind {BUS}, LRU in equal shares",
            (
                "units × batch, budget", "batches", "distinct", "decode hits", "loaded per token", "tokens/s", "cost",
                "choosing, each", "KV copied per token",
            ),
            rows,
        )
    )  # fmt: skip


def mixed(batch: int, count: int, tokens: int) -> Workload:
    """Sequences from all over the file in batches: one decode step per token."""
    with np.load(GPT_OSS.path, allow_pickle=False) as archive:
        ids, bounds = archive["expert_ids"], archive["seq_bounds"]
    long = np.flatnonzero(np.diff(bounds) >= tokens)
    picked = np.random.default_rng(5).permutation(long)[:count]
    layers, top_k = ids.shape[1:]
    # [batch number, token, layer, row of the batch, k]
    routed = np.stack([ids[bounds[s] : bounds[s] + tokens] for s in picked])
    routed = routed.reshape(count // batch, batch, tokens, layers, top_k).transpose(0, 2, 3, 1, 4)
    steps = count // batch * tokens
    sequences = np.arange(count).reshape(count // batch, batch)
    one = np.ones(steps, np.int64)
    return build_workload(
        Steps(
            number=np.arange(steps),
            is_decode=np.ones(steps, bool),
            batch=batch * one,
            tokens=batch * one,
            context=np.tile(np.arange(1, tokens + 1), count // batch),
            member_ptr=np.arange(steps + 1) * batch,
            members=np.repeat(sequences, tokens, axis=0).reshape(-1),
        ),
        np.repeat(np.arange(steps), layers * batch),
        np.tile(np.repeat(np.arange(layers), batch), steps),
        Rows(
            experts=routed.reshape(-1, top_k).astype(np.uint16),
            sequence=np.repeat(sequences, tokens * layers, axis=0).reshape(-1).astype(np.int32),
        ),
        prompt_tokens={},
        batch_size=batch,
        num_layers=layers,
        num_experts=GPT_OSS.num_experts,
        lookahead=0,
    )


if __name__ == "__main__":
    main()

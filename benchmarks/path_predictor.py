"""The path predictor on the embedded model: recall, precision, its own time, and the time that it saves.

1. Text: the embedded model's held-out text (tracer/embedded/heldout.jsonl), cut into prompts; documents that hold one
   of the shipped prompts are left out, so that those prompts are strangers to the predictor in every way.
2. Trace the pieces, train on 70 % of them, stop by 10 %, judge on 20 %; then on the shipped prompts.
3. Once more without a domain, and judge on it: three of the six.
4. Throughput with the shipped prompts behind an emulated link, predicted and measured, next to predictors without
   training. The measured runs take turns; the medians are shown.

Exits 1 if a bar is missed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_common import ROOT, Report, Table, options_of, parser, write_block
from bench_embedded import built, cut, traced
from expertflow.runtime.machine import Machine
from expertflow.runtime.paths.build import add_paths
from expertflow.runtime.paths.files import load_predictor
from expertflow.simulator.forecast import Forecaster, forecaster
from expertflow.simulator.paths import PredictorCard, judged_on_paths
from expertflow.simulator.policy.spec import PolicySpec, make_spec
from expertflow.simulator.result import Result
from expertflow.tracer.load import choose_device, load_model
from expertflow.tracer.placement import use_threads
from expertflow.tracer.prompts import MAX_PROMPT_TOKENS, choose_prompts, read_prompts, tokenize
from expertflow.tracer.quantities import LinkSpec, format_seconds
from expertflow.tracer.store import Trace

SCRIPT = "path_predictor.py"
PAGE = ROOT / "docs" / "path-predictor.md"
LINK = "1GB/s+20us"
BUDGETS = (0.25, 0.5)
WIDTHS = ("k", "1.5k", "2k")
DOMAINS = ("code", "french", "maths")
"""Left out of training one at a time: the ones most unlike the others."""
PREDICTORS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("no predictor", "none", {}),
    ("previous token", "previous_token", {}),
    ("gate look-ahead, 1 layer", "gate_lookahead", {}),
    ("path, 2k", "path", {}),
    ("path, k", "path", {"per_token": 4}),
    ("path, k, 2 layers ahead", "path", {"per_token": 4, "horizon": 2}),
)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    pieces: int | None
    new_tokens: int
    epochs: int
    domains: tuple[str, ...]
    batches: tuple[int, ...]
    prompts: int
    repeats: int


FULL = Size(None, 48, 25, DOMAINS, (1, 4), 12, 3)
QUICK = Size(40, 8, 2, ("maths",), (1,), 2, 1)


def main() -> None:
    """Trace, train, judge, run, and say what was found."""
    options = options_of(parser(__doc__))
    size = QUICK if options.quick else FULL
    report = Report(SCRIPT, options)
    use_threads(1, choose_device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pieces = traced(folder / "pieces", cut(folder, size.pieces), size.new_tokens, 16)
        card = built(pieces, folder / "predictor", size.epochs)
        judge(report, card)
        strangers(report, folder, size)
        left_out(report, folder, pieces, size)
        throughput(report, folder, size)
    if options.write:
        write_block(PAGE, SCRIPT, report.text())
    options.write = False  # the other page is not ours
    report.finish()


def judge(report: Report, card: PredictorCard) -> None:
    """In-domain: the pieces that were held out."""
    found, training = card.metrics["in_domain"], card.training
    rows = [("path predictor", *cells(found["decode"]))]
    rows += [(name.replace("_", " "), *cells(other)) for name, other in found["baselines"].items()]
    rows.append(("chance", *(f"{card.metrics['chance'][width]:.3f}" for width in WIDTHS)))
    rows += [
        (f"path predictor, batches of {size}", *cells(other))
        for size, other in found["merged"].items()
        if size != "1"
    ]
    rows.append(("path predictor, prompts' own tokens", *cells(found["prompt"])))
    report.table(
        Table(
            f"Held-out prompts ({found['prompts']} of {len(card.prompts)}, {found['decode']['tokens']:,} decode "
            "tokens): recall / precision of the experts named per token and layer",
            ("", "k = 4", "1.5k = 6", "2k = 8"),
            rows,
        )
    )
    layers = found["decode"]
    report.table(
        Table(
            "Recall by layer",
            ("", *(str(layer) for layer in range(len(layers["k"]["recall_by_layer"])))),
            [(width, *(f"{r:.3f}" for r in layers[width]["recall_by_layer"])) for width in WIDTHS],
        )
    )
    times = [
        f"{format_seconds(step)} per decode step and {format_seconds(prompt)} per prompt of "
        f"{card.latency.prompt_tokens} tokens at batch {batch}"
        for batch, prompt, step in card.latency.points
    ]
    report.note(
        f"{training['parameters']:,} parameters, trained in {training['seconds']:.0f} s on one thread "
        f"({len(training['course'])} epochs). Its own time (median, one thread): {'; '.join(times)}."
    )
    token_table = found["baselines"]["token_table"]
    for width, bar in (("k", 0.80), ("2k", 0.95)):
        recall = found["decode"][width]["recall"]
        report.bar(f"recall at {width}", recall, bar, "", at_least=True)
        gain = recall - token_table[width]["recall"]
        report.bar(f"recall at {width} above the token table", gain, 0.0, "", at_least=True)
    report.bar("training", training["seconds"] / 60, 10.0, "min", at_least=False)


def strangers(report: Report, folder: Path, size: Size) -> None:
    """The shipped prompts, one trace per batch size, with the paths that were predicted of them."""
    rows = []
    for batch in size.batches:
        trace = traced(folder / f"shipped-{batch}", None, 32, batch, size.prompts)
        done = add_paths(trace.path, folder / "predictor", device="cpu")
        if batch == 1:
            rows.append((f"{done['held_out']} shipped prompts", *cells(done["decode"])))
    report.table(
        Table(
            "Prompts of documents that the predictor has read nothing of: recall / precision",
            ("", "k", "1.5k", "2k"),
            rows,
        )
    )


def left_out(report: Report, folder: Path, pieces: Trace, size: Size) -> None:
    """Cross-domain: trained without a domain, judged on it."""
    rows = []
    for domain in size.domains:
        card = built(pieces, folder / f"without-{domain}", size.epochs, cross_domain=domain)
        for name, words in (("cross_domain", f"{domain}, left out"), ("in_domain", "the others")):
            if name in card.metrics:
                rows.append((words, *cells(card.metrics[name]["decode"])))
                table = card.metrics[name]["baselines"]["token_table"]
                rows.append((f"{words}: token table", *cells(table)))
    report.table(Table("Cross-domain: recall / precision", ("judged on", "k", "1.5k", "2k"), rows))


def throughput(report: Report, folder: Path, size: Size) -> None:
    """Tokens per second, predicted and measured."""
    device = choose_device("cpu")
    loaded = load_model(None, device=device)
    texts = choose_prompts(read_prompts(None), size.prompts)
    prompts = tokenize(loaded.tokenizer, texts, MAX_PROMPT_TOKENS)
    model, _ = load_predictor(folder / "predictor", device)
    machine = Machine(loaded, device, link=LinkSpec.parse(LINK), paths=model)
    rows = []
    for batch in size.batches:
        trace = Trace.open(folder / f"shipped-{batch}")
        ready = judged_on_paths(forecaster(trace, link=LinkSpec.parse(LINK)), folder / "predictor")
        for budget in BUDGETS:
            specs = [spec_of(ready, name, params, budget) for _, name, params in PREDICTORS]
            predicted = [ready.predict(spec, with_bounds=False) for spec in specs]
            measured: list[list[Result]] = [[] for _ in specs]
            for _ in range(size.repeats):
                for runs, spec in zip(measured, specs, strict=True):
                    record, _ = machine.run(
                        spec,
                        prompts,
                        batch_size=batch,
                        max_new_tokens=32,
                        memory=runs[0].memory if runs else None,
                    )
                    runs.append(machine.result(record, spec, batch_size=batch))
            for place, (words, _, _) in enumerate(PREDICTORS):
                rows.append(
                    row(f"batch {batch}, {budget:.0%}", words, predicted[place], measured[place])
                )
    machine.close()
    report.table(
        Table(
            f"Shipped prompts, LRU in equal shares, link emulated at {LINK}: medians of {size.repeats} runs",
            (
                "batch, budget", "predictor", "tokens/s predicted", "measured", "decode hits predicted",
                "measured", "useful / late / wasted / harmful", "stall measured, s", "look-ahead measured, s",
            ),
            rows,
        )
    )  # fmt: skip


def spec_of(ready: Forecaster, name: str, params: dict[str, Any], budget: float) -> PolicySpec:
    """LRU with a predictor."""
    slots = round(budget * ready.shape.total_experts)
    return make_spec(slots=slots, predictor=name, predictor_params=params)


def row(where: str, words: str, predicted: Result, measured: Sequence[Result]) -> tuple[str, ...]:
    """One line of the table of runs."""
    middle = statistics.median_low([run.tokens_per_s for run in measured])
    run = next(run for run in measured if run.tokens_per_s == middle)
    assert all(one.log_replays for one in measured)
    found = run.prefetch
    outcome = (
        f"{found.useful} / {found.late} / {found.wasted} / {found.harmful}" if found.issued else "–"
    )
    return (
        where,
        words,
        f"{predicted.tokens_per_s:.1f}",
        f"{middle:.1f}",
        f"{predicted.decode.hit_rate:.1%}",
        f"{run.decode.hit_rate:.1%}",
        outcome,
        f"{run.stall_s:.2f}",
        f"{run.time.lookahead_s:.2f}",
    )


def cells(found: dict[str, Any]) -> list[str]:
    """Recall and precision at the three widths."""
    return [f"{found[width]['recall']:.3f} / {found[width]['precision']:.3f}" for width in WIDTHS]


if __name__ == "__main__":
    main()

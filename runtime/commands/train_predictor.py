"""`expertflow-trace train-predictor`: learn which experts a model's tokens will use, from a trace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ...tracer.commands.options import Device, Json, TraceDir
from ...tracer.console import print_json, print_rows, progress, say

_WIDTHS = ("k", "1.5k", "2k")


def train_predictor(
    trace: TraceDir,
    out: Annotated[Path | None, typer.Option(help="Folder to write the predictor to.")] = None,
    predict_with: Annotated[
        Path | None,
        typer.Option(help="Train nothing: add what the predictor in this folder says of DIR."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training prompts at most.")] = 25,
    batch_size: Annotated[int, typer.Option(help="Sequences per training step.")] = 8,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-2,
    patience: Annotated[
        int, typer.Option(help="Stop after so many epochs without a better validation recall.")
    ] = 5,
    hold_out: Annotated[float, typer.Option(help="Share of prompts kept for the verdict.")] = 0.2,
    validation: Annotated[float, typer.Option(help="Share of prompts to stop by.")] = 0.1,
    cross_domain: Annotated[
        str | None, typer.Option(help="Keep this domain out of training and judge on it too.")
    ] = None,
    hidden: Annotated[int, typer.Option(help="Hidden size (the paper: 32).")] = 64,
    feedforward: Annotated[int, typer.Option(help="Feed-forward size.")] = 2048,
    blocks: Annotated[int, typer.Option(help="Layers of the encoder, and of the decoder.")] = 1,
    device: Device = "auto",
    threads: Annotated[
        int, typer.Option(help="Compute threads on the CPU; weights depend on their number.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the split, the start and the order.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a predictor's.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a routing-path predictor on a trace and judge it on prompts it has not seen.

    Ctrl-C keeps the best so far.

    Example: expertflow-trace train-predictor traces/mine --out predictor
    """
    from ...tracer.errors import UsageError
    from ...tracer.load import choose_device
    from ...tracer.placement import use_threads
    from ..paths.build import PredictorRequest, add_paths, build_predictor
    from ..paths.train import Training

    if (out is None) == (predict_with is None):
        raise UsageError("Give either --out, to train a predictor, or --predict-with, to use one.")
    use_threads(threads, choose_device(device))
    if out is None:
        assert predict_with is not None
        done = add_paths(trace, predict_with, device=device, overwrite=overwrite)
        if as_json:
            print_json({"format": "expertflow.predicted_paths/1", **done})
        else:
            print_rows(f"Paths of {trace} in {predict_with}", _added(done))
        return
    request = PredictorRequest(
        trace=trace,
        out=out,
        training=Training(
            epochs=epochs, batch_size=batch_size, learning_rate=lr, patience=patience, seed=seed
        ),
        hold_out=hold_out,
        validation=validation,
        cross_domain=cross_domain,
        network={"hidden": hidden, "feedforward": feedforward, "blocks": blocks},
        device=device,
        overwrite=overwrite,
    )
    card = build_predictor(request, progress=progress, say=say)
    if as_json:
        print_json(card)
        return
    print_rows(f"Path predictor {out}", _rows(card))
    say(f"Next: expertflow-trace simulate {trace} --predictor path --paths {out}")


def _rows(card: Any) -> list[tuple[str, str]]:
    from ...tracer.quantities import format_seconds

    training, metrics = card.training, card.metrics
    rows = [
        (
            "training",
            f"{training['parameters']:,} parameters, best of {len(training['course'])} epochs is number "
            f"{training['best_epoch'] + 1}, {training['seconds']:.0f} s (ended by {training['stopped']})",
        )
    ]
    for name, words in (("in_domain", "held-out prompts"), ("cross_domain", "domain left out")):
        if name not in metrics:
            continue
        part = metrics[name]
        title = f"{words} ({part['prompts']})"
        rows.append((title, f"{part['decode']['tokens']:,} decode tokens; recall / precision"))
        rows.append(("  path predictor", _scores(part["decode"])))
        rows += [
            (f"  {other.replace('_', ' ')}", _scores(found))
            for other, found in part["baselines"].items()
        ]
        rows.append(("  path predictor, prompts' own tokens", _scores(part["prompt"])))
        rows += [
            (f"  path predictor, batches of {size}", _scores(found))
            for size, found in part["merged"].items()
            if size != "1"
        ]
    rows.append(("chance", "  ".join(f"{w} {metrics['chance'][w]:.3f}" for w in _WIDTHS)))
    domains = metrics["by_domain"]
    if len(domains) > 1:
        rows += [(f"  {name or '(none)'}", _scores(found)) for name, found in domains.items()]
    for batch, prompt_s, step_s in card.latency.points:
        rows.append(
            (
                f"own time, batch {batch}",
                f"{format_seconds(step_s)} per decode step, {format_seconds(prompt_s)} per prompt of "
                f"{card.latency.prompt_tokens} tokens on {card.latency.device}",
            )
        )
    return rows


def _added(done: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("sequences", f"{done['held_out']} of {done['sequences']} not seen by the predictor"),
        ("decode tokens", f"{done['decode']['tokens']:,}; recall / precision"),
        ("path predictor", _scores(done["decode"])),
    ]


def _scores(found: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{width} {found[width]['recall']:.3f} / {found[width]['precision']:.3f}"
        for width in _WIDTHS
    )

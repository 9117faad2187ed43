"""From a trace to a predictor's folder: split, train, judge on what was held out, and write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...simulator.paths import (
    PredictorCard,
    paths_file,
    write_paths,
)
from ...simulator.policy.spec import check_shape
from ...tracer.console import Reporter
from ...tracer.errors import UsageError
from ...tracer.load import choose_device
from ...tracer.probe import machine_name, provenance
from ...tracer.records import to_json
from ...tracer.store import Trace
from .data import Routed, Split, routed, split
from .evaluate import baselines, chance, decode_tokens, merged_scores, scores
from .files import load_predictor, require_free, write_card, write_predictor
from .latency import measure_latency
from .model import PathModel, PathShape
from .predict import path_table, ranked_experts
from .train import Trained, Training, steps_per_epoch, train

Progress = Callable[..., AbstractContextManager[Reporter]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorRequest:
    """What `train-predictor` is asked for. The network's sizes default to PathShape's."""

    trace: Path
    out: Path
    training: Training
    hold_out: float = 0.2
    validation: float = 0.1
    cross_domain: str | None = None
    network: Mapping[str, int]
    device: str = "auto"
    overwrite: bool = False


def build_predictor(
    request: PredictorRequest, *, progress: Progress, say: Callable[[str], None]
) -> PredictorCard:
    """Train a predictor on a trace and write its folder; returns the card.

    Raises UsageError if the trace does not hold what it takes.
    """
    require_free(request.out, overwrite=request.overwrite)
    device = choose_device(request.device)
    trace = Trace.open(request.trace)
    found = routed(trace)
    parts = split(
        trace,
        found,
        hold_out=request.hold_out,
        validation=request.validation,
        seed=request.training.seed,
        cross_domain=request.cross_domain,
    )
    shape = _shape(trace, request.network)
    held = {name: len(places) for name, places in parts.sequences.items()}
    say(
        f"{len(found.token):,} tokens of {len(found.number):,} sequences: {held['train']:,} to learn from, "
        f"{held['validation']:,} to stop by, {held['held_out']:,} held out; on {device}"
    )
    total = request.training.epochs * steps_per_epoch(parts, request.training)
    with progress("training", total, "steps") as report:
        trained = train(found, parts, shape, request.training, device, report)
    if trained.stopped == "interrupted":
        say(f"Interrupted: the predictor of epoch {trained.best + 1} is kept.")
    return _write(request, trace, found, parts, trained, device, say)


def add_paths(trace: Path, folder: Path, *, device: str, overwrite: bool = False) -> dict[str, Any]:
    """Predict the paths of another trace's prompts, those a predictor has not seen; returns what was done.

    Raises UsageError if it has seen them all, PolicyError if the trace is of another model.
    """
    opened = Trace.open(trace)
    model, card = load_predictor(folder, choose_device(device))
    check_shape(card.shape, opened.shape)
    path = paths_file(folder, opened.manifest.trace_id)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; pass --overwrite to replace it.")
    found = routed(opened)
    table = opened.table("sequences", columns=["sequence", "prompt_sha256"]).to_pydict()
    seen = card.seen()
    # Without a hash nobody can tell which prompt it was.
    unseen = [
        number
        for number, key in zip(table["sequence"], table["prompt_sha256"], strict=True)
        if key and key not in seen
    ]
    held = np.flatnonzero(np.isin(found.number, unseen))
    if not len(held):
        raise UsageError(
            f"The predictor in {folder} has seen every prompt of {trace} that it can tell by its hash, and it can only "
            "be judged on others. Trace other prompts with `expertflow-trace run --prompts …`."
        )
    most = min(2 * found.top_k, found.num_experts)
    write_paths(path, path_table(model, found, held, most))
    tokens = decode_tokens(found, held)
    ranked = ranked_experts(model, found, held, most)
    return {
        "trace_id": opened.manifest.trace_id,
        "sequences": len(found.number),
        "held_out": len(held),
        "decode": scores(ranked[tokens], found.experts[tokens], found.num_experts),
    }


def _shape(trace: Trace, network: Mapping[str, int]) -> PathShape:
    shape = trace.shape
    for name, size in network.items():
        if size < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {size}.")
    return PathShape(
        vocab_size=shape.vocab_size,
        num_layers=shape.num_moe_layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        **network,
    )


def _write(
    request: PredictorRequest,
    trace: Trace,
    found: Routed,
    parts: Split,
    trained: Trained,
    device: torch.device,
    say: Callable[[str], None],
) -> PredictorCard:
    model = trained.model
    most = min(2 * found.top_k, found.num_experts)
    metrics = _metrics(trace, model, found, parts, request, most)
    prompts = found.decode - found.first[:-1]
    latency = measure_latency(
        model,
        f"{machine_name(str(device))} ({device}, {torch.get_num_threads()} threads)",
        prompt_tokens=max(1, int(np.median(prompts[prompts > 0]))),
        most=most,
    )
    sha256 = write_predictor(request.out, model)
    table = path_table(model, found, parts.sequences["held_out"], most)
    write_paths(paths_file(request.out, trace.manifest.trace_id), table)
    card = PredictorCard(
        predictor=asdict(model.shape),
        weights_sha256=sha256,
        shape=trace.shape,
        trace_id=trace.manifest.trace_id,
        prompts=parts.prompts,
        training={
            **to_json(request.training),
            "hold_out": request.hold_out,
            "validation": request.validation,
            "cross_domain": request.cross_domain,
            "parameters": sum(p.numel() for p in model.parameters()),
            "threads": torch.get_num_threads(),
            "device": str(device),
            "stopped": trained.stopped,
            "best_epoch": trained.best,
            "seconds": round(sum(epoch.seconds for epoch in trained.course), 1),
            "course": [to_json(epoch) for epoch in trained.course],
        },
        metrics=metrics,
        latency=latency,
        provenance=provenance(request.training.seed, trace.manifest.provenance.text),
    )
    write_card(request.out, card)
    return card


def _metrics(
    trace: Trace,
    model: PathModel,
    found: Routed,
    parts: Split,
    request: PredictorRequest,
    most: int,
) -> dict[str, Any]:
    """Of the held-out prompts; those of the domain left out of training apart from the others."""
    held = parts.sequences["held_out"]
    ranked = ranked_experts(model, found, held, most)
    simple = baselines(found, parts)
    domain_of = _domains(trace)
    own = np.array([domain_of[int(number)] for number in found.number[held]])
    is_cross = own == request.cross_domain if request.cross_domain else np.zeros(len(own), bool)
    seed = request.training.seed
    metrics: dict[str, Any] = {"chance": chance(found.top_k, found.num_experts)}
    for name, chosen in (("in_domain", held[~is_cross]), ("cross_domain", held[is_cross])):
        if not len(chosen):
            continue
        tokens = decode_tokens(found, chosen)
        prompt = np.setdiff1d(found.tokens_of(chosen), tokens)
        metrics[name] = {
            "prompts": len(chosen),
            "decode": scores(ranked[tokens], found.experts[tokens], found.num_experts),
            "prompt": scores(ranked[prompt], found.experts[prompt], found.num_experts),
            "merged": merged_scores(found, ranked, chosen, seed),
            "baselines": {
                other: scores(guess[tokens], found.experts[tokens], found.num_experts)
                for other, guess in simple.items()
            },
        }
    metrics["by_domain"] = {
        domain: scores(ranked[tokens], found.experts[tokens], found.num_experts)
        for domain in sorted(set(own.tolist()))
        if len(tokens := decode_tokens(found, held[own == domain]))
    }
    return metrics


def _domains(trace: Trace) -> dict[int, str]:
    table = trace.table("sequences", columns=["sequence", "domain"]).to_pydict()
    return dict(zip(table["sequence"], table["domain"], strict=True))

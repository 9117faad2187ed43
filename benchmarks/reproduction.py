"""The ExpertFlow paper's tables (He et al., arXiv 2410.17954) beside ours.

1. The embedded model, measured behind an emulated link, at the paper's relative cache sizes and batch sizes: predictor
   recall of merged batches, hit ratios of PLEC and per-layer LRU, tokens/s against layer streaming, per-layer LRU with
   and without write-back, and the token scheduler, peaks of device memory against everything resident.
2. The paper's models by their shapes alone, simulated on a declared GPU and link with synthetic routing and a synthetic
   predictor: what their weights, which are not here, would have to show.

Policies learn from held-out text and are judged on the shipped prompts. Medians over rounds; every text equals the
resident model's and every log replays, or the script fails.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench_common import ROOT, Report, Table, options_of, parser, write_block
from bench_embedded import Embedded, Pair, Trials, built, cut, hint, traced
from expertflow.simulator.costs import Linear, PhaseCosts
from expertflow.simulator.forecast import Forecaster
from expertflow.simulator.hardware import machine_of
from expertflow.simulator.paths import PredictorCard
from expertflow.simulator.policy.spec import PolicySpec, make_spec
from expertflow.simulator.result import Result
from expertflow.simulator.workload import workload_of
from expertflow.tracer.load import choose_device
from expertflow.tracer.placement import use_threads
from expertflow.tracer.probe import provenance
from expertflow.tracer.quantities import format_bytes
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.types import ModelShape

SCRIPT = "reproduction.py"
PAGE = ROOT / "docs" / "reproduction.md"
LINK = "1GB/s+20us"
NEW_TOKENS = 24
GPU, BUS = "a40", "pcie4x16"
GUESSES = {"2k": (0.9, 0.45), "k": (0.85, 0.85)}
"""Recall and precision of the synthetic predictor. 2k: the paper's recall in-domain; with twice k named nearly half is
right. k: about what the embedded model's predictor reaches (docs/path-predictor.md)."""
EAGER_LAYER_S = 4.2e-3
"""Declared time of a layer in an eager framework: 628 tokens/s at batch 32, which the paper reports of Switch-128
without its scheduler, leave 51 ms for a pass of 12 decoder layers."""
STICKINESS, SKEW = 0.35, 1.0
"""Of the synthetic routing: chance that a token keeps an expert of the one before it, and spread of popularity."""
SETTINGS = ((0.5, 4), (0.5, 16), (0.25, 16))
"""Share of all experts and batch of the paper's hit ratios: CS 16 of 32 at BS 4 and 16, CS 8 at BS 16."""
PAPER_HITS = {
    (0.5, 4): ("91.90", "76.61"),
    (0.5, 16): ("85.91", "58.37"),
    (0.25, 16): ("71.89", "36.22"),
}
"""Table of cache hit ratios of Switch-32, in percent: PLEC, LRU."""


@dataclass(frozen=True)
class Contender:
    """A policy of the comparison."""

    words: str
    predictor: str = "none"
    cache: str = "lru"
    allocation: str = "equal"
    misses: str = "load"
    scheduler: str = "fcfs"
    params: Mapping[str, Any] = field(default_factory=dict)
    layers: int = 0
    """Slots for so many whole layers, whatever the budget; 0: the budget's."""

    def spec(
        self, shape: ModelShape, slots: int, popularity: Sequence[Sequence[int]]
    ) -> PolicySpec:
        """The policy with so many slots."""
        return make_spec(
            slots=self.layers * shape.num_experts or slots,
            cache=self.cache,
            allocation=self.allocation,
            predictor=self.predictor,
            predictor_params=self.params,
            misses=self.misses,
            scheduler=self.scheduler,
            popularity=popularity,
        )


LRU = Contender("(c) LRU per layer (Cache-MoE without write-back)")
BASELINES = (
    LRU,
    Contender("(b) LRU per layer with write-back (Cache-MoE)", misses="write_back"),
    Contender(
        "(a) layer streaming, two layers of slots (SE-MoE)",
        "whole_layer", "fifo", "global", layers=2,
    ),
)  # fmt: skip
PLEC = Contender("PLEC, slots re-divided", "path", "plec", "global")
OURS = (
    PLEC,
    Contender("PLEC, slots fixed per layer", "path", "plec"),
    Contender("PLEC, re-divided, resident first", "path", "plec", "global", "resident_first"),
    Contender("PLEC, re-divided, token scheduler", "path", "plec", "global", scheduler="path_similarity"),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    pieces: int | None
    epochs: int
    prompts: Mapping[int, int]
    rounds: int
    sequences: int


FULL = Size(None, 25, {4: 8, 16: 16}, 2, 32)
QUICK = Size(40, 2, {4: 8}, 1, 4)


def main() -> None:
    """Measure, simulate, and put both beside the paper."""
    options = options_of(parser(__doc__))
    size = QUICK if options.quick else FULL
    report = Report(SCRIPT, options)
    use_threads(1, choose_device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embedded_model(report, folder, size)
        shapes(report, folder, size)
    if options.write:
        write_block(PAGE, SCRIPT, report.text())
    options.write = False  # the other page is not ours
    report.finish()


# --- measured ------------------------------------------------------------------------------------


def embedded_model(report: Report, folder: Path, size: Size) -> None:
    """Part 1."""
    pieces = traced(folder / "pieces", cut(folder, size.pieces), 48, 16)
    card = built(pieces, folder / "predictor", size.epochs)
    recall_of_batches(report, card)
    popularity = workload_of(pieces).popularity()
    model = Embedded(folder, size.prompts, link=LINK, new_tokens=NEW_TOKENS)
    shape = model.shape
    resident_bytes = shape.non_expert_bytes + shape.total_experts * shape.expert_bytes
    hits: list[tuple[str, ...]] = []
    for share, batch in SETTINGS:
        if batch not in size.prompts:
            continue
        trials = model.trials(f"{share}-{batch}", batch)
        hits.append(setting(report, trials, popularity, size, share, batch, resident_bytes))
    model.machine.close()
    report.table(
        Table(
            "Decode hit ratio in percent. Paper: Switch-32, hits as in its code, where a prefetch counts that was "
            "waited for. Ours: embedded model, measured; resident when demanded, and with those waited for",
            (
                "share of experts, batch", "PLEC, paper", "LRU, paper", "PLEC, ours", "with late ones",
                "LRU, ours", "difference, paper", "difference, ours with late ones",
            ),
            hits,
        )
    )  # fmt: skip


def recall_of_batches(report: Report, card: PredictorCard) -> None:
    """The paper's B_acc: recall of a batch's union of experts, twice k named."""
    found = card.metrics["in_domain"]
    rows = [("1", *recalls(found["decode"]))]
    rows += [(size, *recalls(other)) for size, other in found["merged"].items() if size != "1"]
    report.table(
        Table(
            "Recall / precision of the routing path predictor on held-out prompts, by batches merged. Paper: recall "
            "above 0.90 in-domain for most models, 0.80–0.90 for Switch-64, above 0.95 for Qwen1.5-MoE; cross-domain "
            "0.05–0.10 less (ours: docs/path-predictor.md)",
            ("batch", "k named", "2k named"),
            rows,
        )
    )


def recalls(found: Mapping[str, Any]) -> list[str]:
    """Cells at k and 2k."""
    return [
        f"{found[width]['recall']:.3f} / {found[width]['precision']:.3f}" for width in ("k", "2k")
    ]


def setting(
    report: Report,
    trials: Trials,
    popularity: Sequence[Sequence[int]],
    size: Size,
    share: float,
    batch: int,
    resident_bytes: int,
) -> tuple[str, ...]:
    """One cache and batch size: the table of speeds and memory; returns its line of the table of hit ratios."""
    rounds: list[list[Pair]] = []
    contenders = (*BASELINES, *OURS)
    for number in range(size.rounds):
        hint(f"{share:.0%} of the experts, batch {batch}: round {number + 1} of {size.rounds}")
        ready = trials.forecaster()
        slots = round(share * ready.shape.total_experts)
        rounds.append(
            trials.round(ready, [c.spec(ready.shape, slots, popularity) for c in contenders])
        )
    noise = statistics.median(trials.noise)
    by_words = {
        contender.words: [pairs[place] for pairs in rounds]
        for place, contender in enumerate(contenders)
    }

    def speed(words: str, side: str) -> float:
        return statistics.median(getattr(pair, side).tokens_per_s for pair in by_words[words])

    rows = []
    for words, pairs in by_words.items():
        last = pairs[-1].measured
        over = [
            f"{speed(PLEC.words, side) / speed(words, side):.2f}×"
            for side in ("predicted", "measured")
        ]
        peak = last.peak_device_bytes
        all_resident = resident_bytes + last.memory.kv_cache + last.memory.activations
        rows.append(
            (
                words,
                f"{speed(words, 'predicted'):.1f} / {speed(words, 'measured'):.1f}",
                " / ".join(over),
                f"{last.decode.hit_rate:.1%}",
                f"{last.decode.mean_distinct:.1f}",
                format_bytes(last.bytes_per_token),
                format_bytes(peak),
                f"{1 - peak / all_resident:.0%}",
            )
        )
    report.table(
        Table(
            f"Embedded model, {share:.0%} of the experts, batch {batch}, {LINK} (emulated), medians of {size.rounds} "
            f"rounds; two runs of one policy differ by {noise:.1%}. The cut is of the measured peak, against the same "
            "run with every expert resident",
            (
                "", "tokens/s predicted / measured", "PLEC is faster by", "decode hits", "distinct experts",
                "moved per token", "peak device memory", "cut",
            ),
            rows,
        )
    )  # fmt: skip
    plec, lru = (by_words[words][-1].measured.decode for words in (PLEC.words, LRU.words))
    paper = PAPER_HITS[share, batch]
    return (
        f"{share:.0%}, {batch}",
        *paper,
        f"{100 * plec.hit_rate:.2f}",
        f"{100 * (plec.hit_rate + plec.late_rate):.2f}",
        f"{100 * lru.hit_rate:.2f}",
        f"{float(paper[0]) - float(paper[1]):.1f}",
        f"{100 * (plec.hit_rate + plec.late_rate - lru.hit_rate - lru.late_rate):.1f}",
    )


# --- simulated -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paper:
    """A model of the paper: layers with experts (of the decoder), experts, top-k, MB of an expert in 16 bit, GB of all
    other weights (its Table 1: parameters and share of experts), slots per layer and batch of a run, its findings."""

    name: str
    layers: int
    experts: int
    top_k: int
    expert_mb: float
    other_gb: float
    slots: int
    batch: int
    found: str

    @property
    def shape(self) -> ModelShape:
        """As the simulator knows models. Experts of the encoder, which Switch has as well, are left out."""
        return ModelShape(
            model_id=self.name,
            revision=None,
            architecture="Declared",
            dtype="bfloat16",
            num_layers=self.layers,
            moe_layers=tuple(range(self.layers)),
            num_experts=self.experts,
            top_k=self.top_k,
            expert_bytes=round(self.expert_mb * 1e6),
            non_expert_bytes=round(self.other_gb * 1e9),
            kv_bytes_per_token=self.layers * 4096,
            hidden_size=2048,
            vocab_size=32_000,
        )


MODELS = (
    Paper("Switch-32", 6, 32, 1, 9.44, 0.33, 16, 32, "2.01× over (a)"),
    Paper("Switch-64", 6, 64, 1, 9.44, 0.33, 16, 32, "3.19× over (a)"),
    Paper("Switch-128", 6, 128, 1, 9.44, 0.33, 16, 32, "5.86× over (a)"),
    Paper("Switch-128, CS 4", 6, 128, 1, 9.44, 0.33, 4, 32, "9.99× over (a); 93 % less memory"),
    Paper("Mixtral-8x7B", 32, 8, 2, 352.3, 3.2, 4, 4, "up to 1.99× over (b)"),
    Paper("Qwen1.5-MoE", 24, 60, 4, 17.3, 3.2, 4, 16, "2.2× over (b); 82 % less memory"),
    Paper("DeepSeek-MoE", 27, 64, 6, 17.3, 1.9, 8, 4, "up to 1.94× over (b); 80 % less memory"),
)


def shapes(report: Report, folder: Path, size: Size) -> None:
    """Part 2."""
    rows: list[tuple[str, ...]] = []
    models = MODELS[:1] if size is QUICK else MODELS
    for model in models:
        hint(f"{model.name}: simulated")
        rows += simulated(model, folder, size)
    guesses = " and ".join(
        f"{name}: recall {recall:g}, precision {precision:g}"
        for name, (recall, precision) in GUESSES.items()
    )
    report.table(
        Table(
            f"Shapes of the paper's models, simulated; nothing here was measured. Declared {GPU} and {BUS}; "
            f"computation bound by the device's memory, or {EAGER_LAYER_S * 1e3:.1f} ms more in every layer (an eager "
            f"framework's, declared). Synthetic routing: a token keeps an expert of the one before it with chance "
            f"{STICKINESS:g}. Synthetic predictors ({guesses}). How much faster PLEC with slots re-divided is",
            (
                "model", "slots per layer, batch", "paper", "computation", "over (a), 2k / k", "over (b), 2k / k",
                "over (c), 2k / k", "hits and late: PLEC 2k", "hits: LRU",
            ),
            rows,
        )
    )  # fmt: skip
    report.table(
        Table(
            "Memory of the same shapes, predicted: peak with PLEC's slots against every expert resident, and the slots "
            "per layer at which 93 % is saved",
            ("model", "slots per layer", "peak", "all resident", "cut", "93 % at"),
            [memory(model, folder, size) for model in models],
        )
    )


def simulated(model: Paper, folder: Path, size: Size) -> list[tuple[str, ...]]:
    """Speeds of PLEC over the baselines, on both machines."""
    ready = on_declared_machine(model, folder, size)
    costs = ready.costs
    slow = replace(costs, prefill=eager(costs.prefill), decode=eager(costs.decode))
    rows = []
    for words, machine in (("memory-bound", costs), ("eager", slow)):
        ours, others = speeds(model, replace(ready, costs=machine))
        over = [
            " / ".join(f"{found.tokens_per_s / other.tokens_per_s:.2f}×" for found in ours.values())
            for other in (others[2], others[1], others[0])
        ]
        named = ours["2k"].decode
        hits = f"{named.hit_rate:.1%} + {named.late_rate:.1%}"
        where = f"{model.slots}, {model.batch}"
        rows.append(
            (model.name, where, model.found, words, *over, hits, f"{others[0].decode.hit_rate:.1%}")
        )
    return rows


def eager(costs: PhaseCosts) -> PhaseCosts:
    """A phase with the framework's time in every layer."""
    first, *others = costs.mixer.weights
    return replace(costs, mixer=Linear((first + EAGER_LAYER_S, *others)))


def speeds(model: Paper, ready: Forecaster) -> tuple[dict[str, Result], list[Result]]:
    """PLEC by predictor, and the baselines."""
    popularity, slots = ready.workload.popularity(), model.slots * model.layers
    ours = {
        name: ready.predict(
            replace(
                PLEC, predictor="synthetic", params={"recall": recall, "precision": precision}
            ).spec(ready.shape, slots, popularity),
            with_bounds=False,
        )
        for name, (recall, precision) in GUESSES.items()
    }
    others = [
        ready.predict(one.spec(ready.shape, slots, popularity), with_bounds=False)
        for one in BASELINES
    ]
    return ours, others


def memory(model: Paper, folder: Path, size: Size) -> tuple[str, ...]:
    """Peaks of one shape."""
    ready = on_declared_machine(model, folder, size)
    ours, _ = speeds(model, ready)
    found, shape = ours["2k"], ready.shape
    beside = found.peak_device_bytes - found.memory.slots
    whole = beside + shape.total_experts * shape.expert_bytes
    slots = (0.07 * whole - beside) / shape.expert_bytes / model.layers
    return (
        model.name,
        str(model.slots),
        format_bytes(found.peak_device_bytes),
        format_bytes(whole),
        f"{1 - found.peak_device_bytes / whole:.1%}",
        f"{slots:.1f} slots per layer" if slots > 0 else "none: the rest alone is more than 7 %",
    )


def on_declared_machine(model: Paper, folder: Path, size: Size) -> Forecaster:
    """Predictions of a shape under synthetic routing."""
    trace = synthetic_trace(
        folder / f"{model.name}-{model.slots}",
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        sequences=max(size.sequences, model.batch),
        batch_size=model.batch,
        prompt_tokens=32,
        new_tokens=NEW_TOKENS,
        stickiness=STICKINESS,
        skew=SKEW,
        weights=False,
        overwrite=True,
    )
    machine = machine_of(model.shape, GPU, BUS, None)
    return Forecaster(
        workload=workload_of(trace),
        costs=machine.costs,
        shape=model.shape,
        trace_id="synthetic",
        device=machine.device,
        link=machine.link,
        link_origin="declared",
        submit_s=0.0,
        is_declared=True,
        decision_is_measured=True,
        provenance=provenance(0, "imported"),
    )


if __name__ == "__main__":
    main()

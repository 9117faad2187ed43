"""All predictors, judged by money: accuracy, what became of their prefetches, and tokens/s, predicted and measured.

1. The embedded model. What predictors learn comes from held-out text cut into pieces; they are judged on the shipped
   prompts, whose documents nobody has read. At a quarter and a half of the experts and batches of 1, 4 and 16, behind
   an emulated link. Every policy is predicted from a calibration of the same process on other prompts, then run;
   rounds are repeated, medians shown. Texts must equal the resident model's and logs must replay.
2. gpt-oss-20b's published decode routing, predicted on a declared GPU and link, for predictors that need ids only.

A verdict agrees if the predicted gain over plain LRU has the sign of the measured one, taken against LRU's runs just
before and after. Pairs whose measured gain is within the noise (two such runs), or not of one sign in all rounds,
cannot tell and are counted apart. Exits 1 if a bar is missed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_common import (
    GPT_OSS,
    ROOT,
    Report,
    Table,
    events_of,
    options_of,
    parser,
    present,
    write_block,
)
from bench_embedded import Embedded, Pair, Trials, built, cut, hint, traced
from expertflow.simulator.curves import layer_curves
from expertflow.simulator.forecast import Forecaster
from expertflow.simulator.hardware import machine_of
from expertflow.simulator.layer_times import layer_times
from expertflow.simulator.lessons import lessons_of
from expertflow.simulator.policy.registry import predictors
from expertflow.simulator.policy.spec import PolicySpec, make_spec
from expertflow.simulator.result import Result
from expertflow.simulator.workload import Workload, workload_of
from expertflow.tracer.load import choose_device
from expertflow.tracer.placement import use_threads
from expertflow.tracer.probe import provenance
from expertflow.tracer.types import ModelShape

SCRIPT = "predictors.py"
PAGE = ROOT / "docs" / "predictors.md"
LINK = "1GB/s+20us"
BUDGETS = (0.25, 0.5)
NEW_TOKENS = 24
GPU, BUS = "rtx4090", "pcie4x16"
GPT_OSS_SHAPE = ModelShape(
    model_id="gpt-oss-20b",
    revision=None,
    architecture="GptOss",
    dtype="mxfp4",
    num_layers=24,
    moe_layers=tuple(range(24)),
    num_experts=32,
    top_k=4,
    expert_bytes=13_200_000,
    non_expert_bytes=2_600_000_000,
    kv_bytes_per_token=0,
    hidden_size=2880,
    vocab_size=201_088,
)
"""Sizes from the model's public config; an expert in MXFP4 with its scales."""
LEARNED_TOKENS, JUDGED_TOKENS = 20_000, 4_000


@dataclass(frozen=True)
class Entrant:
    """A policy by its members, in the words of the table."""

    words: str
    predictor: str = "none"
    params: Mapping[str, Any] = field(default_factory=dict)
    cache: str = "lru"
    allocation: str = "equal"
    misses: str = "load"

    def spec(self, taught: Taught, ready: Forecaster, budget: float) -> PolicySpec:
        """The policy at a share of all experts."""
        return make_spec(
            slots=round(budget * ready.shape.total_experts),
            cache=self.cache,
            allocation=self.allocation,
            predictor=self.predictor,
            predictor_params=self.params,
            misses=self.misses,
            popularity=taught.popularity,
            curves=taught.curves,
            lessons=taught.lessons,
            layer_times=layer_times(ready.costs, ready.workload),
        )

    @property
    def needs(self) -> frozenset[str]:
        """What its predictor needs."""
        return predictors.get(self.predictor).needs


ENTRANTS = (
    Entrant("LRU"),
    Entrant("previous token", "previous_token"),
    Entrant("previous layer", "previous_layer"),
    Entrant("popular", "popular"),
    Entrant("token table", "token_table"),
    Entrant("Markov between layers", "markov"),
    Entrant("gate look-ahead, d = 1", "gate_lookahead", {"depth": 1}),
    Entrant("gate look-ahead, d = 2", "gate_lookahead", {"depth": 2}),
    Entrant("gate look-ahead, d = 3", "gate_lookahead", {"depth": 3}),
    Entrant("activation match (MoE-Infinity)", "activation_match"),
    Entrant("map search (FineMoE-like)", "map_search"),
    Entrant("path, k", "path", {"per_token": 4}),
    Entrant("path, 2k", "path"),
    Entrant("PLEC, fixed slots, path 2k", "path", {}, "plec"),
    Entrant("PLEC, re-divided, path k", "path", {"per_token": 4}, "plec", "global"),
    Entrant("PLEC, re-divided, path 2k", "path", {}, "plec", "global"),
    Entrant("two-level LRU, adaptive S (Shen)", "adaptive", {"most": 3}, "two_level_lru"),
    Entrant(
        "the same, forest, resident first",
        "adaptive_forest",
        {"most": 3},
        "two_level_lru",
        misses="resident_first",
    ),
    Entrant("resident first, no predictor", misses="resident_first"),
)
BOUNDS = (
    Entrant("perfect prediction (bound)", "oracle"),
    Entrant("Belady, no predictor (bound)", cache="belady"),
)


@dataclass(frozen=True)
class Taught:
    """What a trace teaches the entrants."""

    popularity: Sequence[Sequence[int]]
    curves: Sequence[Sequence[int]]
    lessons: Mapping[str, Any]

    @classmethod
    def of(cls, workload: Workload, entrants: Sequence[Entrant]) -> Taught:
        """Learn all that these entrants need."""
        needs = frozenset().union(*(entrant.needs for entrant in entrants))
        return cls(workload.popularity(), layer_curves(workload), lessons_of(workload, needs))


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    pieces: int | None
    epochs: int
    batches: Mapping[int, int]
    rounds: int
    entrants: tuple[Entrant, ...]


FULL = Size(None, 25, {1: 5, 4: 8, 16: 16}, 3, ENTRANTS)
QUICK = Size(40, 2, {1: 2}, 1, (ENTRANTS[0], ENTRANTS[4], ENTRANTS[12], ENTRANTS[15]))


def main() -> None:
    """Teach, predict, run, compare."""
    options = options_of(parser(__doc__))
    size = QUICK if options.quick else FULL
    report = Report(SCRIPT, options)
    use_threads(1, choose_device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        embedded_model(report, Path(name), size)
    if present([GPT_OSS]):
        gpt_oss(report, size)
    if options.write:
        write_block(PAGE, SCRIPT, report.text())
    options.write = False  # the other page is not ours
    report.finish()


def embedded_model(report: Report, folder: Path, size: Size) -> None:
    """Part 1."""
    pieces = traced(folder / "pieces", cut(folder, size.pieces), 48, 16, lookahead=3)
    built(pieces, folder / "predictor", size.epochs)
    taught = Taught.of(workload_of(pieces), size.entrants)
    model = Embedded(folder, size.batches, link=LINK, new_tokens=NEW_TOKENS)
    told: list[Told] = []
    for batch in size.batches:
        trials = model.trials(str(batch), batch, lookahead=3, measures_memory=False)
        for budget in BUDGETS:
            told += cell(report, trials, taught, size, batch, budget)
    model.machine.close()
    verdicts(report, told)


@dataclass(frozen=True)
class Told:
    """Gain over plain LRU of one policy in one cell, predicted and measured, and the noise there."""

    words: str
    cell: str
    predicted: float
    measured: float
    noise: float
    is_steady: bool
    hits: float
    lru_hits: float

    @property
    def is_clear(self) -> bool:
        """Whether the measurement can tell."""
        return self.is_steady and abs(self.measured) > self.noise

    @property
    def agrees(self) -> bool:
        """Whether both have one sign."""
        return (self.predicted > 0) == (self.measured > 0)


def cell(
    report: Report, trials: Trials, taught: Taught, size: Size, batch: int, budget: float
) -> list[Told]:
    """One batch size and budget: the table, and what it tells."""
    rounds: list[list[Pair]] = []
    bounds: list[Result] = []
    first = len(trials.noise)
    for number in range(size.rounds):
        hint(f"batch {batch}, {budget:.0%}: round {number + 1} of {size.rounds}")
        ready = trials.forecaster()
        rounds.append(trials.round(ready, [e.spec(taught, ready, budget) for e in size.entrants]))
        bounds = [ready.predict(e.spec(taught, ready, budget), with_bounds=False) for e in BOUNDS]
    noise = statistics.median(trials.noise[first:])
    where = f"batch {batch}, {budget:.0%} of the experts"
    base = [pairs[0] for pairs in rounds]
    told: list[Told] = []
    rows: list[tuple[str, ...]] = []
    for place, entrant in enumerate(size.entrants):
        pairs = [found[place] for found in rounds]
        gains = (
            statistics.median(
                pair.predicted.tokens_per_s / other.predicted.tokens_per_s - 1.0
                for pair, other in zip(pairs, base, strict=True)
            ),
            statistics.median(pair.gain for pair in pairs),
        )
        rows.append(line(entrant.words, pairs, *gains, is_base=place == 0))
        hits, lru = (
            statistics.median(
                pair.measured.decode.hit_rate + pair.measured.decode.late_rate for pair in found
            )
            for found in (pairs, base)
        )
        if place:
            is_steady = len({pair.gain > 0 for pair in pairs}) == 1
            told.append(Told(entrant.words, where, *gains, noise, is_steady, hits, lru))
    for entrant, found in zip(BOUNDS, bounds, strict=True):
        share = f"{found.decode.hit_rate:.1%} / –"
        speed = f"{found.tokens_per_s:.1f} / –"
        rows.append((entrant.words, "–", share, "–", "–", f"{found.stall_s:.2f} / –", speed, "–"))
    report.table(
        Table(
            f"{where}, {LINK} (emulated); two runs of LRU, a few others apart, differ by {noise:.1%}",
            (
                "", "recall / precision", "decode hits", "with late ones", "useful / late / wasted / harmful",
                "stall, s", "tokens/s", "gain over LRU",
            ),
            rows,
        )
    )  # fmt: skip
    return told


def line(
    words: str, pairs: Sequence[Pair], predicted: float, measured: float, *, is_base: bool
) -> tuple[str, ...]:
    """A row: predicted / measured where there are both."""

    def both(what: Any, form: str) -> str:
        sides = ("predicted", "measured")
        found = [statistics.median(what(getattr(p, side)) for p in pairs) for side in sides]
        return " / ".join(format(value, form) for value in found)

    shown = pairs[len(pairs) // 2].measured
    accuracy, fate = shown.accuracy, shown.prefetch
    return (
        words,
        f"{accuracy.recall:.3f} / {accuracy.precision:.3f}" if accuracy else "–",
        both(lambda r: r.decode.hit_rate, ".1%"),
        both(lambda r: r.decode.hit_rate + r.decode.late_rate, ".1%"),
        f"{fate.useful} / {fate.late} / {fate.wasted} / {fate.harmful}" if fate.issued else "–",
        both(lambda r: r.stall_s, ".2f"),
        both(lambda r: r.tokens_per_s, ".1f"),
        "–" if is_base else f"{predicted:+.1%} / {measured:+.1%}",
    )


def verdicts(report: Report, told: Sequence[Told]) -> None:
    """Whether the simulator's verdicts hold, and what PLEC gives."""
    clear = [one for one in told if one.is_clear]
    agreeing = [one for one in clear if one.agrees]
    if clear:
        share = len(agreeing) / len(clear)
        report.bar(
            f"verdicts that agree, of {len(clear)} pairs outside the noise ({len(told)} in all)",
            share, 0.9, "", at_least=True,
        )  # fmt: skip
    for one in clear:
        if not one.agrees:
            report.note(
                f"Disagreed: {one.words}, {one.cell}: predicted {one.predicted:+.1%}, measured {one.measured:+.1%} "
                f"(noise {one.noise:.1%})."
            )
    plec = [one for one in told if one.words == "PLEC, re-divided, path 2k"]
    gain = min((one.hits - one.lru_hits for one in plec), default=0.0)
    report.bar(
        "PLEC's decode hits above per-layer LRU as the paper counts them, late ones too: the least of all cells",
        100 * gain, 15.0, "points", at_least=True,
    )  # fmt: skip
    promised = [one for one in told if one.words.startswith("PLEC") and one.predicted > 0]
    kept = [one for one in promised if one.measured > -one.noise]
    report.note(
        f"PLEC is predicted to be faster than LRU in {len(promised)} cells; measured it is not slower, beyond the "
        f"noise, in {len(kept)} of them."
    )


def gpt_oss(report: Report, size: Size) -> None:
    """Part 2."""
    entrants = [
        entrant
        for entrant in size.entrants
        if not entrant.needs & {"lookahead", "paths", "token_table", "forest"}
    ]
    ids = GPT_OSS.ids()
    learned = events_of(ids[:LEARNED_TOKENS], 32)
    judged = events_of(ids[LEARNED_TOKENS : LEARNED_TOKENS + JUDGED_TOKENS], 32)
    taught = Taught.of(learned, entrants)
    machine = machine_of(GPT_OSS_SHAPE, GPU, BUS, None)
    ready = Forecaster(
        workload=judged,
        costs=machine.costs,
        shape=GPT_OSS_SHAPE,
        trace_id="gpt-oss-20b-decode",
        device=machine.device,
        link=machine.link,
        link_origin="declared",
        submit_s=0.0,
        is_declared=True,
        decision_is_measured=True,
        provenance=provenance(0, "own-generation"),
    )
    rows: list[tuple[str, ...]] = []
    for budget in BUDGETS:
        for entrant in (*entrants, *BOUNDS):
            found = ready.predict(entrant.spec(taught, ready, budget))
            fate, accuracy = found.prefetch, found.accuracy
            rows.append(
                (
                    f"{budget:.0%}: {entrant.words}",
                    f"{accuracy.recall:.3f} / {accuracy.precision:.3f}" if accuracy else "–",
                    f"{found.decode.hit_rate:.1%}",
                    f"{fate.useful} / {fate.late} / {fate.wasted} / {fate.harmful}"
                    if fate.issued
                    else "–",
                    f"{found.stall_s:.1f}",
                    f"{found.tokens_per_s:.1f}",
                    found.worth.finding if found.worth else "–",
                )
            )
    report.table(
        Table(
            f"gpt-oss-20b's published decode routing, batch 1: predicted on a declared {GPU} and {BUS}, nothing "
            f"measured. Learned from {LEARNED_TOKENS:,} tokens, judged on the next {JUDGED_TOKENS:,}; decisions and "
            "the predictors' own time are not charged",
            (
                "", "recall / precision", "decode hits", "useful / late / wasted / harmful", "stall, s",
                "tokens/s", "verdict",
            ),
            rows,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()

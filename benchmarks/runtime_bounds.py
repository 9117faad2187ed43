"""How close the runtime comes to what it cannot beat, on the CPU: stock transformers, the link, and its own forecast.

1. Every expert in a slot of the runtime, against the same model under transformers alone: runs take turns, a run of the
   runtime between two of stock, and the ratio to their mean is what counts. A machine that drifts drifts for both.
2. At budgets from a quarter to three quarters behind emulated links, policies are predicted from a calibration of this
   process on other prompts, then run: throughput and peak memory, predicted beside measured. What policies learn comes
   from held-out text, never from the prompts they are judged on. Texts must equal the resident model's, logs replay.
3. At half of the experts the policy that is predicted to be the fastest, as a share of the simulator's bound
   max(compute, bytes / link), with the bytes of the clairvoyant cache and with the policy's own.

Exits 1 if a bar is missed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_common import ROOT, Report, Table, options_of, parser, write_block
from bench_embedded import Pair, Trials, cut, hint, traced
from expertflow.runtime.baselines import all_resident
from expertflow.runtime.deploy import Prepared, same_text
from expertflow.runtime.machine import Machine
from expertflow.runtime.stock import stock_runs
from expertflow.simulator.forecast import Forecaster
from expertflow.simulator.policy.spec import PolicySpec, make_spec
from expertflow.simulator.result import MemoryResult, Result
from expertflow.simulator.workload import workload_of
from expertflow.tracer.generate import Generated, Prompt
from expertflow.tracer.load import LoadedModel, choose_device, load_model
from expertflow.tracer.placement import use_threads
from expertflow.tracer.prompts import (
    MAX_PROMPT_TOKENS,
    PromptText,
    choose_prompts,
    read_prompts,
    tokenize,
)
from expertflow.tracer.quantities import LinkSpec

SCRIPT = "runtime_bounds.py"
PAGE = ROOT / "docs" / "runtime.md"
LINKS = ("1GB/s+20us", "4GB/s+10us")
BUDGETS = (0.25, 0.5, 0.75)
HALF = 0.5
NO_MEMORY = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)


@dataclass(frozen=True)
class Size:
    """How much of everything: prompts by batch size, new tokens, turns with stock, rounds of pairs, links."""

    prompts: dict[int, int]
    new_tokens: int
    turns: int
    rounds: int
    links: tuple[str, ...]
    pieces: int | None


FULL = Size({1: 4, 8: 16}, 24, 9, 2, LINKS, None)
QUICK = Size({1: 1, 8: 8}, 6, 2, 1, LINKS[1:2], 40)


class Model:
    """The embedded model twice: as transformers runs it, and on a machine of the runtime."""

    def __init__(self, size: Size) -> None:
        self.device = choose_device("cpu")
        self.size = size
        self.stock = load_model(None, device=self.device)
        self.machine = Machine(load_model(None, device=self.device), self.device)
        self.prompts = {
            batch: tokens_of(self.stock, choose_prompts(read_prompts(None), count))
            for batch, count in size.prompts.items()
        }
        self.text: dict[int, list[Generated]] = {}

    def prepared(self, batch: int) -> Prepared:
        """The stock model with the prompts of a batch size."""
        return Prepared(self.stock, self.device, None, "ram", self.prompts[batch])

    def run(self, spec: PolicySpec, batch: int) -> Result:
        """One run under a policy. Raises SystemExit if its text is not the stock model's."""
        record, outputs = self.machine.run(
            spec,
            self.prompts[batch],
            batch_size=batch,
            max_new_tokens=self.size.new_tokens,
            memory=NO_MEMORY,
        )
        is_same = same_text(outputs, self.text[batch])
        result = self.machine.result(record, spec, batch_size=batch, same_tokens=is_same)
        if not (result.same_tokens and result.log_replays):
            raise SystemExit(f"{spec.label}: {result.same_tokens=}, {result.log_replays=}")
        return result


def main() -> None:
    """Compare with stock, then with the bounds and the forecast."""
    options = options_of(parser(__doc__))
    size = QUICK if options.quick else FULL
    report = Report(SCRIPT, options)
    use_threads(1, choose_device("cpu"))
    model = Model(size)
    resident(report, model)
    with tempfile.TemporaryDirectory() as name:
        cells = offloaded(report, model, Path(name))
    model.machine.close()
    bars(report, cells)
    if options.write:
        write_block(PAGE, SCRIPT, report.text())
    options.write = False  # the other page is not ours
    report.finish()


def resident(report: Report, model: Model) -> None:
    """Part 1."""
    rows: list[tuple[str, ...]] = []
    for batch in model.prompts:
        hint(f"all resident, batch {batch}")
        sizes = {"batch_size": batch, "max_new_tokens": model.size.new_tokens}
        stock = stock_runs(model.prepared(batch), **sizes)
        before, model.text[batch] = stock.run()
        spec = all_resident(model.stock.shape, 0)
        ratios: list[float] = []
        noise: list[float] = []
        runs: list[Result] = []
        for _ in range(model.size.turns):
            ours = model.run(spec, batch)
            after = stock.run()[0]
            speeds = (before.tokens_per_s, after.tokens_per_s)
            noise.append(abs(speeds[1] / speeds[0] - 1.0))
            ratios.append(2 * ours.tokens_per_s / sum(speeds))
            runs.append(ours)
            before = after
        ratio = statistics.median(ratios)
        report.bar(
            f"everything resident, batch {batch}: tokens/s of the runtime by those of stock transformers",
            ratio, 0.9, "×", at_least=True,
        )  # fmt: skip
        rows.append(resident_row(batch, before, runs, ratios, noise))
    report.table(
        Table(
            f"Everything resident: stock transformers and the runtime in turns, {model.size.turns} of each. Time of "
            "the runtime by part, as shares of its passes",
            (
                "batch", "stock, tokens/s", "runtime, tokens/s", "ratio, median (least to most)", "stock by stock",
                "mixer", "experts", "decisions", "read-back", "rest",
            ),
            rows,
        )
    )  # fmt: skip


def resident_row(
    batch: int,
    stock: Result,
    runs: Sequence[Result],
    ratios: Sequence[float],
    noise: Sequence[float],
) -> tuple[str, ...]:
    """What part 1 found for a batch size; the time's parts are those of a middle run."""
    middle = sorted(runs, key=lambda run: run.tokens_per_s)[len(runs) // 2]
    time = middle.time
    parts = (time.mixer_s, time.experts_s, time.decision_s, time.readback_s)
    rest = time.total_s - sum(parts)
    return (
        str(batch),
        f"{stock.tokens_per_s:.1f}",
        f"{middle.tokens_per_s:.1f}",
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        f"{statistics.median(noise):.1%}",
        *(f"{part / time.total_s:.1%}" for part in (*parts, rest)),
    )


@dataclass(frozen=True)
class Cell:
    """One policy at one size, link and batch: its rounds, and the bound that the simulator gave it in each."""

    where: str
    spec: PolicySpec
    is_half: bool
    pairs: list[Pair]
    bounds: list[float]
    own_bounds: list[float]

    @property
    def gap(self) -> float:
        """Predicted over measured throughput, minus one: the median of the rounds."""
        return statistics.median(
            pair.predicted.tokens_per_s / pair.measured.tokens_per_s - 1.0 for pair in self.pairs
        )

    @property
    def memory_gap(self) -> float:
        """The same of peak device memory."""
        pair = self.pairs[0]
        return pair.predicted.peak_device_bytes / pair.measured.peak_device_bytes - 1.0

    @property
    def predicted(self) -> float:
        """Predicted tokens/s."""
        return statistics.median(pair.predicted.tokens_per_s for pair in self.pairs)

    @property
    def measured(self) -> float:
        """Measured tokens/s."""
        return statistics.median(pair.measured.tokens_per_s for pair in self.pairs)

    def share_of(self, bounds: Sequence[float]) -> float:
        """Measured throughput as a share of a bound, the median of the rounds."""
        return statistics.median(
            pair.measured.tokens_per_s / bound
            for pair, bound in zip(self.pairs, bounds, strict=True)
        )


def offloaded(report: Report, model: Model, folder: Path) -> list[Cell]:
    """Part 2: predict and run; returns the cells."""
    pieces = traced(folder / "pieces", cut(folder, model.size.pieces), 24, 8)
    popularity = workload_of(pieces).popularity()
    found: list[Cell] = []
    rows: list[tuple[str, ...]] = []
    for batch in model.prompts:
        trace = traced(
            folder / f"shipped-{batch}",
            None,
            model.size.new_tokens,
            batch,
            model.size.prompts[batch],
        )
        calibration = calibration_prompts(model, folder, batch)
        for link in model.size.links:
            hint(f"batch {batch} behind {link}")
            model.machine.link = LinkSpec.parse(link)
            trials = Trials(
                model.machine,
                workload_of(trace),
                model.prompts[batch],
                calibration,
                batch_size=batch,
                new_tokens=model.size.new_tokens,
                text=model.text[batch],
            )
            cells = rounds_of(trials, specs_of(model, popularity), f"batch {batch}, {link}", model)
            noise = statistics.median(trials.noise)
            rows += [cell_row(cell, noise) for cell in cells]
            found += cells
    model.machine.link = None
    report.table(
        Table(
            f"Predicted beside measured, links emulated, median of {model.size.rounds} rounds",
            (
                "", "predicted, tokens/s", "measured", "gap", "memory gap", "hits, predicted / measured",
                "two runs of the first policy differ by",
            ),
            rows,
        )
    )  # fmt: skip
    return found


def rounds_of(
    trials: Trials, specs: Sequence[tuple[PolicySpec, bool]], where: str, model: Model
) -> list[Cell]:
    """All rounds of one link and batch size."""
    cells = [Cell(where, spec, is_half, [], [], []) for spec, is_half in specs]
    for _ in range(model.size.rounds):
        ready = trials.forecaster()
        pairs = trials.round(ready, [spec for spec, _ in specs])
        for cell, pair in zip(cells, pairs, strict=True):
            cell.pairs.append(pair)
            cell.bounds.append(ready.bounds(cell.spec, pair.predicted).link_tokens_per_s)
            cell.own_bounds.append(own_bound(ready, pair.predicted))
    return cells


def own_bound(ready: Forecaster, predicted: Result) -> float:
    """Tokens/s if the policy's own bytes and the computation overlapped perfectly."""
    moved = predicted.prefill.bytes_moved + predicted.decode.bytes_moved
    link_s = moved / ready.shape.expert_bytes * ready.costs.copy_s
    tokens = predicted.tokens_per_s * predicted.time.total_s
    return tokens / max(ready.compute_s(), link_s)


def specs_of(model: Model, popularity: Sequence[Sequence[int]]) -> list[tuple[PolicySpec, bool]]:
    """The policies, LRU at half first, and whether each has half of the experts."""
    total = model.stock.shape.total_experts

    def kind(share: float, cache: str, predictor: str = "none") -> tuple[PolicySpec, bool]:
        spec = make_spec(
            slots=round(share * total), cache=cache, predictor=predictor, popularity=popularity
        )
        return spec, share == HALF

    others = [kind(share, "lru") for share in BUDGETS if share != HALF]
    return [
        kind(HALF, "lru"),
        kind(HALF, "lru", "gate_lookahead"),
        kind(HALF, "static"),
        kind(HALF, "lfu"),
        *others,
    ]


def cell_row(cell: Cell, noise: float) -> tuple[str, ...]:
    """One line of the table of part 2."""
    pair = cell.pairs[0]
    return (
        f"{cell.where}: {cell.spec.label}",
        f"{cell.predicted:.1f}",
        f"{cell.measured:.1f}",
        f"{cell.gap:+.1%}",
        f"{cell.memory_gap:+.2%}",
        f"{pair.predicted.hit_rate:.1%} / {pair.measured.hit_rate:.1%}",
        f"{noise:.1%}",
    )


def bars(report: Report, cells: Sequence[Cell]) -> None:
    """Part 3, and what part 2 promises."""
    rows: list[tuple[str, ...]] = []
    for where in dict.fromkeys(cell.where for cell in cells):
        half = [cell for cell in cells if cell.where == where and cell.is_half]
        best = max(half, key=lambda cell: cell.predicted)
        shares = (best.share_of(best.bounds), best.share_of(best.own_bounds))
        rows.append(
            (
                where,
                best.spec.label,
                f"{best.measured:.1f}",
                f"{statistics.median(best.bounds):.1f}",
                f"{shares[0]:.1%}",
                f"{statistics.median(best.own_bounds):.1f}",
                f"{shares[1]:.1%}",
                *(f"{part:.1%}" for part in lost(best)),
            )
        )
        report.bar(
            f"{where}, half of the experts: share of max(compute, bytes / link)",
            shares[0], 0.9, "", at_least=True,
        )  # fmt: skip
    report.table(
        Table(
            "Half of the experts, the policy predicted to be the fastest: its share of the bound of the simulator, and "
            "where the rest of the time went, as shares of it",
            (
                "", "policy", "tokens/s", "bound, clairvoyant bytes", "share", "bound, own bytes", "share", "stall",
                "decisions and read-back", "look-ahead",
            ),
            rows,
        )
    )  # fmt: skip
    report.bar(
        f"throughput gap, median of {len(cells)} held-out cells",
        100 * statistics.median(abs(cell.gap) for cell in cells), 10.0, "%", at_least=False,
    )  # fmt: skip
    report.bar(
        "peak device memory gap, worst of them",
        100 * max(abs(cell.memory_gap) for cell in cells), 2.0, "%", at_least=False,
    )  # fmt: skip


def lost(cell: Cell) -> tuple[float, float, float]:
    """Shares of the measured time that are no computation."""
    time = cell.pairs[len(cell.pairs) // 2].measured.time
    parts = (time.stall_s, time.decision_s + time.readback_s, time.lookahead_s)
    stall, decision, lookahead = (part / time.total_s for part in parts)
    return stall, decision, lookahead


def calibration_prompts(model: Model, folder: Path, batch: int) -> list[Prompt]:
    """Other prompts, of two batches at least, from the longer ones: nothing has to be extrapolated far."""
    pieces = sorted(read_prompts(folder / "pieces.jsonl"), key=lambda piece: len(piece.text))
    chosen = choose_prompts(pieces[len(pieces) // 2 :], max(4, 2 * batch))
    return tokens_of(model.stock, chosen)


def tokens_of(loaded: LoadedModel, texts: Sequence[PromptText]) -> list[Prompt]:
    """Prompts as tokens."""
    return tokenize(loaded.tokenizer, texts, MAX_PROMPT_TOKENS)


if __name__ == "__main__":
    main()

"""Requests as they arrive on the embedded model: time to the first token and per token, predicted next to measured.

1. The resident model's routing of some prompts is traced, and its text of each prompt alone is kept.
2. The machine is calibrated in continuous batches, on other prompts, behind an emulated link.
3. A closed loop is predicted, for what the machine can serve. Then requests come by Poisson at two shares of that rate:
   the same arrivals are predicted and served for real, in turns, each repeat with arrivals of its own.

Exits 1 if a text differs or a log does not replay.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench_common import ROOT, Report, Table, options_of, parser, write_block
from bench_embedded import cut, hint, traced
from expertflow.runtime.deploy import same_text
from expertflow.runtime.forecasts import forecaster_of
from expertflow.runtime.machine import Machine, generate_all
from expertflow.runtime.serving import Load, result_of, serve
from expertflow.runtime.serving_calibrate import ServingCalibration
from expertflow.runtime.serving_deploy import requests_of
from expertflow.simulator.arrivals import Arrivals, read_arrivals
from expertflow.simulator.forecast import Forecaster
from expertflow.simulator.policy.spec import PolicySpec, make_spec
from expertflow.simulator.result import MemoryResult, Result
from expertflow.simulator.serving import ServingSettings
from expertflow.simulator.serving import serve as simulated
from expertflow.simulator.token_table import TokenTable
from expertflow.simulator.workload import workload_of
from expertflow.tracer.generate import Generated, Prompt
from expertflow.tracer.load import choose_device, load_model
from expertflow.tracer.placement import use_threads
from expertflow.tracer.prompts import MAX_PROMPT_TOKENS, choose_prompts, read_prompts, tokenize
from expertflow.tracer.quantities import LinkSpec, format_seconds

SCRIPT = "serving.py"
PAGE = ROOT / "docs" / "serving.md"
LINK = "1GB/s+20us"
SHARES = (0.4, 0.8)
NO_MEMORY = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)
COLUMNS: tuple[tuple[str, Callable[[Result], float]], ...] = (
    ("first token p50", lambda r: r.ttft.p50),
    ("first token p95", lambda r: r.ttft.p95),
    ("per token p50", lambda r: r.tpot.p50),
    ("per token p95", lambda r: r.tpot.p95),
)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    requests: int
    new_tokens: int
    max_batch: int
    repeats: int
    calibration: int


FULL = Size(24, 24, 4, 3, 6)
QUICK = Size(5, 4, 2, 1, 2)


@dataclass(frozen=True)
class Pair:
    """One load, predicted and then served."""

    predicted: Result
    measured: Result


def main() -> None:
    """Trace, calibrate, predict, serve, and say what was found."""
    options = options_of(parser(__doc__))
    size = QUICK if options.quick else FULL
    report = Report(SCRIPT, options)
    use_threads(1, choose_device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        measured(report, Trial(Path(name), size), size)
    if options.write:
        write_block(PAGE, SCRIPT, report.text())
    options.write = False  # the other page is not ours
    report.finish()


def measured(report: Report, trial: Trial, size: Size) -> None:
    """All cells, in turns."""
    specs = specs_of(trial.machine.loaded.shape.total_experts)
    capacity = trial.capacity(specs[0])
    rates = [float(f"{share * capacity:.2g}") for share in SHARES]
    pairs: dict[tuple[str, float], list[Pair]] = {}
    for repeat in range(size.repeats):
        ready = trial.forecaster()
        for rate in rates:
            for spec in specs:
                hint(f"repeat {repeat + 1}, {rate:g} requests/s, {spec.label}")
                pair = trial.pair(ready, spec, rate, seed=repeat)
                pairs.setdefault((spec.label, rate), []).append(pair)
    trial.machine.close()
    report.table(
        Table(
            f"Embedded model, link emulated at {LINK}, at most {size.max_batch} requests at once, prompts mixed with "
            f"generation; {size.requests} requests of {size.new_tokens} new tokens each by Poisson, medians of "
            f"{size.repeats} runs. Predicted / measured; in brackets the median of the runs' own gaps",
            (
                "policy, requests/s",
                *(name for name, _ in COLUMNS),
                "tokens/s",
                "queue p95",
                "finding",
            ),
            [row(*cell, found) for cell, found in pairs.items()],
        )
    )
    report.note(
        f"A closed loop of {size.max_batch} users is predicted to be served at {capacity:.2g} requests/s; the rates "
        f"are {' and '.join(f'{share:.0%}' for share in SHARES)} of it."
    )
    everything = [pair for found in pairs.values() for pair in found]
    # Near what the machine can serve, waiting says more about the last percent of speed than about the forecast.
    light = [found for (_, rate), found in pairs.items() if rate == rates[0]]
    for name, of, cells in (
        ("time per token, p50: median gap over cells", COLUMNS[2][1], list(pairs.values())),
        ("time to the first token at the lower rate, p50: median gap", COLUMNS[0][1], light),
    ):
        gaps = [abs(gap(found, of)) for found in cells]
        report.bar(name, 100 * statistics.median(gaps), 10, "%", at_least=False)
    sound = sum(bool(p.measured.same_tokens and p.measured.log_replays) for p in everything)
    report.bar(
        "runs with the text of each prompt alone and a log that replays",
        sound / len(everything),
        1.0,
        "",
        at_least=True,
        always=True,
    )


def specs_of(total: int) -> list[PolicySpec]:
    """Half of the experts, with and without prefetching."""
    return [
        make_spec(slots=total // 2, predictor=predictor) for predictor in ("none", "gate_lookahead")
    ]


def gap(pairs: Sequence[Pair], of: Callable[[Result], float]) -> float:
    """Median over runs of how far the prediction is off, as a share of what was measured."""
    return statistics.median(of(p.predicted) / of(p.measured) - 1 for p in pairs)


def row(label: str, rate: float, pairs: Sequence[Pair]) -> tuple[str, ...]:
    """One policy at one rate."""

    def cell(of: Callable[[Result], float], words: Callable[[float], str]) -> str:
        both = (
            statistics.median(of(getattr(p, s)) for p in pairs) for s in ("predicted", "measured")
        )
        return " / ".join(map(words, both)) + f" ({gap(pairs, of):+.0%})"

    queue = (
        statistics.median(r.arrivals.queue.p95 for r in side if r.arrivals)
        for side in ([p.predicted for p in pairs], [p.measured for p in pairs])
    )
    return (
        f"{label}, {rate:g}/s",
        *(cell(of, format_seconds) for _, of in COLUMNS),
        cell(lambda r: r.tokens_per_s, lambda value: f"{value:.1f}"),
        " / ".join(map(format_seconds, queue)),
        " / ".join(" ".join(verdicts(pairs, side)) for side in ("predicted", "measured")),
    )


def verdicts(pairs: Sequence[Pair], side: str) -> list[str]:
    """Whether the machine keeps up, in the different words of the runs."""
    found = (getattr(pair, side).arrivals for pair in pairs)
    return sorted({"saturated" if one.saturated else "keeps up" for one in found if one})


class Trial:
    """The embedded model on a machine with an emulated link, its own text, and its routing of the same prompts."""

    def __init__(self, folder: Path, size: Size) -> None:
        self._size = size
        device = choose_device("cpu")
        trace = traced(folder / "trace", None, size.new_tokens, 1, size.requests)
        self._workload = workload_of(trace)
        self._table = TokenTable.of(self._workload)
        loaded = load_model(None, device=device)
        texts = choose_prompts(read_prompts(None), size.requests)
        self._prompts = tokenize(loaded.tokenizer, texts, MAX_PROMPT_TOKENS)
        self._alone = generate_all(
            loaded, self._prompts, batch_size=1, max_new_tokens=size.new_tokens
        )
        pieces = choose_prompts(read_prompts(cut(folder, None)), size.calibration)
        others: list[Prompt] = tokenize(loaded.tokenizer, pieces, MAX_PROMPT_TOKENS)
        self.machine = Machine(loaded, device, link=LinkSpec.parse(LINK))
        self._settings = ServingSettings(max_batch=size.max_batch)
        self._calibration = ServingCalibration(
            self.machine, others, settings=self._settings, max_new_tokens=size.new_tokens
        )

    def forecaster(self) -> Forecaster:
        """Predictions for this process as it is now."""
        hint("calibrating")
        costs = self._calibration.measure(lambda _: None)
        return forecaster_of(self.machine, self._workload, costs)

    def capacity(self, spec: PolicySpec) -> float:
        """Requests/s of a closed loop, as predicted."""
        arrivals = self._arrivals(f"closed:{self._size.max_batch}", 0)
        found = self._predicted(self.forecaster(), spec, arrivals).arrivals
        assert found is not None
        return found.served_per_s

    def pair(self, ready: Forecaster, spec: PolicySpec, rate: float, seed: int) -> Pair:
        """The same arrivals predicted and served."""
        arrivals = self._arrivals(f"poisson:{rate}", seed)
        predicted = self._predicted(ready, spec, arrivals)
        wanted = requests_of(self._prompts, arrivals, self._settings, self._size.new_tokens)
        # Recorded sequences ended at end marks; so do these.
        load: Load = replace(wanted, eos_ids=self.machine.loaded.eos_ids)
        served = serve(self.machine, spec, load, memory=NO_MEMORY)
        is_same = same_text(served.outputs, self._expected(load))
        return Pair(predicted, result_of(self.machine, spec, served, same_tokens=is_same))

    def _predicted(self, ready: Forecaster, spec: PolicySpec, arrivals: Arrivals) -> Result:
        serving = simulated(self._table, spec, arrivals, self._settings)
        return ready.predict(spec, serving=serving, with_bounds=False)

    def _arrivals(self, text: str, seed: int) -> Arrivals:
        return read_arrivals(text, limit=self._size.requests, seed=seed)

    def _expected(self, load: Load) -> list[Generated]:
        return [self._alone[number % len(self._alone)] for number in range(len(load.requests))]


if __name__ == "__main__":
    main()

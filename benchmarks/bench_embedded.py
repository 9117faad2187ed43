"""The embedded model as the benchmarks run it: held-out text, traces, predictors, predicted beside measured.

Imported by the scripts beside it, which run from a checkout.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench_common import ROOT as _ROOT  # noqa: F401 - puts the checkout on the path
from expertflow.runtime.calibrate import Calibration
from expertflow.runtime.deploy import same_text
from expertflow.runtime.forecasts import forecaster_of
from expertflow.runtime.machine import Machine, generate_all
from expertflow.runtime.paths.build import PredictorRequest, add_paths, build_predictor
from expertflow.runtime.paths.files import load_predictor
from expertflow.runtime.paths.train import Training
from expertflow.simulator.forecast import Forecaster
from expertflow.simulator.paths import PredictorCard, paths_file, read_paths
from expertflow.simulator.policy.spec import PolicySpec
from expertflow.simulator.result import MemoryResult, Result
from expertflow.simulator.workload import Workload, workload_of
from expertflow.tracer import embedded
from expertflow.tracer.console import no_progress
from expertflow.tracer.generate import Generated, Prompt
from expertflow.tracer.load import choose_device, load_model
from expertflow.tracer.prompts import (
    MAX_PROMPT_TOKENS,
    PromptText,
    choose_prompts,
    read_prompts,
    tokenize,
)
from expertflow.tracer.quantities import LinkSpec
from expertflow.tracer.store import Trace
from expertflow.tracer.tracing import TraceRequest, trace_run


def cut(folder: Path, most: int | None) -> Path:
    """Pieces of 12 to 70 words of the documents that hold none of the shipped prompts."""
    starts = [row["text"][:60] for row in rows_of(embedded.PROMPTS)]
    draw, pieces = random.Random(7), []
    for number, row in enumerate(rows_of(embedded.MODEL_DIR / "heldout.jsonl")):
        if any(start in row["text"] for start in starts):
            continue
        words, place = row["text"].split(" "), 0
        while place < len(words):
            count = draw.randint(12, 70)
            text = " ".join(words[place : place + count]).strip()[:900]
            place += count
            if len(text) > 40:
                name = f"{row['domain']}-{number}-{len(pieces)}"
                pieces.append({"id": name, "domain": row["domain"], "text": text})
    draw.shuffle(pieces)
    path = folder / "pieces.jsonl"
    path.write_text("".join(json.dumps(piece) + "\n" for piece in pieces[:most]))
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    """Rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def traced(
    out: Path,
    prompts: Path | None,
    new_tokens: int,
    batch_size: int,
    limit: int | None = None,
    *,
    lookahead: int = 1,
) -> Trace:
    """A trace of the embedded model."""
    request = TraceRequest(
        out=out,
        prompts=prompts,
        limit=limit,
        max_new_tokens=new_tokens,
        batch_size=batch_size,
        lookahead=lookahead,
        device="cpu",
        threads=1,
    )
    trace_run(request, progress=no_progress, say=hint)
    return Trace.open(out)


def built(trace: Trace, out: Path, epochs: int, **asked: Any) -> PredictorCard:
    """A predictor with the command's own settings."""
    request = PredictorRequest(
        trace=trace.path,
        out=out,
        training=Training(epochs=epochs),
        device="cpu",
        **{"network": {}, **asked},
    )
    return build_predictor(request, progress=no_progress, say=hint)


class Embedded:
    """The embedded model on a machine with an emulated link and a path predictor, and its own text of shipped prompts.

    `folder` holds what `cut` and `built` wrote; `prompts` says by batch size how many prompts are judged on.
    """

    def __init__(
        self, folder: Path, prompts: Mapping[int, int], *, link: str, new_tokens: int
    ) -> None:
        self._folder, self._counts, self._new_tokens = folder, prompts, new_tokens
        device = choose_device("cpu")
        self._loaded = load_model(None, device=device)
        self.shape = self._loaded.shape
        paths, _ = load_predictor(folder / "predictor", device)
        self._prompts = {
            batch: self._tokens(choose_prompts(read_prompts(None), count))
            for batch, count in prompts.items()
        }
        # The machine takes the experts out of the model, so its own text comes first.
        self._text = {
            batch: generate_all(self._loaded, found, batch_size=batch, max_new_tokens=new_tokens)
            for batch, found in self._prompts.items()
        }
        self.machine = Machine(self._loaded, device, link=LinkSpec.parse(link), paths=paths)

    def trials(
        self, name: str, batch: int, *, lookahead: int = 1, measures_memory: bool = True
    ) -> Trials:
        """Trace the prompts of a batch size, predict their paths, and be ready to predict and run policies."""
        predictor = self._folder / "predictor"
        out, count = self._folder / f"shipped-{name}", self._counts[batch]
        trace = traced(out, None, self._new_tokens, batch, count, lookahead=lookahead)
        add_paths(trace.path, predictor, device="cpu")
        table = read_paths(paths_file(predictor, trace.manifest.trace_id), self.shape)
        return Trials(
            self.machine,
            workload_of(trace).with_paths(table),
            self._prompts[batch],
            self._calibration(batch),
            batch_size=batch,
            new_tokens=self._new_tokens,
            text=self._text[batch],
            measures_memory=measures_memory,
        )

    def _calibration(self, batch: int) -> list[Prompt]:
        """Other prompts, of two batches at least, from the longer ones: nothing has to be extrapolated far."""
        pieces = sorted(read_prompts(self._folder / "pieces.jsonl"), key=lambda p: len(p.text))
        return self._tokens(choose_prompts(pieces[len(pieces) // 2 :], max(4, 2 * batch)))

    def _tokens(self, texts: Sequence[PromptText]) -> list[Prompt]:
        return tokenize(self._loaded.tokenizer, texts, MAX_PROMPT_TOKENS)


@dataclass(frozen=True, slots=True)
class Pair:
    """One policy, predicted and then run, and tokens/s of the first policy of its round, run just before and after."""

    predicted: Result
    measured: Result
    base_tokens_per_s: float

    @property
    def gain(self) -> float:
        """Measured gain over the first policy: the machine drifts, so against what it gave at about that time."""
        return self.measured.tokens_per_s / self.base_tokens_per_s - 1.0


_OTHERS = 3
"""Policies between two runs of the first one."""
_NO_MEMORY = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)


class Trials:
    """One machine and one batch size: policies are predicted from a calibration of this process, then run in turns.

    `workload` is what the resident model routed for `prompts`, and `text` what it said; calibration runs on other
    prompts. The first policy of a round is run again after every few others: what two such runs, one after the other,
    differ by is the noise.
    """

    def __init__(
        self,
        machine: Machine,
        workload: Workload,
        prompts: Sequence[Prompt],
        calibration: Sequence[Prompt],
        *,
        batch_size: int,
        new_tokens: int,
        text: Sequence[Generated],
        measures_memory: bool = True,
    ) -> None:
        self._machine, self._workload, self._prompts = machine, workload, prompts
        self._size, self._new_tokens = batch_size, new_tokens
        self._calibrator = Calibration(
            machine, calibration, batch_size=batch_size, max_new_tokens=new_tokens
        )
        self._text = text
        self._memory: dict[str, MemoryResult] = {}
        self._measures_memory = measures_memory
        self.noise: list[float] = []

    def forecaster(self) -> Forecaster:
        """Predictions for this process as it is now."""
        costs = self._calibrator.measure(lambda _: None)
        paths = self._calibrator.measure_paths(costs)
        return forecaster_of(self._machine, self._workload, costs, path_costs=paths)

    def round(self, ready: Forecaster, specs: Sequence[PolicySpec]) -> list[Pair]:
        """Predict all, run all. Raises SystemExit if a text differs or a log does not replay."""
        own = self._calibrator.measure_own(ready.costs, specs, lambda _: None)
        ready = replace(ready, own_costs=own)
        predicted = [ready.predict(spec, with_bounds=False) for spec in specs]
        before = self.run(specs[0])
        pairs = [Pair(predicted[0], before, before.tokens_per_s)]
        others = list(zip(specs, predicted, strict=True))[1:]
        for start in range(0, len(others), _OTHERS):
            some = others[start : start + _OTHERS]
            runs = [self.run(spec) for spec, _ in some]
            after = self.run(specs[0])
            speeds = (before.tokens_per_s, after.tokens_per_s)
            self.noise.append(abs(speeds[1] / speeds[0] - 1.0))
            base = sum(speeds) / 2
            pairs += [Pair(found, run, base) for (_, found), run in zip(some, runs, strict=True)]
            before = after
        return pairs

    def run(self, spec: PolicySpec) -> Result:
        """One measured run; its peak memory, if that is wanted, is measured the first time."""
        key = spec.behaviour_hash()
        if not self._measures_memory:
            self._memory[key] = _NO_MEMORY
        if key not in self._memory:
            self._memory[key] = self._machine.peak_of_run(
                spec,
                self._prompts,
                batch_size=self._size,
                max_new_tokens=self._new_tokens,
            )
        record, outputs = self._machine.run(
            spec,
            self._prompts,
            batch_size=self._size,
            max_new_tokens=self._new_tokens,
            memory=self._memory[key],
        )
        is_same = same_text(outputs, self._text)
        result = self._machine.result(record, spec, batch_size=self._size, same_tokens=is_same)
        if not (result.same_tokens and result.log_replays):
            raise SystemExit(
                f"{spec.label}: text or log differs ({result.same_tokens=}, {result.log_replays=})"
            )
        return result


def hint(words: str) -> None:
    """Say on stderr what is being done."""
    print(words, file=sys.stderr, flush=True)

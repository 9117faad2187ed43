"""The models that the bench measures: the embedded one with its own text, and large ones under routing replay."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from expertflow.runtime.calibrate import Calibration
from expertflow.runtime.deploy import Prepared
from expertflow.runtime.forecasts import forecaster_of
from expertflow.runtime.machine import Machine, generate_all
from expertflow.runtime.paths.build import PredictorRequest, build_predictor
from expertflow.runtime.paths.data import routed
from expertflow.runtime.paths.files import load_predictor
from expertflow.runtime.paths.predict import path_table
from expertflow.runtime.paths.train import Training
from expertflow.runtime.replay.build import fill_modules, replay_dtype, unfilled_model
from expertflow.runtime.replay.live import LiveReplay
from expertflow.runtime.replay.machine import ReplayMachine, labelled
from expertflow.runtime.replay.plain import replayed
from expertflow.runtime.replay.plan import ReplayPlan
from expertflow.runtime.replay.routing import read_routing
from expertflow.runtime.replay.run import Replay, planned
from expertflow.runtime.replay.shapes import shape_config
from expertflow.runtime.stock import PlainRuns
from expertflow.simulator.forecast import Forecaster
from expertflow.simulator.result import Result
from expertflow.simulator.workload import Workload, workload_of
from expertflow.tracer.console import no_progress
from expertflow.tracer.generate import Generated, Prompt
from expertflow.tracer.load import LoadedModel, choose_device, load_model
from expertflow.tracer.prompts import PromptText, read_prompts, tokenize
from expertflow.tracer.quantities import LinkSpec
from expertflow.tracer.store import Trace
from expertflow.tracer.tracing import TraceRequest, trace_run

from .settings import EMBEDDED, Settings
from .trials import Opened, closing

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "traces" / "demo" / "trace"


class Subject(Protocol):
    """A model to be measured."""

    name: str
    is_trained: bool
    has_lookahead: bool

    def open(self) -> Any:
        """The model ready for policies: a context that gives a `Batches`."""
        ...

    def plain(self, kind: str, batch: int) -> Any:
        """The model ready to run without a policy: a context that gives a `PlainModel`."""
        ...


class Batches(Protocol):
    """An opened model by batch size."""

    def at(self, batch: int) -> Opened:
        """Ready for trials at this batch size."""
        ...


@dataclass(slots=True)
class PlainModel:
    """A model with all its weights, and what follows its runs: `live` under a replay, else nothing."""

    prepared: Prepared
    live: LiveReplay | None = None
    plan: ReplayPlan | None = None

    def run(self, runs: PlainRuns) -> tuple[Result, list[Generated]]:
        """One timed run, labelled."""
        if self.live is None or self.plan is None:
            return runs.run()
        with replayed(runs, self.live):
            result, outputs = runs.run()
        return labelled(result, self.plan), outputs


def subject_of(name: str, settings: Settings) -> Subject:
    """A subject by name: the embedded model, or a shape to be replayed."""
    return EmbeddedSubject(settings) if name == EMBEDDED else ReplaySubject(name, settings)


def _hush(words: str) -> None:
    del words


@dataclass(slots=True)
class _Opened:
    """See trials.Opened."""

    machine: Machine
    judged: Sequence[Prompt]
    learned: Sequence[Prompt]
    workload: Workload
    lesson: Workload
    text: Sequence[Generated] | None

    def forecaster(self, calibration: Calibration) -> Forecaster:
        """Calibrate the runtime and the path predictor beside it."""
        costs = calibration.measure(lambda _: None)
        paths = calibration.measure_paths(costs)
        return forecaster_of(self.machine, self.workload, costs, path_costs=paths)


# --- routing replay ----------------------------------------------------------------------------


class ReplaySubject:
    """A large shape with random weights, on recorded routing."""

    is_trained = False

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self._settings = settings
        self._device = choose_device(settings.device)
        source = settings.routing.get(name, DEMO)
        folder, file = (source, None) if source.is_dir() else (None, source)
        self._routing = read_routing(folder, file)
        self.has_lookahead = bool(self._routing.lookahead)

    @contextmanager
    def open(self) -> Iterator[_ReplayBatches]:
        """Draw the weights into host blocks."""
        loaded, plan = self._planned()
        link = LinkSpec.parse(self._settings.link) if self._settings.link else None
        machine = ReplayMachine(loaded, plan, self._device, link=link)
        with closing(machine):
            yield _ReplayBatches(machine, self._settings.sequences)

    @contextmanager
    def plain(self, kind: str, batch: int) -> Iterator[PlainModel]:
        """Draw the weights into the model itself: on the device, or for Accelerate in host memory."""
        loaded, plan = self._planned()
        place = torch.device("cpu") if kind == "accelerate" else self._device
        fill_modules(loaded, place, self._device)
        judged, _ = plan.divide(self._settings.sequences[batch])
        link = LinkSpec.parse(self._settings.link) if self._settings.link else None
        live = LiveReplay(loaded.layers, plan, self._device)
        live.is_strict = False
        try:
            prompts = list(judged[:1] if kind == "accelerate" else judged)
            yield PlainModel(Prepared(loaded, self._device, link, "ram", prompts), live, plan)
        finally:
            live.close()

    def _planned(self) -> tuple[LoadedModel, ReplayPlan]:
        settings = self._settings
        changes = settings.changes.get(self.name, {})
        config = shape_config(self.name, **changes)
        name = f"{self.name}{' scaled down' if changes else ''}"
        dtype = replay_dtype(settings.dtype, self._device)
        loaded = unfilled_model(config, name=name, dtype=dtype)
        plan = planned(
            loaded,
            self._routing,
            limit=max(settings.sequences.values()),
            new_tokens=settings.new_tokens,
            prompt_tokens=settings.prompt_tokens,
        )
        return loaded, plan


@dataclass(slots=True)
class _ReplayBatches:
    """See Batches."""

    machine: ReplayMachine
    sequences: Mapping[int, int]

    def at(self, batch: int) -> Opened:
        """The first sequences of the plan, as many as the batch size is given."""
        found = Replay(self.machine, batch_size=batch, limit=self.sequences[batch])
        return _OpenedReplay(found)


class _OpenedReplay:
    """See trials.Opened. No resident text is to be had: all runs are compared with the first."""

    def __init__(self, found: Replay) -> None:
        self.machine: Machine = found.machine
        self.judged: Sequence[Prompt] = found.judged
        self.learned: Sequence[Prompt] = found.learned
        self.workload = found.workload
        self.lesson = found.lesson()
        self.text: Sequence[Generated] | None = None
        self._found = found

    def forecaster(self, calibration: Calibration) -> Forecaster:
        """Calibrate."""
        return self._found.ready(calibration, lambda _: None)


# --- the embedded model ------------------------------------------------------------------------


class EmbeddedSubject:
    """The model shipped with the package, on its own prompts, with a path predictor trained on the spot."""

    name = EMBEDDED
    is_trained = True
    has_lookahead = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._device = choose_device(settings.device)

    @contextmanager
    def open(self) -> Iterator[_EmbeddedBatches]:
        """Trace the prompts, train the predictor, note the resident model's text, then pack the experts."""
        settings = self._settings
        with tempfile.TemporaryDirectory(prefix="expertflow-bench-") as folder:
            rest = self._texts(None)
            lesson = self._traced(Path(folder) / "lesson", rest, 1)
            request = PredictorRequest(
                trace=lesson.path,
                out=Path(folder) / "predictor",
                training=Training(epochs=settings.epochs),
                network=settings.network,
                device=settings.device,
            )
            build_predictor(request, progress=no_progress, say=_hush)
            paths, _ = load_predictor(request.out, self._device)
            loaded = self._loaded()
            ready: dict[int, _Opened] = {}
            held: dict[int, tuple[list[Prompt], list[Prompt], Workload, list[Generated]]] = {}
            for batch in settings.batches:
                texts = self._texts(batch)
                trace = self._traced(Path(folder) / f"trace-{batch}", texts, batch)
                found = routed(trace)
                everybody = np.arange(len(found.number))
                table = path_table(paths, found, everybody, 2 * loaded.shape.top_k)
                loaded.model.to(self._device)
                judged = _tokens(loaded, texts)
                learned = _tokens(loaded, rest[: max(3, batch)])
                text = generate_all(
                    loaded, judged, batch_size=batch, max_new_tokens=settings.new_tokens
                )
                held[batch] = judged, learned, workload_of(trace).with_paths(table), text
            link = LinkSpec.parse(settings.link) if settings.link else None
            machine = Machine(loaded, self._device, link=link, paths=paths)
            for batch, (judged, learned, workload, text) in held.items():
                ready[batch] = _Opened(
                    machine, judged, learned, workload, workload_of(lesson), text
                )
            with closing(machine):
                yield _EmbeddedBatches(ready)

    @contextmanager
    def plain(self, kind: str, batch: int) -> Iterator[PlainModel]:
        """The model as transformers loads it."""
        loaded = self._loaded()
        link = LinkSpec.parse(self._settings.link) if self._settings.link else None
        prompts = _tokens(loaded, self._texts(batch))
        if kind == "accelerate":
            prompts = prompts[:1]
        yield PlainModel(Prepared(loaded, self._device, link, "ram", prompts))

    def _loaded(self) -> LoadedModel:
        return load_model(None, device=self._device, dtype=self._settings.dtype)

    def _texts(self, batch: int | None) -> list[PromptText]:
        """Prompts of a batch size to be judged on; None: all the others, to learn from."""
        texts = read_prompts(None)
        most = max(self._settings.sequences.values()) * 2 // 3
        if batch is None:
            return texts[most:]
        return texts[: max(1, self._settings.sequences[batch] * 2 // 3)]

    def _traced(self, out: Path, texts: Sequence[PromptText], batch: int) -> Trace:
        prompts = out.with_suffix(".jsonl")
        lines = [json.dumps({"id": text.prompt_id, "text": text.text}) for text in texts]
        prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        request = TraceRequest(
            out=out,
            prompts=prompts,
            max_new_tokens=self._settings.new_tokens,
            batch_size=batch,
            lookahead=1,
            device=self._settings.device,
            dtype=self._settings.dtype,
            threads=torch.get_num_threads(),
        )
        trace_run(request, progress=no_progress, say=_hush)
        return Trace.open(out)


@dataclass(slots=True)
class _EmbeddedBatches:
    """See Batches."""

    ready: Mapping[int, _Opened]

    def at(self, batch: int) -> Opened:
        """As prepared."""
        return self.ready[batch]


def _tokens(loaded: LoadedModel, texts: Sequence[PromptText]) -> list[Prompt]:
    return tokenize(loaded.tokenizer, texts, 512)

"""One model at one batch size, ready to be predicted and measured under any cell's policy."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from expertflow.runtime.calibrate import Calibration
from expertflow.runtime.machine import Machine
from expertflow.simulator.account import RunRecord
from expertflow.simulator.forecast import Forecaster
from expertflow.simulator.policy.spec import PolicySpec
from expertflow.simulator.result import MemoryResult, Result
from expertflow.simulator.workload import Workload
from expertflow.tracer.generate import Generated, Prompt
from expertflow.tracer.records import to_json
from expertflow.tracer.schema import WHOLE_STEP

from .cells import Cell, spec_of
from .evidence import CellRecord

_MOST_COPIES = 2000


class Opened(Protocol):
    """A model on its device. `lesson` is routing that is not judged on, `text` the resident model's if it was had."""

    machine: Machine
    judged: Sequence[Prompt]
    learned: Sequence[Prompt]
    workload: Workload
    lesson: Workload
    text: Sequence[Generated] | None

    def forecaster(self, calibration: Calibration) -> Forecaster:
        """Calibrate, and be ready to predict what the judged prompts will take."""
        ...


@dataclass(slots=True)
class Trials:
    """Predicts each cell, then measures it as often as asked."""

    name: str
    opened: Opened
    batch: int
    new_tokens: int
    repeats: int
    settings: str
    calibration: Calibration = field(init=False)
    ready: Forecaster = field(init=False)

    def __post_init__(self) -> None:
        self.calibration = Calibration(
            self.opened.machine,
            self.opened.learned,
            batch_size=self.batch,
            max_new_tokens=self.new_tokens,
        )
        self.ready = self.opened.forecaster(self.calibration)

    def cell(self, cell: Cell, key: str) -> CellRecord:
        """Predict and measure one cell."""
        began = time.monotonic()
        machine = self.opened.machine
        spec = spec_of(cell, machine.loaded.shape, self.opened.lesson)
        predicted = self._predicted(spec)
        memory = machine.peak_memory(spec, self.opened.judged, self.batch)
        measured: list[Result] = []
        samples: list[Mapping[str, Any]] = []
        for _ in range(self.repeats):
            result, record = self._run(spec, memory)
            measured.append(result)
            samples.append(raw_samples(record))
        return CellRecord(
            key=key,
            subject=self.name,
            kind=cell.kind,
            batch=self.batch,
            share=cell.share,
            settings=self.settings,
            predicted=to_json(predicted),
            measured=[to_json(result) for result in measured],
            samples=samples,
            seconds=round(time.monotonic() - began, 1),
            notes=[*measured[0].warnings],
        )

    def _predicted(self, spec: PolicySpec) -> Result:
        own = self.calibration.measure_own(self.ready.costs, [spec], lambda _: None)
        return replace(self.ready, own_costs=own).predict(spec)

    def _run(self, spec: PolicySpec, memory: MemoryResult) -> tuple[Result, RunRecord]:
        opened = self.opened
        record, outputs = opened.machine.run(
            spec,
            opened.judged,
            batch_size=self.batch,
            max_new_tokens=self.new_tokens,
            memory=memory,
        )
        is_same = None
        if opened.text is None:
            opened.text = outputs  # all later runs must give what the first one gave
        else:
            is_same = texts(outputs) == texts(opened.text)
        result = opened.machine.result(record, spec, batch_size=self.batch, same_tokens=is_same)
        return result, record


def texts(outputs: Sequence[Generated]) -> list[list[int]]:
    """Tokens of every sequence."""
    return [one.token_ids for one in outputs]


def raw_samples(record: RunRecord) -> dict[str, Any]:
    """Times of every pass and every token, and of demand copies (at most 2000, spread over the run), in seconds."""
    steps = record.steps
    is_pass = [layer == WHOLE_STEP for layer in steps["layer"]]
    copies = [copy for copy in record.copies if copy.why == "demand"]
    stride = max(1, -(-len(copies) // _MOST_COPIES))
    return {
        "phase": [phase for phase, whole in zip(steps["phase"], is_pass, strict=True) if whole],
        "pass_s": [
            round(s, 7) for s, whole in zip(steps["total_s"], is_pass, strict=True) if whole
        ],
        "token_s": [[round(s, 7) for s in one.token_s] for one in record.sequences],
        "copy_bytes": copies[0].num_bytes if copies else 0,
        "copy_s": [round(copy.end_s - copy.start_s, 8) for copy in copies[::stride]],
    }


@contextmanager
def closing(machine: Machine) -> Iterator[Machine]:
    """Give back a machine's page locks and files."""
    try:
        yield machine
    finally:
        machine.close()

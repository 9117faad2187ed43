"""A model, its packed experts and its device: what stays while policies come and go."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..simulator.account import RunContext, RunRecord, SequenceTimes, summarize
from ..simulator.bounds import measured_bounds
from ..simulator.policy.replay import replay
from ..simulator.policy.spec import PolicySpec
from ..simulator.result import ArrivalResult, Bounds, MemoryResult, Result
from ..tracer.blocks import HostBlocks, Tier
from ..tracer.generate import Generated, Prompt, StepObserver, StepTokens, greedy
from ..tracer.load import LoadedModel
from ..tracer.memory import METERED_PASSES, SilentObserver, peaks, peaks_of
from ..tracer.probe import machine_name, provenance
from ..tracer.prompts import batches
from ..tracer.quantities import LinkSpec
from ..tracer.timing import StepInfo
from ..tracer.types import Origin
from .paths.model import PathModel
from .session import Session
from .units import UnitLoop, units_of

_WARM_UP_TOKENS = 3

Watch = Callable[[Session, MemoryResult], StepObserver]


class Machine:
    """One loaded model on one device, ready to run under any policy.

    Making it packs the experts and empties the model's own expert weights; run what needs the resident
    model before. `paths` is a path predictor on the same device, for policies that ask one. `blocks` are the experts
    if they have been packed already.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        device: torch.device,
        *,
        link: LinkSpec | None = None,
        tier: Tier = "ram",
        pin: bool = True,
        trace_id: str = "",
        paths: PathModel | None = None,
        blocks: HostBlocks | None = None,
    ) -> None:
        self.loaded = loaded
        self.device = device
        self.link = link
        self.trace_id = trace_id
        self.paths = paths
        self._settles = True
        self.blocks = blocks or loaded.pack(
            tier=tier, pin=pin and device.type == "cuda" and tier == "ram"
        )
        loaded.model.to(device)
        self.watch: Watch | None = None
        """Given a session and its memory before a run, what is to see its passes in the session's place."""

    @property
    def link_name(self) -> str:
        """What carries the experts, for results."""
        if self.link is not None:
            return self.link.text
        if self.device.type == "cuda":
            return "host to device"
        return "disk to memory" if self.blocks.tier == "disk" else "host memory to host memory"

    @property
    def link_origin(self) -> Origin:
        """Whether the link is real."""
        return "emulated" if self.link is not None else "measured"

    @contextmanager
    def session(self, spec: PolicySpec) -> Iterator[Session]:
        """The model under a policy, while the context is open."""
        session = Session(
            self.loaded,
            self.blocks,
            spec,
            self.device,
            link=self.link,
            paths=self.paths,
            settles=self._settles,
        )
        try:
            yield session
        finally:
            session.close()

    @contextmanager
    def always_asking(self) -> Iterator[None]:
        """Sessions begun meanwhile ask the core of every event, even where all is settled: to see what that takes."""
        self._settles = False
        try:
            yield
        finally:
            self._settles = True

    def run(
        self,
        spec: PolicySpec,
        prompts: Sequence[Prompt],
        *,
        batch_size: int,
        max_new_tokens: int,
        memory: MemoryResult | None = None,
    ) -> tuple[RunRecord, list[Generated]]:
        """Generate under a policy and keep the raw rows. A short warm-up comes before and is dropped."""
        self._warm_up(spec, prompts[:1])
        measured = memory or self.peak_memory(spec, prompts, batch_size)
        with self.session(spec) as session, no_collector():
            observer = session if self.watch is None else self.watch(session, measured)
            loop = self._loop(session, batch_size, max_new_tokens, observer)
            if loop is None:
                outputs = self._generate(observer, prompts, batch_size, max_new_tokens)
            else:
                outputs = loop.run(prompts)
            record = RunRecord(
                steps=session.take_steps(),
                copies=session.copies(),
                log=session.log,
                sequences=sequence_times(prompts, outputs),
                memory=measured,
                regrouping=None if loop is None else loop.result(),
                routing=session.routing.result() if session.routing is not None else None,
            )
        return record, outputs

    def result(
        self,
        record: RunRecord,
        spec: PolicySpec,
        *,
        batch_size: int,
        same_tokens: bool | None = None,
        arrivals: ArrivalResult | None = None,
    ) -> Result:
        """Add a run up and check that its log replays. `arrivals` says how requests were served that arrived."""
        context = RunContext(
            source="measured",
            spec=spec,
            shape=self.loaded.shape,
            trace_id=self.trace_id,
            device=device_name(self.device),
            link=self.link_name,
            link_origin=self.link_origin,
            batch_size=batch_size,
            provenance=provenance(0, "own-generation"),
        )
        replayed = replay(record.log, spec, self.loaded.shape)
        result = summarize(record, context, arrivals=arrivals)
        bounds = measured_bounds(result, record, spec, self.loaded.shape)
        if arrivals is not None and arrivals.offered_per_s > 0:
            bounds = Bounds()  # the machine was idle in between: nothing bounds that
        return replace(
            result,
            bounds=bounds,
            regrouping=record.regrouping,
            same_tokens=same_tokens,
            log_replays=replayed.is_exact,
            routing=record.routing,
        )

    def peak_memory(
        self, spec: PolicySpec, prompts: Sequence[Prompt], batch_size: int
    ) -> MemoryResult:
        """Measure the peak on the largest batch, in passes apart from the timed ones.

        Beside weights and slots, which are counted exactly, what is measured is the peak of all working
        tensors and KV cache together; the cache's own share is its tensors' size.
        """
        with self.session(spec) as session:
            first = self.fill_cache(session, prompts[:1])
            if session.scheduler is None:
                largest = max(batches(prompts, batch_size), key=_padded)
                found = peaks(self.loaded, largest, self.device, observer=session, first_step=first)
                return self._memory_of(session, spec, found, _kv_positions(found))
            found, positions = self._unit_peaks(session, prompts, batch_size, first)
            return self._memory_of(session, spec, found, positions)

    def peak_of_run(
        self,
        spec: PolicySpec,
        prompts: Sequence[Prompt],
        *,
        batch_size: int,
        max_new_tokens: int,
    ) -> MemoryResult:
        """The same over all passes of a run, run again: waves differ from pass to pass, and the KV cache grows.

        On the CPU it takes about as long as two runs, since every operation is watched.
        """
        with self.session(spec) as session:
            loops: list[UnitLoop] = []

            def generate(watch: StepObserver) -> None:
                loop = self._loop(session, batch_size, max_new_tokens, watch)
                if loop is None:
                    self._generate(watch, prompts, batch_size, max_new_tokens)
                else:
                    loops.append(loop)
                    loop.run(prompts)

            found = peaks_of(generate, self.device, session)
            positions = loops[0].kv_positions if loops else _kv_positions(found)
            return self._memory_of(session, spec, found, positions)

    def _memory_of(
        self,
        session: Session,
        spec: PolicySpec,
        found: Sequence[tuple[StepInfo, int]],
        positions: Mapping[int, int],
    ) -> MemoryResult:
        """The worst pass by class; `positions` of KV caches by step."""
        info, peak = max(found, key=lambda item: item[1])
        kv_bytes = self.loaded.shape.kv_bytes_per_token * positions[info.step]
        return MemoryResult(
            non_expert_weights=parameter_bytes(self.loaded),
            slots=session.store.arena.num_bytes,
            kv_cache=min(kv_bytes, peak),
            activations=max(0, peak - kv_bytes),
            predictor=predictor_bytes(self.paths) if "paths" in spec.needs() else 0,
        )

    def _loop(
        self, session: Session, batch_size: int, max_new_tokens: int, observer: StepObserver
    ) -> UnitLoop | None:
        """Batches in turns, for policies that regroup them."""
        if session.scheduler is None:
            return None
        return UnitLoop(
            self.loaded,
            session,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            observer=observer,
        )

    def _unit_peaks(
        self, session: Session, prompts: Sequence[Prompt], batch_size: int, first_step: int
    ) -> tuple[list[tuple[StepInfo, int]], dict[int, int]]:
        """Peaks of the first passes of the largest unit, and the positions of its KV caches, by step."""
        assert session.scheduler is not None
        units = units_of(prompts, batch_size, session.scheduler.batches)
        largest = max(units, key=lambda unit: sum(map(_padded, unit)))
        loops: list[UnitLoop] = []

        def generate(watch: StepObserver) -> None:
            loop = UnitLoop(
                self.loaded,
                session,
                batch_size=batch_size,
                max_new_tokens=METERED_PASSES,
                eos_ids=frozenset(),
                observer=watch,
                first_step=first_step,
            )
            loops.append(loop)
            loop.run([prompt for batch in largest for prompt in batch])

        found = peaks_of(generate, self.device, session)
        return found, loops[0].kv_positions

    def _generate(
        self,
        observer: StepObserver,
        prompts: Sequence[Prompt],
        batch_size: int,
        max_new_tokens: int,
    ) -> list[Generated]:
        return generate_all(
            self.loaded,
            prompts,
            observer=observer,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )

    def fill_cache(self, session: Session, prompts: Sequence[Prompt]) -> int:
        """Run a few passes so that a session's slots hold what a run's would; returns the next step."""
        self._generate(session, prompts, 1, _WARM_UP_TOKENS)
        return _WARM_UP_TOKENS

    def _warm_up(self, spec: PolicySpec, prompts: Sequence[Prompt]) -> None:
        with self.session(spec) as session:
            self.fill_cache(session, prompts)

    def close(self) -> None:
        """Give back page locks and files."""
        self.blocks.close()


def _kv_positions(found: Sequence[tuple[StepInfo, int]]) -> dict[int, int]:
    return {info.step: info.batch * info.context for info, _ in found}


def _padded(batch: Sequence[Prompt]) -> int:
    """Tokens of the pass over a batch's prompts."""
    return len(batch) * max(len(prompt.token_ids) for prompt in batch)


def device_name(device: torch.device) -> str:
    """The machine and the device, as results name them."""
    return f"{machine_name(str(device))} ({device})"


@contextmanager
def no_collector() -> Iterator[None]:
    """Keep Python's cycle collector out of timed passes: it walks the whole growing log."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def generate_all(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    max_new_tokens: int,
    observer: StepObserver | None = None,
) -> list[Generated]:
    """Generate greedily for all prompts in batches; without an observer the model runs as it is."""
    outputs: list[Generated] = []
    counted = _Passes(observer or SilentObserver())
    for batch in batches(prompts, batch_size):
        outputs += greedy(
            loaded.model,
            batch,
            max_new_tokens=max_new_tokens,
            eos_ids=loaded.eos_ids,
            pad_id=loaded.pad_id,
            first_step=counted.passes,
            observer=counted,
        )
    return outputs


class _Passes:
    """Counts the passes that somebody else observes: steps are numbered by them, as in a trace."""

    def __init__(self, observer: StepObserver) -> None:
        self._observer = observer
        self.passes = 0

    def begin_step(self, info: StepInfo, tokens: StepTokens) -> None:
        self.passes += 1
        self._observer.begin_step(info, tokens)

    def end_step(self) -> float:
        return self._observer.end_step()


def sequence_times(prompts: Sequence[Prompt], outputs: Sequence[Generated]) -> list[SequenceTimes]:
    """When the tokens of each sequence appeared, for results."""
    lengths = {prompt.sequence: len(prompt.token_ids) for prompt in prompts}
    return [
        SequenceTimes(one.sequence, lengths[one.sequence], tuple(one.token_s)) for one in outputs
    ]


def predictor_bytes(model: PathModel | None) -> int:
    """Bytes of a path predictor's weights; 0 without one."""
    return 0 if model is None else sum(p.numel() * p.element_size() for p in model.parameters())


def parameter_bytes(loaded: LoadedModel) -> int:
    """Bytes of what a model keeps on its device: weights and buffers, without experts that were packed."""
    tensors = [*loaded.model.parameters(), *loaded.model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

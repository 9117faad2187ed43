"""Greedy generation of batches in turns, regrouped by the policy's scheduler (the simulator's side: regroup.py).

Prompts are read batch by batch, as by tracer.generate.greedy. Then the batches of a unit are made equally wide and take
turns, one decode step each. Before a round of turns those that have ended leave, and the scheduler may move sequences
between batches with their keys and values. A sequence's mask and positions are its own, whoever runs beside it.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ..simulator.policy.base import Regrouping
from ..simulator.policy.units import Placement, arrange, ask, is_time, source_of_routes
from ..simulator.result import RegroupingResult
from ..simulator.routes import routes_of
from ..tracer.errors import UsageError
from ..tracer.generate import (
    Generated,
    Prompt,
    StepObserver,
    StepTokens,
    left_padded,
    writes_otherwise,
)
from ..tracer.load import LoadedModel
from ..tracer.prompts import batches
from ..tracer.store import NO_EXPERT
from ..tracer.timing import StepInfo
from .kv_rows import move_rows, require_movable, widen, width_of
from .paths.live import PathFollower
from .session import Session


class _Watching(Protocol):
    """What the loop tells of its passes: a session, or something that shows passes to one."""

    def begin_step(self, info: StepInfo, tokens: StepTokens) -> None: ...

    def end_step(self) -> float: ...


@dataclass(slots=True)
class _Sequence:
    """One sequence on its way. `begun_s` is when its prompt was read, `next_token` what it is fed next."""

    prompt: Prompt
    output: Generated
    begun_s: float
    next_token: int = -1
    is_done: bool = False

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.token_ids)

    def take(self, token: int, now_s: float, most: int, eos_ids: frozenset[int]) -> None:
        """The model has chosen a token."""
        forced = self.prompt.forced
        token = forced[len(self.output.token_ids)] if forced else token
        self.output.token_ids.append(token)
        self.output.token_s.append(now_s - self.begun_s)
        self.next_token = token
        if not forced and token in eos_ids:
            self.output.finish, self.is_done = "eos", True
        if len(self.output.token_ids) >= min(most, len(forced) or most):
            self.is_done = True


@dataclass(slots=True)
class _Counts:
    """What regrouping did and took so far."""

    asked: int = 0
    changed: int = 0
    moved: int = 0
    positions: int = 0
    decision_s: float = 0.0
    move_s: float = 0.0
    passes: int = 0
    distinct: int = 0


class UnitLoop:
    """Generates for batches in turns under a session whose policy regroups. Good for one run; `outputs` are in order.

    `observer` sees the passes, if it is not the session itself. `kv_positions` counts by step the positions of the KV
    caches of all batches that are on the device.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        session: Session,
        *,
        batch_size: int,
        max_new_tokens: int,
        eos_ids: frozenset[int] | None = None,
        observer: StepObserver | None = None,
        first_step: int = 0,
    ) -> None:
        assert session.scheduler is not None
        assert session.chosen is not None
        if writes_otherwise(loaded.model):
            raise UsageError(
                "This model does not write one token per pass from left to right, so its batches are not decoded in "
                "turns. Use --scheduler fcfs."
            )
        self._loaded, self._session = loaded, session
        self._scheduler: Regrouping = session.scheduler
        self._chosen = session.chosen
        self._source = source_of_routes(self._scheduler)
        self._limit, self._most = batch_size, max_new_tokens
        self._eos_ids = loaded.eos_ids if eos_ids is None else eos_ids
        self._observer: _Watching = observer or session
        self._device = next(loaded.model.parameters()).device
        accepted = inspect.signature(loaded.model.forward).parameters
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._step, self._clock = first_step, 0.0
        self._counts = _Counts()
        self.kv_positions: dict[int, int] = {}

    @torch.inference_mode()
    def run(self, prompts: Sequence[Prompt]) -> list[Generated]:
        """Generate for all prompts. Raises UsageError if any shows images."""
        if any(prompt.inputs for prompt in prompts):
            raise UsageError(
                "Prompts with images are not regrouped: their positions do not move. Use --scheduler fcfs."
            )
        outputs: list[Generated] = []
        for unit in units_of(prompts, self._limit, self._scheduler.batches):
            outputs += [sequence.output for sequence in self._unit(unit)]
        return outputs

    def result(self) -> RegroupingResult:
        """What the regrouping did and took."""
        counts = self._counts
        return RegroupingResult(
            batches=self._scheduler.batches,
            asked=counts.asked,
            changed=counts.changed,
            moved=counts.moved,
            kv_bytes=counts.positions * self._loaded.shape.kv_bytes_per_token,
            decision_s=counts.decision_s,
            move_s=counts.move_s,
            passes=counts.passes,
            distinct=counts.distinct,
        )

    def _unit(self, prompts: Sequence[Sequence[Prompt]]) -> list[_Sequence]:
        unit = _Unit(self._shape(), self._paths())
        for batch in prompts:
            self._read(unit, batch)
        width, count = max(map(width_of, unit.caches)), 0
        while not all(sequence.is_done for sequence in unit.sequences):
            self._session.prepare()
            self._prepare(unit, width, count)
            for number in range(len(unit.held)):
                self._decode(unit, number, width, count)
            count += 1
        return unit.sequences

    def _prepare(self, unit: _Unit, width: int, count: int) -> None:
        """Who runs with whom in the next round."""
        counts = self._counts
        began = time.perf_counter()
        groups = unit.alive()
        if unit.follower is not None:
            unit.follow(count)
        if is_time(self._scheduler, count, len(groups), self._limit):
            groups = self._regrouped(unit, groups)
        decided = time.perf_counter()
        if count == 0:
            narrow = [number for number, c in enumerate(unit.caches) if width_of(c) < width]
            for number in narrow:
                widen(unit.caches[number], width)
                counts.positions += len(unit.held[number]) * width
        placed = arrange(unit.held, groups)
        unit.move(placed)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        counts.moved += sum(placement.arrived for placement in placed)
        counts.positions += sum(len(placement.copied) for placement in placed) * (width + count)
        counts.decision_s += decided - began
        counts.move_s += time.perf_counter() - decided

    def _regrouped(self, unit: _Unit, groups: list[list[int]]) -> list[list[int]]:
        alive = [sequence for rows in groups for sequence in rows]
        places = {sequence: place for place, sequence in enumerate(alive)}
        # As many as the router takes; a path predictor names more, likeliest first.
        told = unit.chosen if self._source == "previous" else unit.paths
        experts = told[alive, :, : self._loaded.shape.top_k]
        routes = routes_of(experts, self._loaded.shape.num_experts)
        before = [[places[sequence] for sequence in rows] for rows in groups]
        found = ask(self._scheduler, routes, before, self._limit)
        self._counts.asked += 1
        self._counts.changed += sorted(map(sorted, found)) != sorted(map(sorted, before))
        return [[alive[place] for place in group] for group in found]

    def _read(self, unit: _Unit, batch: Sequence[Prompt]) -> None:
        """The pass over the prompts of one batch."""
        begun_s, first = self._clock, len(unit.sequences)
        unit.add([_Sequence(prompt, Generated(prompt.sequence), begun_s) for prompt in batch])
        width = max(len(prompt.token_ids) for prompt in batch)
        ids, mask = left_padded(batch, width, self._loaded.pad_id)
        positions = torch.where(mask.bool(), mask.cumsum(dim=1) - 1, -1)
        tokens = StepTokens(
            [prompt.sequence for prompt in batch for _ in range(width)],
            positions.flatten().tolist(),
            ids.flatten().tolist(),
        )
        info = StepInfo(
            step=self._step,
            phase="prefill",
            batch=len(batch),
            tokens=len(batch) * width,
            context=width,
        )
        rows = list(range(first, len(unit.sequences)))
        cache = self._pass(unit, info, tokens, ids, mask, positions.clamp(min=0), None, rows)
        require_movable(cache)
        unit.held.append(rows)
        unit.caches.append(cache)

    def _decode(self, unit: _Unit, number: int, width: int, count: int) -> None:
        """One decode step of one batch."""
        rows = unit.held[number]
        running = [unit.sequences[row] for row in rows]
        context = width + count + 1
        ids = torch.tensor([[sequence.next_token] for sequence in running])
        mask = torch.zeros(len(rows), context, dtype=torch.long)
        for row, sequence in enumerate(running):
            mask[row, width - sequence.length :] = 1
        positions = torch.tensor([[sequence.length + count] for sequence in running])
        tokens = StepTokens(
            [sequence.prompt.sequence for sequence in running],
            positions.flatten().tolist(),
            ids.flatten().tolist(),
        )
        info = StepInfo(
            step=self._step, phase="decode", batch=len(rows), tokens=len(rows), context=context
        )
        if self._session.paths is not None:
            self._session.paths.tell(unit.paths[rows])
        self._pass(unit, info, tokens, ids, mask, positions, unit.caches[number], rows)
        self._counts.passes += 1
        self._counts.distinct += sum(len(np.unique(ids)) for ids in self._chosen.values())

    def _pass(
        self,
        unit: _Unit,
        info: StepInfo,
        tokens: StepTokens,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        rows: Sequence[int],
    ) -> Any:
        """Run the model; its sequences `rows` take their tokens. Returns the cache."""
        beside = sum(len(r) * width_of(c) for r, c in zip(unit.held, unit.caches, strict=True))
        own = 0 if cache is None else len(rows) * width_of(cache)
        self.kv_positions[info.step] = beside - own + info.batch * info.context
        self._observer.begin_step(info, tokens)
        out = self._loaded.model(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            position_ids=positions.to(self._device),
            past_key_values=cache,
            use_cache=True,
            **self._extra,
        )
        chosen = out.logits[:, -1].argmax(dim=-1).tolist()
        self._clock += self._observer.end_step()
        self._step += 1
        for row, token in zip(rows, chosen, strict=True):
            unit.sequences[row].take(token, self._clock, self._most, self._eos_ids)
        unit.note(rows, self._chosen)
        return out.past_key_values

    def _shape(self) -> tuple[int, int]:
        shape = self._loaded.shape
        return shape.num_moe_layers, shape.top_k

    def _paths(self) -> PathFollower | None:
        model = self._session.path_model
        return None if model is None else PathFollower(model, 2 * self._loaded.shape.top_k)


@dataclass(slots=True)
class _Unit:
    """Batches that take turns. `held` are the sequences of each by row, as numbers in `sequences`, like all rows here.

    `chosen` [sequences, layers, k] are the experts that the last token of each chose, `paths` [sequences, layers, m]
    what the predictor says of its next.
    """

    shape: tuple[int, int]
    follower: PathFollower | None
    sequences: list[_Sequence] = field(default_factory=list)
    held: list[list[int]] = field(default_factory=list)
    caches: list[Any] = field(default_factory=list)
    chosen: np.ndarray = field(init=False)
    paths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.chosen = np.full((0, *self.shape), NO_EXPERT, np.uint16)
        self.paths = self.chosen

    def add(self, sequences: Sequence[_Sequence]) -> None:
        """A batch joins."""
        self.sequences += sequences
        nobody = np.full((len(sequences), *self.shape), NO_EXPERT, np.uint16)
        self.chosen = np.concatenate([self.chosen, nobody])

    def alive(self) -> list[list[int]]:
        """The batches without those that have ended."""
        found = [[row for row in rows if not self.sequences[row].is_done] for rows in self.held]
        return [rows for rows in found if rows]

    def note(self, rows: Sequence[int], routing: dict[int, np.ndarray]) -> None:
        """Remember what the last token of each row chose."""
        for layer, ids in routing.items():
            self.chosen[rows, layer] = ids.reshape(len(rows), -1, ids.shape[-1])[:, -1]

    def follow(self, count: int) -> None:
        """Ask the path predictor of the next token of all, those that have ended as padding."""
        assert self.follower is not None
        if count == 0:
            self.follower.step(self._prompts(), len(self.sequences))
        found = self.follower.step(
            StepTokens(
                [sequence.prompt.sequence for sequence in self.sequences],
                [-1 if s.is_done else s.length + count for s in self.sequences],
                [max(0, sequence.next_token) for sequence in self.sequences],
            ),
            len(self.sequences),
        )
        assert found is not None, "the follower has seen every token"
        self.paths = found

    def move(self, placed: Sequence[Placement]) -> None:
        """Give every sequence its place."""
        self.caches = move_rows(self.caches, placed)
        self.held = [list(placement.rows) for placement in placed]

    def _prompts(self) -> StepTokens:
        """The prompts of all batches as one pass."""
        prompts = [sequence.prompt for sequence in self.sequences]
        width = max(len(prompt.token_ids) for prompt in prompts)
        ids, mask = left_padded(prompts, width, 0)
        positions = torch.where(mask.bool(), mask.cumsum(dim=1) - 1, -1)
        return StepTokens(
            [prompt.sequence for prompt in prompts for _ in range(width)],
            positions.flatten().tolist(),
            ids.flatten().tolist(),
        )


def units_of(
    prompts: Sequence[Prompt], batch_size: int, number: int
) -> Iterator[list[list[Prompt]]]:
    """`number` adjacent batches at a time, fewer at the end."""
    found = batches(prompts, batch_size)
    while unit := list(itertools.islice(found, number)):
        yield unit

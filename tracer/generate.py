"""Greedy generation in plain sight: the loop the tracer and the runtime both drive.

It does what `model.generate(do_sample=False)` does for a left-padded batch, token for token (tested),
but shows each forward pass to an observer, so that steps can be timed and routing can be tied to
sequences and positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from .timing import StepInfo


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tokenised prompt. `sequence` numbers it within the run."""

    sequence: int
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Generated:
    """What one sequence became. `token_s` are the times its tokens appeared, batch start = 0."""

    sequence: int
    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    finish: Literal["length", "eos"] = "length"


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The tokens of one pass, row-major over [batch, query]: what each routing row belongs to.

    position is -1 for padding, which includes rows whose sequence has ended.
    """

    sequence: list[int]
    position: list[int]
    token_id: list[int]


class StepObserver(Protocol):
    """Sees every forward pass of a generation."""

    def begin_step(self, info: StepInfo, tokens: StepTokens) -> None:
        """A pass is about to run."""
        ...

    def end_step(self) -> float:
        """The pass has run; returns the seconds it took."""
        ...


@torch.inference_mode()
def greedy(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    pad_id: int,
    first_step: int,
    observer: StepObserver,
) -> list[Generated]:
    """Generate greedily for one batch; the first pass is the prefill.

    Stops when every sequence has ended or reached `max_new_tokens`. An ended sequence stays in the
    batch as padding, as in the library's own loop.
    """
    device = next(model.parameters()).device
    outputs = [Generated(prompt.sequence) for prompt in prompts]
    lengths = [len(prompt.token_ids) for prompt in prompts]
    width = max(lengths)
    input_ids, mask = _left_padded(prompts, width, pad_id)
    is_done = [False] * len(prompts)
    cache: Any = None
    clock = 0.0
    for count in range(max_new_tokens):
        query = input_ids.shape[1]
        info = StepInfo(
            step=first_step + count,
            phase="prefill" if cache is None else "decode",
            batch=len(prompts),
            tokens=len(prompts) * query,
            context=width + count,
        )
        tokens = _step_tokens(prompts, input_ids, width, lengths, is_done, count)
        observer.begin_step(info, tokens)
        out = model(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            position_ids=_positions(mask, query).to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        chosen = out.logits[:, -1].argmax(dim=-1).tolist()
        clock += observer.end_step()
        _append(outputs, chosen, is_done, eos_ids, clock)
        if all(is_done):
            break
        input_ids = torch.tensor(
            [[pad_id if done else token] for token, done in zip(chosen, is_done, strict=True)]
        )
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], dim=1)
    return outputs


def _left_padded(
    prompts: Sequence[Prompt], width: int, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        ids[row, width - length :] = torch.tensor(prompt.token_ids)
        mask[row, width - length :] = 1
    return ids, mask


def _positions(mask: torch.Tensor, query: int) -> torch.Tensor:
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return positions[:, -query:]


def _step_tokens(
    prompts: Sequence[Prompt],
    input_ids: torch.Tensor,
    width: int,
    lengths: list[int],
    is_done: list[bool],
    count: int,
) -> StepTokens:
    query = input_ids.shape[1]
    sequences: list[int] = []
    positions: list[int] = []
    for row, prompt in enumerate(prompts):
        sequences += [prompt.sequence] * query
        if query > 1 or count == 0:
            padding = width - lengths[row]
            positions += [-1] * padding + list(range(lengths[row]))
        else:
            positions.append(-1 if is_done[row] else lengths[row] + count - 1)
    return StepTokens(sequences, positions, input_ids.flatten().tolist())


def _append(
    outputs: list[Generated],
    chosen: list[int],
    is_done: list[bool],
    eos_ids: frozenset[int],
    clock: float,
) -> None:
    for row, token in enumerate(chosen):
        if is_done[row]:
            continue
        outputs[row].token_ids.append(token)
        outputs[row].token_s.append(clock)
        if token in eos_ids:
            outputs[row].finish = "eos"
            is_done[row] = True

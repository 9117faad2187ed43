"""Which sequences a replay runs, and the routing of each of their tokens, pass by pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...simulator.workload import Rows, Steps, Workload, build_workload
from ...tracer.arrays import NO_EXPERT
from ...tracer.errors import UsageError
from ...tracer.generate import Prompt, StepTokens
from ...tracer.prompts import batches
from ...tracer.timing import StepInfo
from .routing import TokenRouting

_SHORTEST = 4
"""Positions that every sequence has: a warm-up feeds that many at least."""


@dataclass(frozen=True, slots=True, eq=False)
class ReplayPlan:
    """Prompts whose every token has recorded routing; `first` and `length` are their rows of it, by sequence number."""

    routing: TokenRouting
    prompts: tuple[Prompt, ...]
    new_tokens: int
    first: np.ndarray
    length: np.ndarray

    def rows(self, tokens: StepTokens) -> np.ndarray:
        """Rows of `routing` for the tokens of a pass: [tokens]. Padding follows its sequence's first token."""
        sequence = np.asarray(tokens.sequence)
        position = np.maximum(np.asarray(tokens.position), 0)
        # What runs on beyond the recorded end, such as passes that measure memory, stays with the last token.
        return self.first[sequence] + np.minimum(position, self.length[sequence] - 1)

    def divide(self, limit: int | None = None) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
        """Two thirds of the first `limit` to be judged, a third to calibrate and learn from; one serves for both."""
        prompts = self.prompts[:limit]
        learned = prompts[2::3] or prompts[-1:]
        judged = tuple(prompt for prompt in prompts if prompt not in learned)
        return judged or learned, learned


def plan_replay(
    routing: TokenRouting,
    *,
    limit: int | None,
    new_tokens: int,
    prompt_tokens: int | None,
    vocab_size: int,
) -> ReplayPlan:
    """Choose sequences, spread over the recording, and cut each into a prompt and `new_tokens` generated ones.

    The prompt is what was recorded as such, cut to `prompt_tokens` and to what leaves room for generated tokens; all
    but them where no prompt was recorded. The routing says where a token stands, so token ids are arbitrary. Raises
    UsageError if no sequence is long enough.
    """
    if new_tokens < 1:
        raise UsageError(f"--new-tokens must be at least 1, got {new_tokens}.")
    if prompt_tokens is not None and prompt_tokens < 1:
        raise UsageError(f"--prompt-tokens must be at least 1, got {prompt_tokens}.")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}.")
    fed = np.maximum(new_tokens - 1, _SHORTEST - 1)  # the last token is never fed
    fitting = np.flatnonzero(routing.lengths > fed)
    if not len(fitting):
        raise UsageError(
            f"No recorded sequence has more than {fed} tokens (the longest has {routing.lengths.max()}), so "
            f"{new_tokens} cannot be generated after a prompt. Ask for fewer --new-tokens."
        )
    count = len(fitting) if limit is None else min(limit, len(fitting))
    chosen = fitting[(np.arange(count) * len(fitting) / count).astype(np.int64)]
    prompts: list[Prompt] = []
    for number, place in enumerate(chosen.tolist()):
        room = int(routing.lengths[place] - fed)
        wanted = int(routing.prompt[place]) or room
        length = min(room, wanted, prompt_tokens or room)
        prompts.append(Prompt(number, _token_ids(number, length, vocab_size)))
    return ReplayPlan(
        routing=routing,
        prompts=tuple(prompts),
        new_tokens=new_tokens,
        first=routing.first[chosen],
        length=routing.lengths[chosen],
    )


def _token_ids(number: int, length: int, vocab_size: int) -> tuple[int, ...]:
    return tuple((1 + 7919 * number + 104_729 * place) % vocab_size for place in range(length))


def replay_workload(plan: ReplayPlan, prompts: Sequence[Prompt], batch_size: int) -> Workload:
    """What a run of these prompts will demand: known before it runs, padding included."""
    infos: list[StepInfo] = []
    tables: list[np.ndarray] = []
    tokens: list[StepTokens] = []
    for info, fed in passes(prompts, batch_size, plan.new_tokens):
        infos.append(info)
        tables.append(plan.rows(fed))
        tokens.append(fed)
    layers = plan.routing.num_layers
    depths = sorted(plan.routing.lookahead)
    sizes = np.asarray([len(rows) for rows in tables])
    taken = np.concatenate([np.tile(rows, layers) for rows in tables])
    layer = np.concatenate([np.repeat(np.arange(layers), size) for size in sizes.tolist()])
    step = np.repeat(np.arange(len(infos)), sizes * layers)
    position = _tiled([np.asarray(fed.position) for fed in tokens], layers)
    weights = plan.routing.weights
    rows = Rows(
        experts=plan.routing.experts[taken, layer],
        sequence=_tiled([np.asarray(fed.sequence) for fed in tokens], layers),
        weights=None if weights is None else weights[taken, layer].astype(np.float16),
        lookahead={depth: plan.routing.lookahead[depth][taken, layer] for depth in depths},
        is_pad=position < 0,
        position=position,
    )
    members = [_members(fed) for fed in tokens]
    steps = Steps(
        number=np.arange(len(infos)),
        is_decode=np.asarray([info.phase == "decode" for info in infos]),
        batch=np.asarray([info.batch for info in infos]),
        tokens=np.asarray([info.tokens for info in infos]),
        context=np.asarray([info.context for info in infos]),
        member_ptr=np.concatenate(([0], np.cumsum([len(found) for found in members]))),
        members=np.concatenate(members),
    )
    return build_workload(
        steps,
        step,
        layer,
        rows,
        prompt_tokens={prompt.sequence: len(prompt.token_ids) for prompt in prompts},
        batch_size=batch_size,
        num_layers=layers,
        num_experts=plan.routing.num_experts,
        lookahead=max(depths, default=0),
    )


def passes(
    prompts: Sequence[Prompt], batch_size: int, new_tokens: int
) -> Iterator[tuple[StepInfo, StepTokens]]:
    """The passes of a greedy run in which no sequence ends early, as an observer sees them; generated ids are -1."""
    step = 0
    for batch in batches(prompts, batch_size):
        lengths = [len(prompt.token_ids) for prompt in batch]
        width = max(lengths)
        for count in range(new_tokens):
            query = 1 if count else width
            positions: list[int] = []
            for length in lengths:
                own = [length + count - 1] if count else list(range(length))
                positions += [-1] * (query - len(own)) + own
            info = StepInfo(
                step=step,
                phase="decode" if count else "prefill",
                batch=len(batch),
                tokens=len(batch) * query,
                context=width + count,
            )
            sequences = [prompt.sequence for prompt in batch for _ in range(query)]
            yield info, StepTokens(sequences, positions, [-1] * len(positions))
            step += 1


def _tiled(values: Sequence[np.ndarray], layers: int) -> np.ndarray:
    """Per pass, once for every layer."""
    return np.concatenate([np.tile(found, layers) for found in values])


def _members(tokens: StepTokens) -> np.ndarray:
    """Sequences with a real token, in order of rows."""
    return np.asarray(list(dict.fromkeys(tokens.sequence)), dtype=np.int64)


def has_lookahead(routing: TokenRouting, depth: int) -> bool:
    """Whether early gates were recorded for at least one layer to that depth."""
    return all(
        d in routing.lookahead and (routing.lookahead[d] != NO_EXPERT).any()
        for d in range(1, depth + 1)
    )

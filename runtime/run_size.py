"""How large a run's largest pass will be, from its prompts: read and made tokens of without the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..simulator.memory_plan import RunSize
from ..simulator.policy.spec import PolicyFile
from ..simulator.policy.units import regrouping_of
from ..tracer.errors import UsageError
from ..tracer.generate import Prompt
from ..tracer.prompts import (
    MAX_PROMPT_TOKENS,
    PromptText,
    batches,
    choose_prompts,
    read_prompts,
    tokenize,
)
from ..tracer.unloaded import tokenizer_of

if TYPE_CHECKING:
    from .deploy import RunRequest
    from .serving import Load

ONE_TOKEN = RunSize.of(batch=1, prompt=1, context=1)
"""A pass that every run makes: for callers who do not know yet what they will feed."""


def held_out(texts: Sequence[PromptText], policy: PolicyFile) -> list[PromptText]:
    """Prompts the policy has not been tuned on; all of them if none is left."""
    seen = set(policy.evidence.get("prompt_sha256", ()))
    return [text for text in texts if text.sha256 not in seen] or list(texts)


def prompts_to_run(
    request: RunRequest, model: str, *, held_out_from: PolicyFile | None
) -> list[Prompt]:
    """A request's prompts as tokens; those with images are taken to be as long as may be.

    Raises UsageError and InputError for prompts and counts that cannot be, ResourceError without a tokenizer.
    """
    if request.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {request.max_new_tokens}.")
    texts = read_prompts(request.prompts)
    if held_out_from is not None:
        texts = held_out(texts, held_out_from)
    texts = choose_prompts(texts, request.limit)
    if all(text.images for text in texts):
        return [Prompt(number, (0,) * MAX_PROMPT_TOKENS) for number in range(len(texts))]
    tokenizer = tokenizer_of(model)
    found: list[Prompt] = []
    for text in texts:
        if text.images:
            found.append(Prompt(len(found), (0,) * MAX_PROMPT_TOKENS))
        else:
            found += tokenize(tokenizer, [text], MAX_PROMPT_TOKENS)
    return found


def policy_size(policy: PolicyFile, request: RunRequest, model: str) -> RunSize:
    """The size of a run under a policy; a scheduler has several batches in progress at once. Raises as above."""
    prompts = prompts_to_run(request, model, held_out_from=policy)
    scheduler = regrouping_of(policy.behaviour.build_scheduler())
    together = scheduler.batches if scheduler is not None else 1
    return largest(prompts, request.batch_size, request.max_new_tokens, together=together)


def largest(
    prompts: Sequence[Prompt], batch_size: int, max_new_tokens: int, *, together: int = 1
) -> RunSize:
    """The largest pass over consecutive prompts that share a batch, with all new tokens behind them.

    `together` batches have a KV cache at the same time, each as wide as the widest. Raises UsageError for a batch of
    none.
    """
    found = list(batches(prompts, batch_size))
    units = batches(prompts, batch_size * together)
    # A last batch of a few long prompts may be fed more tokens than others, and hold less in the end.
    widest = max(units, key=lambda unit: len(unit) * (longest(unit) + max_new_tokens))
    return RunSize(
        batch=len(found[0]),
        tokens=max(len(batch) * longest(batch) for batch in found),
        context=longest(widest) + max_new_tokens,
        sequences=len(widest),
    )


def in_any_order(prompts: Sequence[Prompt], batch_size: int, max_new_tokens: int) -> RunSize:
    """The largest pass if some of the prompts are left out or change places: bounded by the longest of them."""
    widest = [max(prompts, key=lambda prompt: len(prompt.token_ids))] * len(prompts)
    return largest(widest, batch_size, max_new_tokens)


def served_size(load: Load) -> RunSize:
    """The largest pass of requests that arrive: one row (serving_pack.py), with as many as may be in progress.

    Its positions are those of the requests that get longest, which need not meet.
    """
    count = max(1, min(load.settings.max_batch, len(load.requests)))
    prompts = sorted((len(prompt.token_ids) for prompt in load.requests), reverse=True)
    totals = sorted(
        (
            len(prompt.token_ids) + new
            for prompt, new in zip(load.requests, load.new_tokens, strict=True)
        ),
        reverse=True,
    )
    fed = min(load.settings.max_step_tokens, sum(prompts[:count]))
    return RunSize(
        batch=1,
        tokens=max(count, fed),
        context=max(1, sum(totals[:count])),
        sequences=1,
        in_parts=True,
    )


def longest(batch: Sequence[Prompt]) -> int:
    """Tokens of the longest prompt."""
    return max(len(prompt.token_ids) for prompt in batch)

"""Greedy generation with an encoder-decoder model, in plain sight.

The encoder's one pass over the prompts is the prefill. Every decoder pass is a decode step; the first is fed the
start mark, which stands behind the prompt's tokens. It does what `model.generate(do_sample=False, num_beams=1)` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .errors import UsageError
from .generate import (
    Generated,
    Prompt,
    StepObserver,
    StepTokens,
    append_tokens,
    end_forced,
    forced_tokens,
)
from .timing import StepInfo


@torch.inference_mode()
def translate(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    pad_id: int,
    first_step: int,
    observer: StepObserver,
) -> list[Generated]:
    """Generate greedily for one batch; see generate.greedy."""
    device = next(model.parameters()).device
    outputs = [Generated(prompt.sequence) for prompt in prompts]
    lengths = [len(prompt.token_ids) for prompt in prompts]
    width = max(lengths)
    ids, mask = _right_padded(prompts, width, pad_id)
    observer.begin_step(
        StepInfo(
            step=first_step,
            phase="prefill",
            batch=len(prompts),
            tokens=ids.numel(),
            context=width,
        ),
        _prompt_tokens(prompts, ids, width),
    )
    encoded = model.get_encoder()(input_ids=ids.to(device), attention_mask=mask.to(device))
    clock = observer.end_step()
    start = _start_id(model)
    forced = getattr(model.generation_config, "forced_bos_token_id", None)
    step_ids = [start] * len(prompts)
    is_done = [False] * len(prompts)
    is_forced = [bool(prompt.forced) for prompt in prompts]
    cache: Any = None
    for count in range(max_new_tokens):
        observer.begin_step(
            StepInfo(
                step=first_step + 1 + count,
                phase="decode",
                batch=len(prompts),
                tokens=len(prompts),
                context=width + count + 1,
            ),
            StepTokens(
                [prompt.sequence for prompt in prompts],
                [
                    -1 if done else length + count
                    for length, done in zip(lengths, is_done, strict=True)
                ],
                step_ids,
            ),
        )
        out = model(
            encoder_outputs=encoded,
            attention_mask=mask.to(device),
            decoder_input_ids=torch.tensor(step_ids, device=device)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        chosen = out.logits[:, -1].argmax(dim=-1).tolist()
        clock += observer.end_step()
        if count == 0 and forced is not None:
            chosen = [forced] * len(prompts)
        chosen = forced_tokens(prompts, chosen, count)
        append_tokens(outputs, chosen, is_done, is_forced, eos_ids, clock)
        end_forced(prompts, is_done, count)
        if all(is_done):
            break
        step_ids = [pad_id if done else token for token, done in zip(chosen, is_done, strict=True)]
    return outputs


def _right_padded(
    prompts: Sequence[Prompt], width: int, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.token_ids)] = torch.tensor(prompt.token_ids)
        mask[row, : len(prompt.token_ids)] = 1
    return ids, mask


def _prompt_tokens(prompts: Sequence[Prompt], ids: torch.Tensor, width: int) -> StepTokens:
    sequences: list[int] = []
    positions: list[int] = []
    for prompt in prompts:
        length = len(prompt.token_ids)
        sequences += [prompt.sequence] * width
        positions += [*range(length), *([-1] * (width - length))]
    return StepTokens(sequences, positions, ids.flatten().tolist())


def _start_id(model: Any) -> int:
    for config in (model.generation_config, model.config):
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None:
            return start
    raise UsageError(
        f"{type(model).__name__} does not say which token starts its text (decoder_start_token_id). Add it to "
        "generation_config.json."
    )

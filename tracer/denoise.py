"""Generation with a diffusing model, which writes a block of tokens at once in several denoising passes.

The library's own loop runs, seeded; its passes are seen through hooks. A pass of the encoder (the prompt, later
each finished block) is a prefill step; a denoising pass over the block is a decode step. So the block is told by the
positions, and the denoising step by counting the decode steps with the same positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .errors import UsageError
from .generate import Generated, Prompt, StepObserver, StepTokens
from .timing import StepInfo
from .types import Phase


def is_diffusing(model: Any) -> bool:
    """Whether the model writes blocks by denoising them."""
    return hasattr(model.config, "canvas_length")


@torch.inference_mode()
def denoise(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    pad_id: int,
    first_step: int,
    observer: StepObserver,
) -> list[Generated]:
    """Generate for a batch of one prompt; see generate.greedy. Raises UsageError for a larger batch or given text."""
    if len(prompts) != 1 or prompts[0].forced:
        raise UsageError(
            f"{type(model).__name__} writes blocks of tokens; it is traced one prompt at a time and cannot be fed its "
            "text. Use --batch-size 1 and --own-generation."
        )
    [prompt] = prompts
    device = next(model.parameters()).device
    passes = _Passes(prompt, first_step, observer)
    encoder, decoder = model.model.encoder, model.model.decoder
    hooks = [
        encoder.register_forward_pre_hook(passes.begin("prefill", "input_ids"), with_kwargs=True),
        decoder.register_forward_pre_hook(
            passes.begin("decode", "decoder_input_ids"), with_kwargs=True
        ),
        encoder.register_forward_hook(passes.end),
        decoder.register_forward_hook(passes.end),
    ]
    ids = torch.tensor([prompt.token_ids], device=device)
    torch.manual_seed(prompt.sequence)
    try:
        output = model.generate(
            input_ids=ids,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(eos_ids) or None,
            pad_token_id=pad_id,
        )
    finally:
        for hook in hooks:
            hook.remove()
    written = getattr(output, "sequences", output)[0, ids.shape[1] :].tolist()
    return [_generated(prompt, written[:max_new_tokens], eos_ids, passes)]


class _Passes:
    """Tells the observer of every pass, and keeps when each block was finished."""

    def __init__(self, prompt: Prompt, first_step: int, observer: StepObserver) -> None:
        self._prompt = prompt
        self._step = first_step
        self._observer = observer
        self._seen = 0
        self._tokens = 0
        self._clock = 0.0
        self._phase: Phase = "prefill"
        self.finished: list[tuple[int, float]] = []

    def begin(self, phase: Phase, name: str) -> Any:
        """A hook that runs before passes of this kind, whose tokens are the argument of that name."""

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            ids = kwargs[name] if name in kwargs else args[0]
            count = ids.shape[1]
            if phase == "prefill" and self._seen:
                self.finished.append((self._seen + count, self._clock))
            self._phase, self._tokens = phase, count
            info = StepInfo(
                step=self._step, phase=phase, batch=1, tokens=count, context=self._seen + count
            )
            positions = list(range(self._seen, self._seen + count))
            tokens = StepTokens([self._prompt.sequence] * count, positions, ids.flatten().tolist())
            self._observer.begin_step(info, tokens)

        return before

    def end(self, module: Any, args: Any, output: Any) -> None:
        """A hook that runs after every pass."""
        self._clock += self._observer.end_step()
        self._step += 1
        if self._phase == "prefill":
            self._seen += self._tokens

    @property
    def clock_s(self) -> float:
        """Seconds of all passes so far."""
        return self._clock


def _generated(
    prompt: Prompt, written: list[int], eos_ids: frozenset[int], passes: _Passes
) -> Generated:
    ends = [place for place, token in enumerate(written) if token in eos_ids]
    kept = written[: ends[0] + 1] if ends else written
    start = len(prompt.token_ids)
    times = [
        next((at for end, at in passes.finished if start + place < end), passes.clock_s)
        for place in range(len(kept))
    ]
    return Generated(prompt.sequence, kept, times, "eos" if ends else "length")

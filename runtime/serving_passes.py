"""Runs planned passes (simulator.token_table.Pass) on a model: what each request is fed, and what it gets."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..simulator.token_table import Pass
from ..tracer.generate import Generated, Prompt, StepObserver, StepTokens
from ..tracer.load import LoadedModel
from ..tracer.memory import SilentObserver
from ..tracer.timing import StepInfo
from .serving_pack import Pack


@dataclass(slots=True)
class _Request:
    """One request on its way: its tokens so far, and how many of them the model has been fed."""

    token_ids: list[int]
    fed: int = 0


@dataclass(slots=True)
class _Fed:
    """The tokens of one pass. `last` is the place of each request's last one."""

    owners: list[int]
    positions: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    last: dict[int, int] = field(default_factory=dict)


class PassRunner:
    """The model's side of serving. Requests are numbered from 0; `outputs` are theirs.

    `kv_positions` are those of the KV cache by step.
    """

    def __init__(
        self, loaded: LoadedModel, requests: Sequence[Prompt], observer: StepObserver
    ) -> None:
        self._model, self._observer = loaded.model, observer
        self._device = next(loaded.model.parameters()).device
        self._pack = Pack(loaded.model, self._device)
        self._keeps_logits = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters
        self._requests = [_Request(list(prompt.token_ids)) for prompt in requests]
        self.outputs = [Generated(prompt.sequence) for prompt in requests]
        self.kv_positions: dict[int, int] = {}

    def keep(self, in_progress: Collection[int]) -> None:
        """Forget the keys and values of all requests but these."""
        self._pack.keep(in_progress)

    def run(self, found: Pass) -> list[tuple[int, int]]:
        """One pass; the requests that got a token, each with it."""
        fed = self._fed(found)
        info = StepInfo(
            step=found.number,
            phase="decode" if found.is_decode else "prefill",
            batch=found.batch,
            tokens=len(fed.owners),
            context=found.context,
        )
        mask = self._pack.add(fed.owners, fed.positions)
        self.kv_positions[info.step] = self._pack.columns
        self._observer.begin_step(info, StepTokens(fed.owners, fed.positions, fed.token_ids))
        chosen = self._chosen(fed, mask, [fed.last[number] for number in found.members])
        self._observer.end_step()
        got = list(zip(found.members, chosen, strict=True))
        for number, token in got:
            self._requests[number].token_ids.append(token)
            self.outputs[number].token_ids.append(token)
        return got

    def _fed(self, found: Pass) -> _Fed:
        fed = _Fed(found.owners)
        for place, number in enumerate(found.owners):
            request = self._requests[number]
            fed.positions.append(request.fed)
            fed.token_ids.append(request.token_ids[request.fed])
            fed.last[number] = place
            request.fed += 1
        return fed

    def _chosen(
        self, fed: _Fed, mask: torch.Tensor | dict[str, torch.Tensor], places: Sequence[int]
    ) -> list[int]:
        """Run the model; the likeliest token after each of `places`."""
        keep = torch.tensor(places or [len(fed.owners) - 1], device=self._device)
        extra: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_logits else {}
        out = self._model(
            input_ids=torch.tensor([fed.token_ids], device=self._device),
            position_ids=torch.tensor([fed.positions], device=self._device),
            attention_mask=mask,
            past_key_values=self._pack.cache,
            use_cache=True,
            **extra,
        )
        logits = out.logits[0] if self._keeps_logits else out.logits[0, keep]
        return logits.argmax(dim=-1).tolist()[: len(places)]


@torch.inference_mode()
def text_in_passes(
    loaded: LoadedModel,
    requests: Sequence[Prompt],
    passes: Sequence[tuple[Pass, tuple[int, ...]]],
) -> list[Generated]:
    """What a model, as it is installed, writes in given passes: each with the requests that are in progress."""
    runner = PassRunner(loaded, requests, SilentObserver())
    for found, in_progress in passes:
        runner.keep(in_progress)
        runner.run(found)
    return runner.outputs

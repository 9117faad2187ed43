"""Tokens of many sequences in one row: passes without padding over prompts and generated tokens alike.

The model's batch is one row. A pass's tokens stand in it request by request, the cache holds the tokens of earlier
passes as columns, and a mask lets each token see those of its own sequence that are not after it (in layers with a
sliding window, not before the window either). Experts, norms and projections see one token at a time anyway.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..tracer.errors import UsageError
from ..tracer.generate import writes_otherwise
from .kv_rows import keep_columns

_KINDS = {"DynamicLayer": "full_attention", "DynamicSlidingWindowLayer": "sliding_attention"}


class Pack:
    """The cache of one row, and whose token each of its columns is. Good for one run of one model.

    Raises UsageError for a model whose sequences cannot share a row.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        from transformers.cache_utils import DynamicCache

        self._device = device
        # None: every position is seen. Layers are told by kind where a model has both.
        self._windows = attention_windows(model)
        self._is_additive = _implementation(model) != "sdpa"
        self._dtype: torch.dtype = next(model.parameters()).dtype
        # Without a config no layer forgets: what a window hides, the mask hides.
        self.cache: Any = DynamicCache()
        self._owners = torch.zeros(0, dtype=torch.long, device=device)
        self._positions = self._owners
        self._held: set[int] = set()

    @property
    def columns(self) -> int:
        """Tokens in the cache."""
        return len(self._owners)

    def keep(self, sequences: Collection[int]) -> None:
        """Forget the tokens of all other sequences."""
        from transformers.cache_utils import DynamicCache

        if self._held <= set(sequences):
            return
        self._held &= set(sequences)
        if not self._held:
            self.cache = DynamicCache()
            self._owners = self._positions = self._owners[:0]
            return
        alive = torch.tensor(sorted(self._held), device=self._device)
        columns = torch.isin(self._owners, alive).nonzero().squeeze(1)
        keep_columns(self.cache, columns)
        self._owners, self._positions = self._owners[columns], self._positions[columns]

    def add(
        self, owners: Sequence[int], positions: Sequence[int]
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The mask of a pass that feeds these tokens, which are columns from now on: [1, 1, tokens, columns]."""
        owner = torch.tensor(owners, device=self._device)
        position = torch.tensor(positions, device=self._device)
        self._owners = torch.cat([self._owners, owner])
        self._positions = torch.cat([self._positions, position])
        self._held.update(owners)
        before = position[:, None] - self._positions[None]
        is_own = (owner[:, None] == self._owners[None]) & (before >= 0)
        masks = {
            kind: self._mask(is_own if window is None else is_own & (before < window))
            for kind, window in self._windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, is_seen: torch.Tensor) -> torch.Tensor:
        mask = is_seen[None, None]
        if not self._is_additive:
            return mask
        hidden = torch.finfo(self._dtype).min
        return torch.zeros_like(mask, dtype=self._dtype).masked_fill(~mask, hidden)


def attention_windows(model: Any) -> dict[str, int | None]:
    """Positions that each kind of the model's layers sees, its own included; None: all.

    Raises UsageError for a model whose sequences cannot share a row.
    """
    from transformers.cache_utils import DynamicCache

    accepted = inspect.signature(model.forward).parameters
    if writes_otherwise(model) or "position_ids" not in accepted:
        raise _refused(
            "it does not write one token per pass from left to right at positions it is told"
        )
    if _implementation(model) not in ("sdpa", "eager"):
        raise _refused(f"its attention {_implementation(model)!r} takes no mask of our own")
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    kinds = {type(layer).__name__ for layer in layers}
    if strange := sorted(kinds - set(_KINDS)):
        raise _refused(f"its cache has {', '.join(strange)}, which keep a state of one sequence")
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()) or getattr(
        config, "attention_chunk_size", None
    ):
        raise _refused("its attention sees chunks")
    sizes = [getattr(layer, "sliding_window", None) for layer in layers]
    windows = {int(size) for size in sizes if size is not None}
    if len(windows) > 1:
        raise _refused("its layers have windows of several sizes")
    return {
        _KINDS[kind]: None if kind == "DynamicLayer" else min(windows) for kind in sorted(kinds)
    }


def _implementation(model: Any) -> str:
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def _refused(why: str) -> UsageError:
    return UsageError(
        f"Requests cannot join and leave batches of this model: {why}. Leave --arrivals out."
    )

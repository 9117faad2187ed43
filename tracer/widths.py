"""How wide a model's forward pass is: enough for an upper estimate of its working tensors, before anything runs.

It is what is left for a model that cannot be run over shapes (pass_peaks.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

_FLOAT_BYTES = 4
_STREAMS = 4
"""Copies of the hidden state that are alive at once: the residual, its norm, and both in float32."""
_USES = 2
"""An expert's rows are alive beside what is computed from them."""


class WorkingTensors(Protocol):
    """What tells a model's working tensors by the size of its passes.

    `kept_per_sequence` are bytes of states that every sequence has whatever its length. `is_by_pass`: found by running
    the model over shapes; else from its config, and `is_upper` says whether that is known to be enough.
    """

    @property
    def item_bytes(self) -> int:
        """Size of one element of a pass's results."""
        ...

    @property
    def kept_per_sequence(self) -> int:
        """See the class."""
        ...

    @property
    def is_by_pass(self) -> bool:
        """See the class."""
        ...

    @property
    def is_upper(self) -> bool:
        """See the class."""
        ...

    def activation_bytes(
        self, *, batch: int, tokens: int, context: int, in_parts: bool = False
    ) -> int:
        """Bytes at the peak of a run whose largest pass feeds `tokens` of `batch` sequences: `in_parts` of prompts, or
        whole ones."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PassWidths:
    """Elements that a forward pass makes of one token, read from a model's modules.

    `hidden` is the state between layers, `layer` all results of the widest layer's weights but the experts', `expert`
    the rows that one chosen expert reads and writes. `attended` is what one layer's attention makes of each position in
    the KV cache; `score_heads` are the heads whose scores become a tensor, 0 with a fused kernel. `keeps_logits`: the
    head runs for every token, not only the last. `item_bytes` is the size of one element. `is_upper`: its layers are of
    a kind for which what is counted is known to be enough; others (linear attention, state spaces, an index over the
    positions) may make more.
    """

    hidden: int
    layer: int
    expert: int
    top_k: int
    attended: int
    score_heads: int
    vocab: int
    keeps_logits: bool
    item_bytes: int
    is_upper: bool = True
    kept_per_sequence: int = 0

    @property
    def is_by_pass(self) -> bool:
        """Never: it is read from modules and config."""
        return False

    def activation_bytes(
        self, *, batch: int, tokens: int, context: int, in_parts: bool = False
    ) -> int:
        """An estimate from above of working tensors at their peak: bytes of a pass over `tokens` of `batch` sequences.

        `context` are the positions each sequence then has. Everything that one layer makes is counted as alive at
        once, twice: its experts' rows, and the rest in the model's format and in float32. Libraries free much of it
        sooner. Prompts `in_parts` are not told from whole ones: all is counted with a mask.
        """
        both = self.item_bytes + _FLOAT_BYTES
        queries = -(-tokens // max(1, batch))
        states = _STREAMS * tokens * self.hidden * both
        results = tokens * self.layer * both
        experts = _USES * tokens * self.top_k * self.expert * self.item_bytes
        attended = batch * context * self.attended * self.item_bytes
        mask = batch * queries * context * both
        scores = batch * self.score_heads * queries * context * (both + self.item_bytes)
        logits = (tokens if self.keeps_logits else batch) * self.vocab * both
        return states + results + experts + attended + mask + scores + logits

"""The predictor itself: a T5-like encoder–decoder that names all layers' experts of a token in one pass.

The encoder reads the prompt, the decoder the generated tokens up to the one that is fed now. One linear head turns
the decoder's state into a logit per layer and expert. As in T5: root-mean-square norms before each part, no biases,
learned biases by relative distance instead of positions, one embedding for both sides.
Ours beyond the paper: the head reads the encoder's state too, so that prompts' own tokens are predicted and teach
the embedding; and attention to the prompt is told distances as well, so that the prompt's end can be found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

_BUCKETS = 32
_FAR = 128
"""Distances from here on share a bucket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathShape:
    """Sizes of a predictor: what it predicts (first four) and how large it is.

    `blocks` are layers of the encoder, and as many of the decoder. Tokens see `window` tokens back, themselves
    included; of a longer prompt only the last `window` tokens are read.
    """

    vocab_size: int
    num_layers: int
    num_experts: int
    top_k: int
    hidden: int = 64
    feedforward: int = 2048
    heads: int = 4
    head_size: int = 16
    blocks: int = 1
    window: int = 512
    dropout: float = 0.0


@dataclass(slots=True)
class DecodeState:
    """What the decoder keeps of a batch between tokens: keys and values of the prompt and of tokens fed before."""

    prompt: list[tuple[torch.Tensor, torch.Tensor]]
    is_real: torch.Tensor
    lengths: torch.Tensor
    past: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    count: int = 0


class PathModel(nn.Module):
    """See the module docstring. Tokens are right-padded; `is_real` [batch, tokens] tells padding from prompt."""

    def __init__(self, shape: PathShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden)
        self.encoder = nn.ModuleList(_Block(shape, reads_prompt=False) for _ in range(shape.blocks))
        self.decoder = nn.ModuleList(_Block(shape, reads_prompt=True) for _ in range(shape.blocks))
        self.encoder_bias = _DistanceBias(shape.heads)
        self.decoder_bias = _DistanceBias(shape.heads)
        self.prompt_bias = _DistanceBias(shape.heads)
        self.encoder_norm = _Norm(shape.hidden)
        self.decoder_norm = _Norm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.num_layers * shape.num_experts)
        self.dropout = nn.Dropout(shape.dropout)
        self._start()

    def forward(
        self, prompt: torch.Tensor, is_real: torch.Tensor, fed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [batch, tokens, layers, experts] of the prompt's tokens and of the tokens fed after it."""
        memory = self.encode(prompt, is_real)
        state = self.start(memory, is_real)
        return self.logits(memory), self.logits(self.decode(fed, state))

    def encode(self, prompt: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """Read prompts [batch, tokens]: states [batch, tokens, hidden]."""
        place = torch.arange(prompt.shape[1], device=prompt.device)
        bias = self.encoder_bias(place[None, :] - place[:, None])
        bias = bias.masked_fill(~is_real[:, None, None, :], -torch.inf)
        hidden = self._embed(prompt)
        for block in _blocks(self.encoder):
            own = block.attention.keys_values(block.attention_norm(hidden))
            hidden = block(hidden, own, bias)
        return self.encoder_norm(hidden)

    def start(self, memory: torch.Tensor, is_real: torch.Tensor) -> DecodeState:
        """The decoder's state before its first token."""
        prompt = [block.reading.keys_values(memory) for block in _blocks(self.decoder)]
        return DecodeState(prompt, is_real, is_real.sum(dim=1))

    def decode(self, fed: torch.Tensor, state: DecodeState) -> torch.Tensor:
        """Read tokens [batch, tokens] after those `state` has seen, and move it on: states [batch, tokens, hidden]."""
        window, seen = self.shape.window, state.count
        if not fed.shape[1]:
            return self._embed(fed)
        place = torch.arange(seen, seen + fed.shape[1], device=fed.device)
        hidden = self._embed(fed)
        reading = self._reading_bias(place, state)
        past: list[tuple[torch.Tensor, torch.Tensor]] = []
        bias = hidden.new_empty(0)
        for number, block in enumerate(_blocks(self.decoder)):
            keys, values = block.attention.keys_values(block.attention_norm(hidden))
            if state.past:
                keys = torch.cat((state.past[number][0], keys), dim=2)
                values = torch.cat((state.past[number][1], values), dim=2)
            if number == 0:  # the same for all blocks
                end = seen + fed.shape[1]
                at = torch.arange(end - keys.shape[2], end, device=fed.device)
                distance = at - place[:, None]
                bias = self.decoder_bias(distance)
                if fed.shape[1] > 1 or keys.shape[2] > window:
                    is_hidden = (distance > 0) | (distance <= -window)
                    bias = bias.masked_fill(is_hidden, -torch.inf)
            hidden = block(hidden, (keys, values), bias, state.prompt[number], reading)
            past.append((keys[:, :, -window:], values[:, :, -window:]))
        state.past, state.count = past, seen + fed.shape[1]
        return self.decoder_norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., layers, experts] of states [..., hidden]."""
        shape = self.shape
        return self.head(hidden).unflatten(-1, (shape.num_layers, shape.num_experts))

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.embedding(tokens.clamp(0, self.shape.vocab_size - 1)))

    def _reading_bias(self, place: torch.Tensor, state: DecodeState) -> torch.Tensor:
        """By distance from each token to each of the prompt's: [batch, heads, tokens, prompt]."""
        at = torch.arange(state.is_real.shape[1], device=place.device)
        distance = at[None, None, :] - (state.lengths[:, None, None] + place[None, :, None])
        bias = self.prompt_bias(distance).transpose(0, 1)
        return bias.masked_fill(~state.is_real[:, None, None, :], -torch.inf)

    def _start(self) -> None:
        shape = self.shape
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.normal_(
            self.embedding.weight, std=0.1
        )  # small: rare tokens are moved a few times only
        share = shape.top_k / shape.num_experts
        # Before it has learned anything, every expert is as likely as the router makes it.
        nn.init.constant_(self.head.bias, math.log(share / (1 - share)) if share < 1 else 4.0)


def _blocks(modules: nn.ModuleList) -> Iterable[_Block]:
    return cast("Iterable[_Block]", modules)


class _Block(nn.Module):
    """Attention to one's own side, attention to the prompt if it is a decoder's, and a feed-forward part."""

    def __init__(self, shape: PathShape, *, reads_prompt: bool) -> None:
        super().__init__()
        self.attention_norm = _Norm(shape.hidden)
        self.attention = _Attention(shape)
        self.reads_prompt = reads_prompt
        if reads_prompt:
            self.reading_norm = _Norm(shape.hidden)
            self.reading = _Attention(shape)
        self.feedforward_norm = _Norm(shape.hidden)
        self.widen = nn.Linear(shape.hidden, shape.feedforward, bias=False)
        self.narrow = nn.Linear(shape.feedforward, shape.hidden, bias=False)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self,
        hidden: torch.Tensor,
        own: tuple[torch.Tensor, torch.Tensor],
        bias: torch.Tensor,
        prompt: tuple[torch.Tensor, torch.Tensor] | None = None,
        prompt_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        normed = self.attention_norm(hidden)
        hidden = hidden + self.dropout(self.attention(normed, own, bias))
        if prompt is not None:
            read = self.reading(self.reading_norm(hidden), prompt, prompt_bias)
            hidden = hidden + self.dropout(read)
        wide = F.relu(self.widen(self.feedforward_norm(hidden)))
        return hidden + self.dropout(self.narrow(self.dropout(wide)))


class _Attention(nn.Module):
    def __init__(self, shape: PathShape) -> None:
        super().__init__()
        self.heads, inner = shape.heads, shape.heads * shape.head_size
        self.query = nn.Linear(shape.hidden, inner, bias=False)
        self.key_value = nn.Linear(shape.hidden, 2 * inner, bias=False)
        self.out = nn.Linear(inner, shape.hidden, bias=False)

    def keys_values(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of states [batch, tokens, hidden]: each [batch, heads, tokens, head size]."""
        keys, values = self.key_value(hidden).chunk(2, dim=-1)
        return self._by_head(keys), self._by_head(values)

    def forward(
        self,
        hidden: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        query = self._by_head(self.query(hidden))
        found = F.scaled_dot_product_attention(query, *keys_values, attn_mask=bias)
        return self.out(found.transpose(1, 2).flatten(2))

    def _by_head(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _Norm(nn.Module):
    """Divide by the root mean square. nn.RMSNorm does the same in many more small steps on the CPU."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + 1e-6)
        return states * scale * self.weight


class _DistanceBias(nn.Module):
    """A learned bias by distance, finer near than far (T5's buckets, for both directions)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, _BUCKETS))
        self.register_buffer("bucket_of", _bucket_table(), persistent=False)

    def forward(self, distance: torch.Tensor) -> torch.Tensor:
        """Biases [heads, *distance] of key's place minus query's."""
        table: torch.Tensor = self.bucket_of  # pyright: ignore[reportAssignmentType]
        return self.weight[:, table[distance.clamp(-_FAR, _FAR) + _FAR]]


def _bucket_table() -> torch.Tensor:
    """Bucket of each distance from −_FAR to _FAR: exact up to 8, then logarithmic."""
    half = _BUCKETS // 2
    exact = half // 2
    distance = torch.arange(-_FAR, _FAR + 1)
    size = distance.abs()
    scale = (half - exact) / math.log(_FAR / exact)
    far = exact + (torch.log(size.clamp(min=1) / exact) * scale).long()
    return torch.where(size < exact, size, far.clamp(max=half - 1)) + half * (distance > 0)

"""A path predictor beside a running model: asked when a pass begins, read when its first layer wants prefetches.

It works in a thread of its own; on CUDA, on a stream of its own there. What it keeps between passes are the keys and
values of the prompts and of the tokens fed so far, so that a decode step costs one token per sequence. It follows
batches as the runtime makes them: a pass over whole prompts, then passes of one token per sequence. Whatever does not
fit that (prompts in chunks, sequences it has not seen start) gets no prediction; text and routing never depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future as Promise
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from ...simulator.policy.base import NO_PATH
from ...tracer.generate import StepTokens
from ...tracer.store import NO_EXPERT
from .model import DecodeState, PathModel
from .predict import likeliest


class LivePaths:
    """Predicted paths of the tokens of each pass, `most` experts per token and layer. Close it when done."""

    def __init__(self, model: PathModel, most: int) -> None:
        self._follower = PathFollower(model, most)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="paths")
        self._asked: Promise[np.ndarray | None] | None = None
        self._paths: np.ndarray | None = None
        self._known: np.ndarray | None = None

    def tell(self, paths: np.ndarray) -> None:
        """Somebody has predicted the next pass already: paths [rows, layers, m], as a follower gives them."""
        self._known = paths

    def begin(self, tokens: StepTokens, batch: int) -> None:
        """A pass over these tokens starts: predict beside it."""
        self._paths, self._known = self._known, None
        if self._paths is not None:
            self._asked = None
            return
        self._asked = self._worker.submit(self._follower.step, tokens, batch)

    def ahead(self, layer: int) -> Mapping[int, Sequence[Sequence[int]]]:
        """Paths of later layers, as Signals holds them. Waits for the predictor, once in a pass."""
        if self._asked is not None:
            self._paths, self._asked = self._asked.result(), None
        return NO_PATH if self._paths is None else _Ahead(self._paths, layer)

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown(wait=True, cancel_futures=True)


class _Ahead(Mapping[int, Sequence[Sequence[int]]]):
    """Paths [rows, layers, m] seen from one layer: by layers ahead, one group per token that is known."""

    def __init__(self, paths: np.ndarray, layer: int) -> None:
        self._paths, self._layer = paths, layer

    def __getitem__(self, depth: int) -> Sequence[Sequence[int]]:
        if not 1 <= depth <= len(self):
            raise KeyError(depth)
        ids = self._paths[:, self._layer + depth]
        return ids[ids[:, 0] != NO_EXPERT].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, len(self) + 1))

    def __len__(self) -> int:
        return self._paths.shape[1] - self._layer - 1


class PathFollower:
    """Runs a predictor pass by pass; the part of LivePaths without the thread."""

    def __init__(self, model: PathModel, most: int) -> None:
        self._model = model
        self._most = min(most, model.shape.num_experts)
        self._device = next(model.parameters()).device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._state: DecodeState | None = None
        self._sequences: list[int] = []
        self._next: list[int] = []
        """Position of the token that each sequence is expected to be fed next."""

    def step(self, tokens: StepTokens, batch: int) -> np.ndarray | None:
        """Paths of one pass: uint16 [rows, layers, m], NO_EXPERT where nothing is known; None if nothing is at all."""
        with torch.inference_mode(), self._on_stream():
            query = len(tokens.position) // max(1, batch)
            position = np.asarray(tokens.position).reshape(batch, query)
            token = np.asarray(tokens.token_id).reshape(batch, query)
            sequences = tokens.sequence[::query] if query else []
            if (position == 0).any():
                return self._start(sequences, position, token)
            return self._go_on(sequences, position, token)

    def _start(self, sequences: list[int], position: np.ndarray, token: np.ndarray) -> np.ndarray:
        model, window = self._model, self._model.shape.window
        paths = self._nothing(position.size)
        is_real = position >= 0
        lengths = is_real.sum(axis=1)
        self._sequences, self._next = sequences, lengths.tolist()
        width = int(min(window, lengths.max()))
        place = np.full((len(sequences), width), -1)
        for row in range(len(sequences)):
            own = np.flatnonzero(is_real[row])[-window:]
            place[row, : len(own)] = row * position.shape[1] + own
        prompt = np.where(place < 0, 0, token.reshape(-1)[place])
        real = torch.from_numpy(place >= 0).to(self._device)
        memory = model.encode(torch.from_numpy(prompt).to(self._device), real)
        self._state = model.start(memory, real)
        ids = likeliest(model.logits(memory), self._most)
        paths[place[place >= 0]] = ids[place >= 0]
        return paths

    def _go_on(
        self, sequences: list[int], position: np.ndarray, token: np.ndarray
    ) -> np.ndarray | None:
        is_known = (position[:, :1] == -1) | (position[:, :1] == np.asarray(self._next)[:, None])
        follows = (
            self._state is not None and position.shape[1] == 1 and sequences == self._sequences
        )
        if self._state is None or not follows or not is_known.all():
            self._state = None
            return None
        hidden = self._model.decode(torch.from_numpy(token).to(self._device), self._state)
        ids = likeliest(self._model.logits(hidden), self._most)[:, 0]
        self._next = [place + 1 for place in self._next]
        ids[position[:, 0] < 0] = NO_EXPERT
        return ids

    def _nothing(self, rows: int) -> np.ndarray:
        shape = self._model.shape
        return np.full((rows, shape.num_layers, self._most), NO_EXPERT, np.uint16)

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

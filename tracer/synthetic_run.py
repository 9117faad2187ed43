"""The run behind a synthetic trace: draws routing and plays it on a clock of declared times."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from .schema import table_schemas
from .types import ModelShape
from .writer import TraceWriter

BANDWIDTH_BYTES_PER_S = 25e9  # pinned PCIe 4.0 x16, as vendors and users report it
COPY_LAUNCH_S = 8e-6
HBM_BYTES_PER_S = 1.5e12
LAYER_LAUNCH_S = 60e-6
TOKEN_S = 0.4e-6
VOCAB = 32_000


@dataclass(slots=True)
class Router:
    """Draws experts: a popularity per layer and domain, and tokens that keep their neighbours'."""

    rng: np.random.Generator
    popularity: np.ndarray  # [domains, layers, experts], log scale
    top_k: int
    stickiness: float
    hit: float

    def draw(self, domain: np.ndarray, before: np.ndarray | None) -> np.ndarray:
        """Return experts [batch, layers, top_k], likeliest first, given those of the last token."""
        score = self.popularity[domain]
        score = score + self.rng.gumbel(size=score.shape)
        if before is not None:
            is_kept = self.rng.random(before.shape) < self.stickiness
            kept = np.take_along_axis(score, before, axis=-1) + np.where(is_kept, 1e3, 0.0)
            np.put_along_axis(score, before, kept, axis=-1)
        return np.argsort(-score, axis=-1)[..., : self.top_k]

    def predict(self, experts: np.ndarray, depth: int) -> np.ndarray:
        """Return guesses [rows, layers, top_k] of the experts `depth` layers later."""
        truth = np.roll(experts, -depth, axis=1)
        num_experts = self.popularity.shape[-1]
        score = self.rng.random((*truth.shape[:2], num_experts))
        is_right = self.rng.random(truth.shape) < self.hit**depth
        ordered = np.where(is_right, 10.0 - np.arange(self.top_k), -1.0)
        np.put_along_axis(score, truth, ordered, axis=-1)
        return np.argsort(-score, axis=-1)[..., : self.top_k]


class Run:
    """Plays one batch after the other on a clock of its own."""

    def __init__(
        self,
        writer: TraceWriter,
        shape: ModelShape,
        router: Router,
        recorded: Sequence[str],
        stream: bool,
    ) -> None:
        self.writer, self.shape, self.router, self.stream = writer, shape, router, stream
        self.schemas = table_schemas(shape, recorded)
        self.step = 0
        self.transfer = 0
        self.clock_s = 0.0

    def batch(
        self, batch: int, numbers: np.ndarray, domains: Sequence[str], prompt: int, new: int
    ) -> None:
        """Run one batch: a prefill step, then a decode step for each further token."""
        rng, rows = self.router.rng, len(numbers)
        lengths = rng.integers(max(1, prompt // 2), prompt + 1, size=rows)
        lengths[0] = prompt
        domain = numbers % len(domains)
        start_s = self.clock_s
        tokens = rng.integers(0, VOCAB, size=(rows, prompt + new))
        positions = np.arange(prompt) - (prompt - lengths[:, None])
        last: np.ndarray | None = None
        picked: list[np.ndarray] = []
        for _ in range(prompt):
            last = self.router.draw(domain, last)
            picked.append(last)
        self._step("prefill", numbers, positions, tokens[:, :prompt], np.stack(picked, 1), prompt)
        ttft_s = self.clock_s - start_s
        for index in range(new - 1):
            last = self.router.draw(domain, last)
            position = (lengths + index)[:, None]
            fed = tokens[:, prompt + index][:, None]
            self._step("decode", numbers, position, fed, last[:, None], prompt + index + 1)
        for row, number in enumerate(numbers.tolist()):
            ids = tokens[row]
            text = ids[prompt - lengths[row] : prompt].tobytes()
            record = {
                "sequence": number,
                "prompt_id": f"synthetic-{number}",
                "domain": domains[domain[row]],
                "batch": batch,
                "prompt_tokens": int(lengths[row]),
                "generated_tokens": new,
                "finish": "length",
                "ttft_s": ttft_s,
                "prompt_sha256": hashlib.sha256(text).hexdigest(),
                "prompt_text": None,
                "output_ids": ids[prompt:].tolist(),
            }
            self.writer.append(
                "sequences", pa.Table.from_pylist([record], self.schemas["sequences"])
            )

    def _step(
        self,
        phase: str,
        numbers: np.ndarray,
        positions: np.ndarray,
        tokens: np.ndarray,
        experts: np.ndarray,
        context: int,
    ) -> None:
        """Write one forward pass: positions, tokens [batch, n]; experts [batch, n, layers, k]."""
        width = positions.shape[1]
        position = np.maximum(positions, -1).reshape(-1)
        is_pad = position < 0
        sequence = np.repeat(numbers, width)
        token = np.where(is_pad, 0, tokens.reshape(-1))
        flat = experts.reshape(-1, *experts.shape[2:])  # [tokens, layers, k]
        rows, layers = flat.shape[:2]
        columns: dict[str, pa.Array] = {
            "step": pa.array(np.full(rows * layers, self.step, np.int32)),
            "layer": pa.array(np.repeat(np.arange(layers, dtype=np.int16), rows)),
            "sequence": pa.array(np.tile(sequence, layers).astype(np.int32)),
            "position": pa.array(np.tile(position, layers).astype(np.int32)),
            "phase": _label(phase, rows * layers),
            "token_id": pa.array(np.tile(token, layers).astype(np.int32)),
            "modality": pa.DictionaryArray.from_arrays(
                pa.array(np.tile(is_pad, layers).astype(np.int8)), pa.array(["text", "pad"])
            ),
            "experts": _lists(_by_layer(flat).astype(np.uint16)),
        }
        schema = self.schemas["routing"]
        if "weights" in schema.names:
            columns["weights"] = _lists(self._gate(rows * layers))
        for depth in range(1, sum("lookahead_" in name for name in schema.names) + 1):
            ids = _by_layer(self.router.predict(flat, depth)).astype(np.uint16)
            past_last = np.repeat(np.arange(layers) + depth >= layers, rows)
            columns[f"lookahead_{depth}"] = _lists(ids, past_last)
        routing = pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
        self.writer.append("routing", routing)
        self._times(phase, len(numbers), flat, context)
        self.step += 1

    def _gate(self, rows: int) -> np.ndarray:
        score = -np.sort(-self.router.rng.random((rows, self.shape.top_k)) - 0.05, axis=1)
        return (score / score.sum(axis=1, keepdims=True)).astype(np.float16)

    def _times(self, phase: str, batch: int, flat: np.ndarray, context: int) -> None:
        tokens, layers = flat.shape[:2]
        begin_s, rows = self.clock_s, []
        for layer in range(layers):
            demanded = np.unique(flat[:, layer])
            mixer_s = LAYER_LAUNCH_S + TOKEN_S * tokens + 1e-10 * tokens * context
            readback_s = 15e-6
            weights_s = len(demanded) * self.shape.expert_bytes / HBM_BYTES_PER_S
            experts_s = LAYER_LAUNCH_S + max(weights_s, TOKEN_S * tokens * self.shape.top_k)
            asked_s = self.clock_s + mixer_s + readback_s
            stall_s = self._load(layer, demanded, asked_s) if self.stream else 0.0
            total_s = mixer_s + readback_s + stall_s + experts_s
            rows.append(
                self._row(
                    phase, batch, tokens, context,
                    layer=layer, distinct=len(demanded), waves=1, start_s=self.clock_s,
                    mixer_s=mixer_s, readback_s=readback_s, stall_s=stall_s,
                    experts_s=experts_s, total_s=total_s,
                )
            )  # fmt: skip
            self.clock_s += total_s
        self.clock_s += 2 * LAYER_LAUNCH_S  # embedding, head and sampling
        whole = {name: sum(row[name] for row in rows) for name in rows[0] if name.endswith("_s")}
        whole |= {"start_s": begin_s, "total_s": self.clock_s - begin_s}
        rows.append(
            self._row(phase, batch, tokens, context, layer=-1, distinct=0, waves=1, **whole)
        )
        self.writer.append("steps", pa.Table.from_pylist(rows, self.schemas["steps"]))

    def _row(
        self, phase: str, batch: int, tokens: int, context: int, **more: float
    ) -> dict[str, object]:
        row: dict[str, object] = {"step": self.step, "phase": phase, "batch": batch}
        row |= {"tokens": tokens, "context": context, "decision_s": 0.0, "lookahead_s": 0.0}
        return row | more

    def _load(self, layer: int, demanded: np.ndarray, asked_s: float) -> float:
        copy_s = COPY_LAUNCH_S + self.shape.expert_bytes / BANDWIDTH_BYTES_PER_S
        rows: list[dict[str, object]] = []
        for place, expert in enumerate(demanded.tolist()):
            start_s = asked_s + place * copy_s
            rows.append(
                {
                    "transfer": self.transfer + place,
                    "step": self.step,
                    "layer": layer,
                    "expert": expert,
                    "bytes": self.shape.expert_bytes,
                    "why": "demand",
                    "stream": "h2d",
                    "queued_s": asked_s,
                    "start_s": start_s,
                    "end_s": start_s + copy_s,
                    "needed_s": asked_s,
                    "pinned": True,
                }
            )
        self.transfer += len(rows)
        self.writer.append("transfers", pa.Table.from_pylist(rows, self.schemas["transfers"]))
        return len(rows) * copy_s


def _by_layer(ids: np.ndarray) -> np.ndarray:
    """[tokens, layers, k] to rows in (layer, token) order, [layers * tokens, k]."""
    return np.ascontiguousarray(ids.transpose(1, 0, 2)).reshape(-1, ids.shape[2])


def _lists(values: np.ndarray, is_null: np.ndarray | None = None) -> pa.Array:
    mask = None if is_null is None else pa.array(is_null)
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=mask)


def _label(text: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([text]))

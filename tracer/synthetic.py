"""A trace without a model: sticky, skewed routing with declared times.

For trying the tools on a machine without a GPU, and for tests. Every time in it comes from a
declared profile and says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .probe import provenance
from .schema import table_schemas
from .store import Trace
from .types import (
    HardwareProfile,
    LinkCurve,
    LinkProfile,
    MemoryPoint,
    ModelShape,
    RunSettings,
)
from .writer import TraceWriter

_BANDWIDTH_BYTES_PER_S = 25e9  # pinned PCIe 4.0 x16, as vendors and users report it
_COPY_LAUNCH_S = 8e-6
_HBM_BYTES_PER_S = 1.5e12
_LAYER_LAUNCH_S = 60e-6
_TOKEN_S = 0.4e-6
_VOCAB = 32_000


@dataclass(slots=True)
class _Router:
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


def synthetic_trace(
    out: Path,
    *,
    layers: int = 4,
    experts: int = 16,
    top_k: int = 2,
    sequences: int = 4,
    prompt_tokens: int = 16,
    new_tokens: int = 16,
    batch_size: int = 2,
    seed: int = 0,
    stickiness: float = 0.4,
    lookahead: int = 1,
    hit: float = 0.8,
    skew: float = 1.0,
    expert_bytes: int = 4 << 20,
    domains: Sequence[str] = ("prose", "code"),
    weights: bool = True,
    stream: bool = False,
    overwrite: bool = False,
) -> Trace:
    """Write a valid trace of a model that does not exist, and open it.

    `stickiness` is the chance that a token keeps one of its predecessor's experts; `skew` spreads
    popularity (0: all alike); `hit` is the chance that a look-ahead id of depth 1 is right, and its
    power at greater depths. Prompts are `prompt_tokens` long at most, left-padded within a batch;
    each sequence gets `new_tokens`: the first from the prefill step, the rest from one decode step
    each. `stream` adds a demand transfer for every distinct expert and the stall it causes.
    """
    rng = np.random.default_rng(seed)
    shape = _shape(layers, experts, top_k, expert_bytes)
    recorded = ["routing", "token_ids", "steps", *(["weights"] if weights else [])]
    recorded += [f"lookahead_{depth}" for depth in range(1, lookahead + 1)]
    recorded += ["transfers"] if stream else []
    writer = TraceWriter(
        Path(out),
        shape=shape,
        hardware=_hardware(shape),
        run=RunSettings(
            batch_size=batch_size,
            max_new_tokens=new_tokens,
            residency="stream" if stream else "resident",
            experts_implementation="none",
            lookahead=lookahead,
            extra={"stickiness": str(stickiness), "hit": str(hit), "skew": str(skew)},
        ),
        provenance=provenance(seed, "imported", notes=("Synthetic routing; no model was run.",)),
        recorded=recorded,
        overwrite=overwrite,
    )
    popularity = rng.normal(scale=skew, size=(len(domains), layers, experts))
    popularity[1:] = 0.5 * popularity[:1] + 0.5 * popularity[1:]
    router = _Router(rng, popularity, top_k, stickiness, hit)
    with writer:
        run = _Run(writer, shape, router, recorded, stream)
        for batch, first in enumerate(range(0, sequences, batch_size)):
            numbers = np.arange(first, min(first + batch_size, sequences))
            run.batch(batch, numbers, domains, prompt_tokens, new_tokens)
        point = MemoryPoint(
            phase="prefill",
            batch=min(batch_size, sequences),
            tokens=min(batch_size, sequences) * prompt_tokens,
            context=prompt_tokens,
            activation_bytes=batch_size * prompt_tokens * shape.hidden_size * 2 * 8,
        )
        writer.close(memory=[point], warnings=["Synthetic: times are declared, not measured."])
    return Trace.open(writer.out)


class _Run:
    """Plays one batch after the other on a clock of its own."""

    def __init__(
        self,
        writer: TraceWriter,
        shape: ModelShape,
        router: _Router,
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
        tokens = rng.integers(0, _VOCAB, size=(rows, prompt + new))
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
        """Write one forward pass; `positions`, `tokens` [batch, n], `experts` [batch, n, layers, k]."""
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
            mixer_s = _LAYER_LAUNCH_S + _TOKEN_S * tokens + 1e-10 * tokens * context
            readback_s = 15e-6
            weights_s = len(demanded) * self.shape.expert_bytes / _HBM_BYTES_PER_S
            experts_s = _LAYER_LAUNCH_S + max(weights_s, _TOKEN_S * tokens * self.shape.top_k)
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
        self.clock_s += 2 * _LAYER_LAUNCH_S  # embedding, head and sampling
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
        copy_s = _COPY_LAUNCH_S + self.shape.expert_bytes / _BANDWIDTH_BYTES_PER_S
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


def _shape(layers: int, experts: int, top_k: int, expert_bytes: int) -> ModelShape:
    return ModelShape(
        model_id=f"synthetic-{layers}x{experts}-top{top_k}",
        revision=None,
        architecture="Synthetic",
        dtype="bfloat16",
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        top_k=top_k,
        expert_bytes=expert_bytes,
        non_expert_bytes=64 << 20,
        kv_bytes_per_token=layers * 2 * 512 * 2,
        hidden_size=512,
        vocab_size=_VOCAB,
    )


def _hardware(shape: ModelShape) -> HardwareProfile:
    sizes = (4096, 65_536, 1 << 20, 16 << 20, 256 << 20)

    def curve(pinned: bool, busy: bool, share: float) -> LinkCurve:
        rate = _BANDWIDTH_BYTES_PER_S * share
        points = tuple((size, _COPY_LAUNCH_S + size / rate) for size in sizes)
        return LinkCurve(pinned=pinned, busy=busy, points=points)

    curves = (curve(True, False, 1.0), curve(True, True, 0.92), curve(False, False, 0.4))
    return HardwareProfile(
        name="declared 24 GB GPU",
        device="cuda:0",
        device_bytes=24 << 30,
        host_bytes=64 << 30,
        threads=8,
        link=LinkProfile(
            name="declared PCIe 4.0 x16", origin="declared", curves=curves, wake_s=10e-6
        ),
        origin="declared",
    )


def _by_layer(ids: np.ndarray) -> np.ndarray:
    """[tokens, layers, k] to rows in (layer, token) order, [layers * tokens, k]."""
    return np.ascontiguousarray(ids.transpose(1, 0, 2)).reshape(-1, ids.shape[2])


def _lists(values: np.ndarray, is_null: np.ndarray | None = None) -> pa.Array:
    mask = None if is_null is None else pa.array(is_null)
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=mask)


def _label(text: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([text]))

"""Recorded routing by token: what a replay gives a model in place of its router's choice."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...tracer.arrays import NO_EXPERT, RoutingArrays
from ...tracer.errors import InputError
from ...tracer.importers.formats import import_file
from ...tracer.importers.request import ImportRequest
from ...tracer.store import Trace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenRouting:
    """What every token of some sequences chose in every MoE layer, sequence by sequence in order of positions.

    `experts` uint16 [tokens, layers, top_k], likeliest first; `weights` float32 of that shape, None if they were not
    recorded. `lookahead[d]` uint16 of that shape: what the gate `d` layers later said when asked early, NO_EXPERT where
    nobody asked. Sequence i has the tokens `first[i]` to `first[i + 1]`, and `prompt[i]` of them are its prompt.
    `notes` are sentences on where it comes from and what was done to it.
    """

    experts: np.ndarray
    weights: np.ndarray | None
    lookahead: Mapping[int, np.ndarray] = field(default_factory=dict)
    first: np.ndarray
    prompt: np.ndarray
    num_experts: int
    source: str
    notes: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        """Experts per token and layer."""
        return self.experts.shape[2]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""
        return np.diff(self.first)


def read_routing(trace: Path | None, file: Path | None) -> TokenRouting:
    """The routing of a trace folder, or of another tool's recording. Raises InputError if there is none to replay."""
    if trace is not None:
        return token_routing(Trace.open(trace))
    assert file is not None, "the caller gives one of them"
    with tempfile.TemporaryDirectory(prefix="expertflow-replay-") as folder:
        out = Path(folder) / file.stem
        import_file(ImportRequest(file=file, out=out))
        return token_routing(Trace.open(out), source=file.name)


def token_routing(trace: Trace, *, source: str = "") -> TokenRouting:
    """Read a trace token by token. Tokens that some layer has no row of are left out, and counted in the notes."""
    found = trace.routing_arrays()
    rows = np.flatnonzero(~found.is_pad & (found.position >= 0))
    keys, token = _tokens(found, rows)
    shape = (len(keys), trace.shape.num_moe_layers, trace.shape.top_k)
    experts = _by_token(shape, token, found.layer[rows], found.experts[rows])
    whole = (experts != NO_EXPERT).all(axis=(1, 2))
    if not whole.any():
        raise InputError(
            f"{trace.path} has no token whose experts are known in all {shape[1]} layers, so no pass can be replayed. "
            "Record prompts and generated tokens with `expertflow-trace run`."
        )
    span = np.int64(found.position.max()) + 1
    sequence = keys[whole] // span
    _, first = np.unique(sequence, return_index=True)
    is_prompt = np.zeros(len(keys), dtype=bool)
    is_prompt[token] = ~found.phase_is_decode[rows]
    lost = int((~whole).sum())
    return TokenRouting(
        experts=experts[whole],
        weights=_weights(found, rows, shape, token, whole),
        lookahead={
            depth: _by_token(shape, token, found.layer[rows], ids[rows])[whole]
            for depth, ids in found.lookahead.items()
        },
        first=np.append(first, len(sequence)),
        prompt=np.add.reduceat(is_prompt[whole].astype(np.int64), first),
        num_experts=trace.shape.num_experts,
        source=source or trace.path.name,
        notes=(f"{lost} of {len(keys)} tokens lack a layer and were left out.",) if lost else (),
    )


def _tokens(found: RoutingArrays, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each token once, as sequence × span + position, and the token of each row."""
    if not len(rows):
        raise InputError("This trace holds no routing rows of tokens; there is nothing to replay.")
    span = np.int64(found.position.max()) + 1
    keys = found.sequence[rows].astype(np.int64) * span + found.position[rows]
    return np.unique(keys, return_inverse=True)


def _by_token(
    shape: tuple[int, int, int], token: np.ndarray, layer: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    held = np.full(shape, NO_EXPERT, np.uint16)
    held[token, layer] = ids
    return held


def _weights(
    found: RoutingArrays,
    rows: np.ndarray,
    shape: tuple[int, int, int],
    token: np.ndarray,
    whole: np.ndarray,
) -> np.ndarray | None:
    if found.weights is None:
        return None
    held = np.zeros(shape, np.float32)
    held[token, found.layer[rows]] = found.weights[rows]
    return held[whole] if np.isfinite(held[whole]).all() else None

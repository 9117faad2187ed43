"""SGLang's expert distribution recorder, mode `per_token`: a `.pt` file per rank.

{"records": [{"forward_pass_id", "rank", "gatherer_key", "input_ids", "positions", "extend_seq_lens", "forward_mode",
"topk_ids_of_layer" int32 [layers, tokens, 8], …}], "last_physical_to_logical_map" [layers, physical experts]};
python/sglang/srt/eplb/expert_distribution.py (commit 02295fe5), modes in model_executor/forward_batch_info.py.
Unwritten ids are −1: layers without experts, columns beyond k. Ids are of physical experts. Requests have no names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .line_up import Line, Piece
from .mend import checked, written_part
from .request import ImportRequest, refuse
from .torch_file import StoredTensor, read_torch_file
from .untimed import Routing

EXTEND, DECODE, MIXED, IDLE = 1, 2, 3, 4
_ROUTING = "topk_ids_of_layer"


@dataclass(frozen=True, slots=True)
class Recording:
    """Passes as they ran, which of the model's layers they are of, and how many experts a layer has."""

    routing: Routing
    layers: tuple[int, ...]
    num_layers: int
    experts: int | None


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass: ids [tokens, layers, 8] of the rows that are tokens."""

    place: str
    mode: int
    ids: np.ndarray
    token_ids: np.ndarray
    pieces: list[Piece]


def read_recorder(request: ImportRequest, warnings: list[str]) -> Recording:
    """Read a dump. Nothing in it is run. Raises InputError naming the record that is wrong."""
    refuse(
        request,
        "a recorder's dump",
        "--phase",
        "--domain",
        "--layout",
        "--layers",
        "--top-k",
    )
    path = request.file
    dump = read_torch_file(path)
    passes = _limited(list(_passes(path, dump, warnings)), request.limit_tokens, warnings)
    if not passes:
        raise InputError(f"{path} holds no pass with tokens. Record while requests are running.")
    layers = passes[0].ids.shape[1]
    for found in passes:
        if found.ids.shape[1:] != passes[0].ids.shape[1:]:
            raise InputError(f"{path}: {found.place} has another number of layers or columns.")
    line, pieces = Line(), list[Piece]()
    for found in passes:
        if found.mode == DECODE:
            pieces += line.decoded(found.pieces)
        else:
            pieces += line.prompts(found.pieces, mixed=found.mode == MIXED)
    mixed = sum(found.mode == MIXED for found in passes)
    if mixed:
        warnings.append(f"{mixed:,} passes hold prompts and decoded tokens; they count as prefill.")
    ids = np.concatenate([found.ids for found in passes]).astype(np.int64)
    ids, experts = _logical(path, ids, dump.get("last_physical_to_logical_map"), warnings)
    routing, kept = _routing(path, passes, pieces, ids, warnings)
    line.tell(warnings)
    return Recording(routing, kept, layers, experts)


def _passes(path: Path, dump: Any, warnings: list[str]) -> Iterator[_Pass]:
    records = dump.get("records") if isinstance(dump, Mapping) else None
    if not isinstance(records, list) or not all(isinstance(item, Mapping) for item in records):
        held = (
            ", ".join(str(key) for key in dump) if isinstance(dump, Mapping) else "something else"
        )
        raise InputError(
            f"{path} is no per-token recording; it holds {held}. Start SGLang with "
            "--expert-distribution-recorder-mode per_token; its other modes count and keep no routing."
        )
    skipped: dict[int, int] = {}
    for number, record in enumerate(records):
        place = f"record {number}"
        mode = record.get("forward_mode")
        if _ROUTING not in record:
            raise InputError(f"{path}: {place} has no {_ROUTING}; was the mode per_token?")
        if mode not in (EXTEND, DECODE, MIXED):
            skipped[mode] = skipped.get(mode, 0) + 1
            continue
        found = _pass(path, place, record)
        if len(found.ids):
            yield found
    for mode, count in skipped.items():
        what = "idle" if mode == IDLE else f"of forward mode {mode}"
        warnings.append(f"Left out {count:,} passes {what}: no prompt or decode pass.")


def _pass(path: Path, place: str, record: Mapping[str, Any]) -> _Pass:
    ids = _array(path, place, record, _ROUTING)
    if ids.ndim != 3 or ids.dtype.kind != "i":
        raise InputError(
            f"{path}: {_ROUTING} of {place} is {ids.dtype} of shape {list(ids.shape)}; expected whole "
            "numbers of shape [layers, tokens, 8]."
        )
    positions = _array(path, place, record, "positions").reshape(-1)
    tokens = _array(path, place, record, "input_ids").reshape(-1)
    if not len(positions) == len(tokens) == ids.shape[1]:
        raise InputError(
            f"{path}: {place} has {ids.shape[1]} rows, {len(tokens)} input_ids and {len(positions)} "
            "positions; expected as many of each."
        )
    is_decode = record["forward_mode"] == DECODE
    lengths = [1] * len(positions) if is_decode else _lengths(path, place, record, positions)
    # Rows beyond the requests pad a CUDA graph, as do decoded rows at position 0, which has no token before it.
    real = np.arange(len(positions)) < sum(lengths)
    real &= (positions > 0) | (not is_decode)
    lengths = [1] * int(real.sum()) if is_decode else lengths
    positions = positions[real]
    starts = np.cumsum([0, *lengths])[:-1]
    pieces = [
        Piece(int(positions[start]), int(length))
        for start, length in zip(starts, lengths, strict=True)
    ]
    return _Pass(place, record["forward_mode"], ids.swapaxes(0, 1)[real], tokens[real], pieces)


def _lengths(path: Path, place: str, record: Mapping[str, Any], positions: np.ndarray) -> list[int]:
    """Tokens of each request in a pass over prompts: as told, or wherever positions do not go on."""
    if record.get("extend_seq_lens") is None:
        jumps = np.flatnonzero(np.diff(positions) != 1) + 1
        return np.diff(np.r_[0, jumps, len(positions)]).tolist()
    lengths = _array(path, place, record, "extend_seq_lens").reshape(-1).tolist()
    if min(lengths, default=0) < 0 or sum(lengths) > len(positions):
        raise InputError(
            f"{path}: extend_seq_lens of {place} add up to {sum(lengths)}, but it has {len(positions)} rows."
        )
    return [length for length in lengths if length]


def _array(path: Path, place: str, record: Mapping[str, Any], name: str) -> np.ndarray:
    value = record.get(name)
    try:
        found = value.array() if isinstance(value, StoredTensor) else np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        found = np.empty(0, object)
    if found.dtype.kind not in "iu" and found.size:
        raise InputError(f"{path}: {name} of {place} holds no whole numbers.")
    return found.astype(np.int64)


def _limited(passes: list[_Pass], limit: int | None, warnings: list[str]) -> list[_Pass]:
    """Passes from the first on, as long as they have at most `limit` tokens; one at least."""
    sizes = np.cumsum([len(found.ids) for found in passes])
    if limit is None or not passes or sizes[-1] <= limit:
        return passes
    kept = max(1, int(np.searchsorted(sizes, limit, side="right")))
    warnings.append(
        f"Limited to {int(sizes[kept - 1]):,} of {int(sizes[-1]):,} tokens: the first {kept:,} of "
        f"{len(passes):,} passes."
    )
    return passes[:kept]


def _logical(
    path: Path, ids: np.ndarray, table: Any, warnings: list[str]
) -> tuple[np.ndarray, int | None]:
    """Ids of the model's own experts, and how many there are: the server may have moved or doubled them."""
    if not isinstance(table, StoredTensor):
        return ids, None
    known = table.array().astype(np.int64)
    if known.ndim != 2 or len(known) != ids.shape[1] or not known.size or known.min() < 0:
        raise InputError(
            f"{path}: last_physical_to_logical_map of {list(known.shape)} fits no layer."
        )
    if ids.max() >= known.shape[1]:
        raise InputError(
            f"{path}: {_ROUTING} names expert {int(ids.max())}; expected 0 to {known.shape[1] - 1}."
        )
    if (known != np.arange(known.shape[1])).any():
        warnings.append(
            "The server had moved or doubled experts: ids are given in the model's own numbers, by the last "
            "map it had. Passes before its last rebalancing may be named wrongly."
        )
    layer = np.arange(len(known))[None, :, None]
    return np.where(ids < 0, ids, known[layer, np.maximum(ids, 0)]), int(known.max()) + 1


def _routing(
    path: Path, passes: list[_Pass], pieces: list[Piece], ids: np.ndarray, warnings: list[str]
) -> tuple[Routing, tuple[int, ...]]:
    """All passes as one routing, without the rows that no router wrote."""
    sizes = np.asarray([piece.length for piece in pieces])
    sequence = np.repeat([piece.sequence for piece in pieces], sizes)
    offset = np.arange(len(sequence)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    position = np.repeat([piece.position for piece in pieces], sizes) + offset
    step = np.repeat(np.arange(len(passes)), [len(found.ids) for found in passes])
    written = written_part(path, ids, warnings)
    kept, row = written.is_kept, np.flatnonzero(written.is_kept)
    starts = np.searchsorted(step, np.arange(len(passes)))

    def place(token: int) -> str:
        number = int(step[row[token]])
        return f"row {row[token] - starts[number]} of {passes[number].place}"

    experts, _ = checked(path, written.ids, None, warnings, name=_ROUTING, place=place)
    left, places = np.unique(step[kept], return_inverse=True)
    names, numbers = np.unique(sequence[kept], return_inverse=True)
    routing = Routing(
        experts=experts,
        weights=None,
        step=places,
        sequence=numbers,
        position=position[kept],
        is_decode=np.asarray([found.mode == DECODE for found in passes])[left],
        prompt_ids=tuple(str(name) for name in names.tolist()),
        domains=("",) * len(names),
        token_id=np.concatenate([found.token_ids for found in passes])[kept],
    )
    return routing, written.layers

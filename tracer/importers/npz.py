"""Published routing in a numpy archive: expert ids with the bounds of sequences, and no times.

Everything in the file is checked before anything is written. What was guessed or mended is said in the
trace's warnings.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from ..errors import InputError, UsageError, unknown_name
from ..schema import Manifest
from ..store import NO_EXPERT
from ..types import ModelShape, Phase
from .untimed import Routing, write_untimed

LAYOUTS = ("auto", "tokens-first", "layers-first")
_IDS, _WEIGHTS, _BOUNDS = "expert_ids", "gate_weights", "seq_bounds"
_DOMAINS = ("domain", "category", "dataset")
_DTYPE = "bfloat16"
_TOKENS_PER_CHECK = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRequest:
    """What to import and what the file itself cannot say. Sizes are bytes; 0 means unknown."""

    file: Path
    out: Path
    phase: str = "decode"
    experts: int | None = None
    model: str | None = None
    dtype: str | None = None
    expert_bytes: int = 0
    non_expert_bytes: int = 0
    hidden_size: int = 0
    limit_tokens: int | None = None
    domain: str | None = None
    layout: str = "auto"
    overwrite: bool = False


def import_npz(request: ImportRequest) -> Manifest:
    """Turn a numpy archive into the trace `request.out`, and return its manifest.

    Raises UsageError for options that cannot be, InputError naming the array that is wrong.
    """
    phase = _phase(request)
    notes = [_origin(request.file)]
    warnings: list[str] = []
    routing = _read(request, notes, warnings)
    routing = _limited(routing, request.limit_tokens, warnings)
    if phase == "decode":
        warnings.append(
            "Decode rows only: positions and context count from each sequence's first row, because the "
            "lengths of the prompts are not known."
        )
    return write_untimed(
        request.out,
        routing,
        shape=_shape(request, routing, warnings),
        phase=phase,
        notes=notes,
        warnings=warnings,
        extra={"source": request.file.name},
        overwrite=request.overwrite,
    )


def _phase(request: ImportRequest) -> Phase:
    """Check the options that need no look at the file, and return the phase."""
    for option, value in (("--experts", request.experts), ("--limit-tokens", request.limit_tokens)):
        if value is not None and value < 1:
            raise UsageError(f"{option} must be at least 1, got {value}.")
    if request.hidden_size < 0:
        raise UsageError(f"--hidden-size must be 0 (unknown) or more, got {request.hidden_size}.")
    if request.layout not in LAYOUTS:
        raise unknown_name("layout", request.layout, LAYOUTS)
    for phase in get_args(Phase):
        if phase == request.phase:
            return phase
    raise unknown_name("phase", request.phase, get_args(Phase))


def _origin(path: Path) -> str:
    try:
        with path.open("rb") as body:
            digest = hashlib.file_digest(body, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    return f"Imported from {path.name} (sha256 {digest})."


def _read(request: ImportRequest, notes: list[str], warnings: list[str]) -> Routing:
    path = request.file
    with _opened(path) as archive:
        ids = _array(path, archive, _IDS)
        gates = _array(path, archive, _WEIGHTS) if _WEIGHTS in archive.files else None
        _require_ids(path, ids, gates)
        bounds = _array(path, archive, _BOUNDS) if _BOUNDS in archive.files else None
        if bounds is not None:
            _require_bounds(path, bounds)
        if _is_layers_first(path, ids, bounds, request.layout, warnings):
            ids = ids.swapaxes(0, 1)
            gates = None if gates is None else gates.swapaxes(0, 1)
        if bounds is None:
            bounds = np.asarray([0, len(ids)])
        count = len(bounds) - 1
        domains = _domains(path, archive, request.domain, count, notes)
    experts, weights = _checked(path, ids, gates, warnings)
    return Routing(
        experts=experts,
        weights=weights,
        bounds=bounds.astype(np.int64),
        prompt_ids=tuple(str(number) for number in range(count)),
        domains=domains,
    )


def _opened(path: Path) -> np.lib.npyio.NpzFile:
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        archive = None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise InputError(
            f"{path} is not a numpy archive; expected an .npz with {_IDS} and {_BOUNDS}, "
            "as written by numpy.savez."
        )
    return archive


def _array(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    if key not in archive.files:
        held = ", ".join(archive.files) or "nothing"
        raise InputError(f"{path} lacks the array {key}; it holds {held}.")
    try:
        return archive[key]
    except ValueError as error:
        what = "holds Python objects" if "pickle" in str(error) else "is damaged"
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        what = "is damaged"
    raise InputError(
        f"{path}: the array {key} {what} and is not read; save it again as a plain array of numbers "
        "or text."
    )


def _require_ids(path: Path, ids: np.ndarray, gates: np.ndarray | None) -> None:
    allowed = "[tokens, layers, k] or [layers, tokens, k]"
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise InputError(
            f"{path}: {_IDS} is {ids.dtype} of shape {list(ids.shape)}; expected whole numbers of shape "
            f"{allowed}."
        )
    if 0 in ids.shape:
        raise InputError(f"{path}: {_IDS} of shape {list(ids.shape)} is empty; expected {allowed}.")
    if gates is not None and (gates.shape != ids.shape or gates.dtype.kind != "f"):
        raise InputError(
            f"{path}: {_WEIGHTS} is {gates.dtype} of shape {list(gates.shape)}; expected floats of the "
            f"shape of {_IDS}, {list(ids.shape)}."
        )


def _require_bounds(path: Path, bounds: np.ndarray) -> None:
    if bounds.ndim != 1 or bounds.dtype.kind not in "iu" or len(bounds) < 2:
        raise InputError(
            f"{path}: {_BOUNDS} is {bounds.dtype} of shape {list(bounds.shape)}; expected whole numbers "
            "of shape [sequences + 1]."
        )
    steps = np.diff(bounds.astype(np.int64))
    if bounds[0] != 0 or (steps <= 0).any():
        wrong = "does not start at 0" if bounds[0] != 0 else "does not ascend"
        place = 0 if bounds[0] != 0 else int(np.argmax(steps <= 0)) + 1
        raise InputError(
            f"{path}: {_BOUNDS} {wrong} (entry {place} is {int(bounds[place])}); expected 0, then the end "
            "of each sequence, each larger than the one before."
        )


def _is_layers_first(
    path: Path, ids: np.ndarray, bounds: np.ndarray | None, layout: str, warnings: list[str]
) -> bool:
    """Which axis counts tokens: the one that agrees with the bounds, unless the user said."""
    first, second, _ = ids.shape
    tokens = max(first, second) if bounds is None else int(bounds[-1])
    if bounds is None:
        warnings.append(f"The file has no {_BOUNDS}: its tokens are taken as one sequence.")
    if layout == "auto" and first == second == tokens:
        raise InputError(
            f"{path}: {_IDS} is {list(ids.shape)}, so either axis may count tokens; "
            "say which with --layout tokens-first or --layout layers-first."
        )
    if layout == "auto" and bounds is None:
        warnings.append(f"The longer axis of {_IDS} ({tokens:,}) is taken to count tokens.")
    is_layers_first = second == tokens if layout == "auto" else layout == "layers-first"
    length = second if is_layers_first else first
    if bounds is not None and length != tokens:
        raise InputError(
            f"{path}: {_BOUNDS} ends at {tokens}, but {_IDS} is {list(ids.shape)}; expected as many "
            "tokens in both."
        )
    return is_layers_first


def _domains(
    path: Path, archive: np.lib.npyio.NpzFile, asked: str | None, count: int, notes: list[str]
) -> tuple[str, ...]:
    """The label of each sequence that becomes its domain; others are named in `notes`."""
    labels = [key for key in archive.files if key not in (_IDS, _WEIGHTS, _BOUNDS)]
    if asked is not None and asked not in labels:
        raise unknown_name("label of sequences (--domain)", asked, labels)
    found: tuple[str, ...] = ("",) * count
    chosen = asked
    for key in (asked,) if asked is not None else [key for key in _DOMAINS if key in labels]:
        values = _array(path, archive, key)
        if values.shape == (count,) and values.dtype.kind in ("US" if asked is None else "USbiu"):
            found, chosen = _text(values), key
            break
        if asked is not None:
            raise InputError(
                f"{path}: {key} is {values.dtype} of shape {list(values.shape)}; a domain needs one "
                f"name per sequence, [{count}]."
            )
    if chosen:
        notes.append(f"Domains are the file's {chosen}.")
    left = [key for key in labels if key != chosen]
    if left:
        notes.append(f"Not imported: {', '.join(left)}.")
    return found


def _text(values: np.ndarray) -> tuple[str, ...]:
    if values.dtype.kind == "S":
        return tuple(value.decode("utf-8", errors="replace") for value in values.tolist())
    return tuple(str(value) for value in values.tolist())


def _checked(
    path: Path, ids: np.ndarray, gates: np.ndarray | None, warnings: list[str]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids and weights as the format keeps them, likeliest expert first."""
    experts = np.empty(ids.shape, np.uint16)
    weights = None if gates is None else np.empty(ids.shape, np.float16)
    mended, by_number = 0, 0
    for rows in _chunks(len(ids)):
        chosen = ids[rows]
        _require_experts(path, chosen, rows.start)
        by_number += int((np.diff(chosen.astype(np.int32), axis=2) > 0).all(axis=2).sum())
        if gates is not None and weights is not None:
            chosen, weight, moved = _by_weight(path, chosen, gates[rows])
            weights[rows], mended = weight, mended + moved
        experts[rows] = chosen
    total = ids.shape[0] * ids.shape[1]
    if mended:
        warnings.append(
            f"The experts of {mended:,} of {total:,} rows were not in order of weight; they were put in "
            "order, likeliest first."
        )
    if gates is None and by_number == total and ids.shape[2] > 1:
        warnings.append(
            "Experts are in order of their numbers and have no weights: which was likeliest is not known."
        )
    return experts, weights


def _chunks(tokens: int) -> Iterator[slice]:
    for first in range(0, tokens, _TOKENS_PER_CHECK):
        yield slice(first, min(first + _TOKENS_PER_CHECK, tokens))


def _require_experts(path: Path, ids: np.ndarray, first_token: int) -> None:
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= NO_EXPERT:
        got = lowest if lowest < 0 else highest
        raise InputError(
            f"{path}: {_IDS} holds {got}; expected 0 to {NO_EXPERT - 1}. Leave padding rows out."
        )
    ordered = np.sort(ids, axis=2)
    is_twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=2)
    if is_twice.any():
        token, layer = np.argwhere(is_twice)[0].tolist()
        raise InputError(
            f"{path}: {_IDS} names one expert twice for token {first_token + token} in layer {layer}; "
            "expected k different experts per row. Leave padding and dummy rows out."
        )


def _by_weight(
    path: Path, ids: np.ndarray, gates: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids and weights, heaviest first, and how many rows had to be put in order."""
    if not np.isfinite(gates).all() or float(np.abs(gates).max()) > np.finfo(np.float16).max:
        raise InputError(
            f"{path}: {_WEIGHTS} holds values that are not finite or too large; expected router "
            f"weights, at most {np.finfo(np.float16).max:,.0f}."
        )
    moved = int((np.diff(gates, axis=2) > 0).any(axis=2).sum())
    if moved:
        order = np.argsort(-gates, axis=2, kind="stable")
        ids = np.take_along_axis(ids, order, axis=2)
        gates = np.take_along_axis(gates, order, axis=2)
    return ids, gates, moved


def _limited(routing: Routing, limit: int | None, warnings: list[str]) -> Routing:
    """Whole sequences of at most `limit` tokens in all, spread evenly so that every domain stays in."""
    tokens = len(routing.experts)
    if limit is None or limit >= tokens:
        return routing
    count = len(routing.lengths)
    kept = max(1, count * limit // tokens)
    while kept > 1 and routing.lengths[_spread(count, kept)].sum() > limit:
        kept -= 1
    chosen = _spread(count, kept)
    ends = np.minimum(routing.bounds[chosen + 1], routing.bounds[chosen] + limit)
    pieces = [slice(*pair) for pair in zip(routing.bounds[chosen], ends, strict=True)]
    experts = np.concatenate([routing.experts[piece] for piece in pieces])
    weights = routing.weights
    cut = ", cut" if kept == 1 and routing.lengths[chosen[0]] > limit else ""
    warnings.append(
        f"Limited to {len(experts):,} of {tokens:,} tokens: {kept} of {count} sequences{cut}, spread "
        "over the file."
    )
    return Routing(
        experts=experts,
        weights=None if weights is None else np.concatenate([weights[piece] for piece in pieces]),
        bounds=np.r_[0, np.cumsum(ends - routing.bounds[chosen])],
        prompt_ids=_picked(routing.prompt_ids, chosen),
        domains=_picked(routing.domains, chosen),
    )


def _spread(count: int, kept: int) -> np.ndarray:
    return np.arange(kept) * count // kept


def _picked(values: tuple[str, ...], places: np.ndarray) -> tuple[str, ...]:
    return tuple(values[place] for place in places.tolist())


def _shape(request: ImportRequest, routing: Routing, warnings: list[str]) -> ModelShape:
    seen = int(routing.experts.max()) + 1
    if request.experts is not None and request.experts < seen:
        raise InputError(
            f"{request.file}: {_IDS} names expert {seen - 1}, but --experts {request.experts} allows 0 "
            f"to {request.experts - 1}. Pass --experts {seen} or more."
        )
    if request.experts is None:
        warnings.append(
            f"The number of experts per layer, {seen}, is guessed from the highest id; give it with "
            "--experts."
        )
    if request.dtype is None:
        warnings.append(f"The number format {_DTYPE} is a guess; give it with --dtype.")
    sizes = {
        "--expert-bytes": request.expert_bytes,
        "--non-expert-bytes": request.non_expert_bytes,
        "--hidden-size": request.hidden_size,
    }
    unknown = [option for option, size in sizes.items() if not size]
    if unknown:
        warnings.append(
            f"Not given and therefore 0: {', '.join(unknown)}. Hits can be replayed; bytes and times "
            "need the sizes."
        )
    layers = routing.experts.shape[1]
    return ModelShape(
        model_id=request.model or request.file.stem,
        revision=None,
        architecture="Imported",
        dtype=request.dtype or _DTYPE,
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        num_experts=request.experts or seen,
        top_k=routing.experts.shape[2],
        expert_bytes=request.expert_bytes,
        non_expert_bytes=request.non_expert_bytes,
        kv_bytes_per_token=0,
        hidden_size=request.hidden_size,
        vocab_size=0,
    )

"""Published routing in a numpy archive: expert ids with the bounds of sequences, and no times.

Everything in the file is checked before anything is written. What was guessed or mended is said in the
trace's warnings.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import InputError, unknown_name
from ..schema import Manifest
from .mend import checked
from .request import ImportRequest, origin_of, phase_of, refuse, require_possible
from .sequences import Sequences
from .shape import imported_shape
from .torch_file import BAD_ARCHIVE
from .untimed import write_untimed

_IDS, _WEIGHTS, _BOUNDS, _PROMPTS = "expert_ids", "gate_weights", "seq_bounds", "prompt_rows"
_DOMAINS = ("domain", "category", "dataset")


def import_npz(request: ImportRequest) -> Manifest:
    """Turn a numpy archive into the trace `request.out`, and return its manifest.

    Raises UsageError for options that cannot be, InputError naming the array that is wrong.
    """
    require_possible(request)
    refuse(request, "a numpy archive of expert_ids", "--layers", "--top-k")
    notes = [origin_of(request.file)]
    warnings: list[str] = []
    sequences = _read(request, notes, warnings).limited(request.limit_tokens, warnings)
    routing = sequences.passes(warnings)
    return write_untimed(
        request.out,
        routing,
        shape=imported_shape(request, routing, warnings),
        notes=notes,
        warnings=warnings,
        extra={"source": request.file.name, "format": "npz"},
        overwrite=request.overwrite,
    )


def _read(request: ImportRequest, notes: list[str], warnings: list[str]) -> Sequences:
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
        prompts = _prompts(request, archive, np.diff(bounds.astype(np.int64)))
        count = len(bounds) - 1
        domains = _domains(path, archive, request.domain, count, notes)
    experts, weights = checked(path, ids, gates, warnings, name=_IDS)
    return Sequences(
        experts=experts,
        weights=weights,
        bounds=bounds.astype(np.int64),
        prompts=prompts,
        prompt_ids=tuple(str(number) for number in range(count)),
        domains=domains,
    )


def _prompts(
    request: ImportRequest, archive: np.lib.npyio.NpzFile, lengths: np.ndarray
) -> np.ndarray:
    """Rows of each sequence that are its prompt: as the file says, or all or none by the phase asked for."""
    if _PROMPTS not in archive.files:
        return lengths if phase_of(request) == "prefill" else np.zeros_like(lengths)
    refuse(request, f"a file that has {_PROMPTS}", "--phase")
    prompts = _array(request.file, archive, _PROMPTS)
    is_right = prompts.shape == lengths.shape and prompts.dtype.kind in "iu"
    if not is_right or (prompts < 0).any() or (prompts > lengths).any():
        raise InputError(
            f"{request.file}: {_PROMPTS} is {prompts.dtype} of shape {list(prompts.shape)}; expected one "
            f"whole number per sequence, [{len(lengths)}], from 0 to the sequence's length."
        )
    return prompts.astype(np.int64)


def _opened(path: Path) -> np.lib.npyio.NpzFile:
    try:
        archive = np.load(path, allow_pickle=False)
    except BAD_ARCHIVE:
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
    except BAD_ARCHIVE as error:
        what = "holds Python objects" if "pickle" in str(error) else "is damaged"
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
    labels = [key for key in archive.files if key not in (_IDS, _WEIGHTS, _BOUNDS, _PROMPTS)]
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

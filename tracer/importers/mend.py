"""What is wrong with recordings in ways that can be mended, and the checks on the rest.

Servers record into fixed buffers. Layers without experts, rows of a warm-up or a CUDA graph's padding and the last
generated token, which is never fed in, keep what the buffer was filled with: −1 (SGLang) or 0 (vLLM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..store import NO_EXPERT

_TOKENS_PER_CHECK = 16_384
Place = Callable[[int], str]


def _token(row: int) -> str:
    return f"token {row}"


@dataclass(frozen=True, slots=True)
class Written:
    """The part of a buffer that a router wrote.

    `ids` [kept tokens, kept layers, k]; `is_kept` is by token of the buffer, `layers` are its layers that are kept.
    """

    ids: np.ndarray
    is_kept: np.ndarray
    layers: tuple[int, ...]


def written_part(path: Path, ids: np.ndarray, warnings: list[str]) -> Written:
    """Leave out of a buffer [tokens, layers, k] what no router wrote, and say so in `warnings`.

    Raises InputError if nothing is left.
    """
    is_empty = (ids < 0).all(axis=2)
    if ids.shape[2] > 1:  # with k = 1 a zero may be expert 0
        is_empty |= (ids == 0).all(axis=2)
    is_empty = np.asarray(is_empty)
    if is_empty.all():
        raise InputError(
            f"{path}: no row names an expert; every id is −1 or 0. Record it again, with a model that "
            "has experts."
        )
    is_layer = np.asarray(~is_empty.all(axis=0))
    is_kept = np.asarray(~is_empty.all(axis=1))
    dense, dummies = np.flatnonzero(~is_layer), int((~is_kept).sum())
    if dense.size:
        numbers = ", ".join(str(number) for number in dense.tolist())
        warnings.append(f"Left out {len(dense)} layers that have no experts: {numbers}.")
    if dummies:
        warnings.append(
            f"Left out {dummies:,} of {len(ids):,} rows that no router wrote: warm-up, padding of a CUDA "
            "graph, or a last token that was never fed in."
        )
    kept = ids[is_kept][:, is_layer]
    is_column = ~(kept < 0).all(axis=(0, 1))
    return Written(kept[..., is_column], is_kept, tuple(np.flatnonzero(is_layer).tolist()))


def checked(
    path: Path,
    ids: np.ndarray,
    gates: np.ndarray | None,
    warnings: list[str],
    *,
    name: str = "the file",
    place: Place = _token,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids and weights as the format keeps them, likeliest expert first.

    `name` is what the ids are called in the file and `place` names a row of them. Raises InputError.
    """
    experts = np.empty(ids.shape, np.uint16)
    weights = None if gates is None else np.empty(ids.shape, np.float16)
    mended, by_number = 0, 0
    for rows in _chunks(len(ids)):
        chosen = ids[rows]
        _require_experts(path, chosen, rows.start, name, place)
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


def _require_experts(path: Path, ids: np.ndarray, first: int, name: str, place: Place) -> None:
    is_wrong = (ids < 0) | (ids >= NO_EXPERT)
    if is_wrong.any():
        token, layer, choice = np.argwhere(is_wrong)[0].tolist()
        raise InputError(
            f"{path}: {name} holds {int(ids[token, layer, choice])} for {place(first + token)} in layer "
            f"{layer}; expected 0 to {NO_EXPERT - 1}. Leave padding rows out."
        )
    ordered = np.sort(ids, axis=2)
    is_twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=2)
    if is_twice.any():
        token, layer = np.argwhere(is_twice)[0].tolist()
        raise InputError(
            f"{path}: {name} names one expert twice for {place(first + token)} in layer {layer}; "
            "expected k different experts per row. Leave padding and dummy rows out."
        )


def _by_weight(
    path: Path, ids: np.ndarray, gates: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids and weights, heaviest first, and how many rows had to be put in order."""
    if not np.isfinite(gates).all() or float(np.abs(gates).max()) > np.finfo(np.float16).max:
        raise InputError(
            f"{path}: gate_weights holds values that are not finite or too large; expected router "
            f"weights, at most {np.finfo(np.float16).max:,.0f}."
        )
    moved = int((np.diff(gates, axis=2) > 0).any(axis=2).sum())
    if moved:
        order = np.argsort(-gates, axis=2, kind="stable")
        ids = np.take_along_axis(ids, order, axis=2)
        gates = np.take_along_axis(gates, order, axis=2)
    return ids, gates, moved

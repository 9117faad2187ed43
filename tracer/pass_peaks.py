"""Peaks of a forward pass's working tensors by its size, from passes over shapes (dry_pass.py).

Live bytes after one operation of a pass are a sum of few terms: what every pass has, each sequence, each token, and
each pair of a token and a position it may attend to. A few small passes give them, operation by operation, and the
largest sum at another size is the peak there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from .dry_pass import DryModel, Stages
from .widths import PassWidths

Terms = tuple[float, ...]
_ALONE = tuple((1, tokens, 1) for tokens in (64, 128, 192))
_TOGETHER = ((2, 64, 1), (2, 128, 1), (2, 192, 1), (3, 64, 1), (3, 128, 1))
_IN_PARTS = ((2, 64, 64), (2, 128, 64), (2, 64, 128), (2, 128, 128), (3, 64, 64), (3, 64, 128))
"""Sequences, tokens of each in a first pass, and in the pass behind it, of what is looked at.

One sequence alone is not padded, so it runs otherwise. Parts of prompts attend to what is cached, with a mask.
"""
_CHUNK = 64
"""Layers that walk along a text fill up its last chunk; those of the library are of so many tokens, or a multiple."""
_EXACT = 1e-6
"""Share of a sum that terms may miss and still be the right ones."""


@dataclass(frozen=True, slots=True)
class _Peaks:
    """Bytes for each amount, for every operation that can be a pass's peak: of a first pass, of the one behind it.

    `chunk` tokens of a prompt are walked through at once; 1: all of them.
    """

    first: tuple[Terms, ...]
    behind: tuple[Terms, ...]
    chunk: int


_known: WeakKeyDictionary[DryModel, dict[tuple[tuple[int, int, int], ...], _Peaks]] = (
    WeakKeyDictionary()
)


class PassPeaks:
    """Working tensors of a model by the size of its passes. KV cache and states are left out.

    The passes are run when they are asked for first. `instead` answers for a model that cannot run them after all.
    """

    is_upper = False

    def __init__(self, dry: DryModel, kept_per_sequence: int, instead: PassWidths) -> None:
        self.item_bytes = instead.item_bytes
        self.kept_per_sequence = kept_per_sequence
        self.is_by_pass = True
        self._dry = dry
        self._instead = instead
        self._known = _known.setdefault(dry, {})

    def activation_bytes(
        self, *, batch: int, tokens: int, context: int, in_parts: bool = False
    ) -> int:
        """Working tensors at their peak: bytes of a run whose largest pass feeds `tokens` of `batch` sequences.

        `context` are the positions each sequence has in the end. Prompts are fed in one pass, padded to one length, or
        `in_parts`, each with a mask over what is cached.
        """
        try:
            peak = self._in_parts if in_parts else self._at_once
            return peak(batch, tokens, context)
        except Exception:  # a family can look at contents in as many ways as there are families
            self.is_by_pass = False
            return self._instead.activation_bytes(batch=batch, tokens=tokens, context=context)

    def _at_once(self, batch: int, tokens: int, context: int) -> int:
        peaks = self._peaks(_ALONE if batch == 1 else _TOGETHER)
        width = -(-tokens // max(1, batch))
        if width > 1:
            width = -(-width // peaks.chunk) * peaks.chunk
        first = _largest(peaks.first, _amounts(batch, width, width))
        return max(first, _largest(peaks.behind, _amounts(batch, 1, context)))

    def _in_parts(self, batch: int, tokens: int, context: int) -> int:
        width = -(-tokens // max(1, batch))
        parts = _largest(self._peaks(_IN_PARTS).behind, _amounts(batch, width, context))
        return max(parts, _largest(self._peaks(_TOGETHER).behind, _amounts(batch, 1, context)))

    def _peaks(self, sizes: tuple[tuple[int, int, int], ...]) -> _Peaks:
        if sizes not in self._known:
            seen = [self._dry.run(*size) for size in sizes]
            prompts = [_amounts(batch, tokens, tokens) for batch, tokens, _ in sizes]
            behind = [_amounts(batch, more, tokens + more) for batch, tokens, more in sizes]
            self._known[sizes] = _Peaks(
                first=_terms_of([one.prefill for one in seen], prompts),
                behind=_terms_of([one.behind for one in seen], behind),
                chunk=1 if all(_is_even(one.prefill, seen[0].prefill) for one in seen) else _CHUNK,
            )
        return self._known[sizes]


def _is_even(one: Stages, other: Stages) -> bool:
    """Whether two passes did the same operations, so that none goes round as often as there are tokens."""
    return {name: len(row) for name, row in one.items()} == {
        name: len(row) for name, row in other.items()
    }


def _amounts(batch: float, tokens: float, context: float) -> Terms:
    """Amounts of a pass: passes; tokens, positions, pairs of both in all; sequences; pairs in one of them."""
    pairs = tokens * context
    return (1.0, batch * tokens, batch * context, batch * pairs, batch, pairs)


def _largest(peaks: Sequence[Terms], amounts: Terms) -> int:
    return int(np.ceil((np.asarray(peaks) @ np.asarray(amounts)).max(initial=0.0)))


def _terms_of(passes: Sequence[Stages], amounts: Sequence[Terms]) -> tuple[Terms, ...]:
    """The terms of every operation that is the peak at some size."""
    design = np.asarray(amounts)
    told = _told_apart(design)
    seen: set[tuple[int, ...]] = set()
    for stage in {name for one in passes for name in one}:
        rows = [one.get(stage, []) for one in passes]
        if len({len(row) for row in rows}) > 1:
            rows = [[max(row, default=0)] for row in rows]
        seen.update(zip(*rows, strict=True))
    found = {_terms(design, np.asarray(values, dtype=np.float64), told) for values in seen}
    return _undominated(found)


def _terms(design: np.ndarray, values: np.ndarray, told: Sequence[int]) -> Terms:
    """The fewest terms that give these bytes, else such as are never below them.

    Amounts that grow alike in all passes cannot be `told` apart: the first of them has the bytes.
    """
    for number in range(1, len(told) + 1):
        terms = _solved(design, values, told[:number])
        missed = np.abs(design @ terms - values).max()
        # As many terms as passes always fit: then none may be below zero.
        is_proved = number < len(design) or bool(terms.min() >= 0)
        if is_proved and missed <= _EXACT * np.abs(values).max(initial=1.0):
            return tuple(terms.tolist())
    terms = _non_negative(design, values, told)
    given = np.maximum(design @ terms, 1.0)
    return tuple((terms * max(1.0, (values / given).max())).tolist())


def _told_apart(design: np.ndarray) -> list[int]:
    """Columns that are no sum of the columns before them."""
    found: list[int] = []
    scaled = design / design.max(axis=0)
    for column in range(design.shape[1]):
        if np.linalg.matrix_rank(scaled[:, [*found, column]], tol=1e-9) > len(found):
            found.append(column)
    return found


def _solved(design: np.ndarray, values: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """Least squares over some columns, every amount weighing the same; the others get nothing."""
    scale = design.max(axis=0)
    terms = np.zeros(design.shape[1])
    terms[list(columns)] = np.linalg.lstsq((design / scale)[:, list(columns)], values, rcond=None)[
        0
    ]
    return terms / scale


def _non_negative(design: np.ndarray, values: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """Least squares of terms none of which is below zero: the worst leaves until that is so."""
    kept, scale = list(columns), design.max(axis=0)
    terms = np.zeros(design.shape[1])
    while kept:
        terms = _solved(design, values, kept)
        if terms.min() >= 0:
            break
        kept.remove(int(np.argmin(terms * scale)))
    return np.maximum(terms, 0.0)


def _undominated(found: set[Terms]) -> tuple[Terms, ...]:
    """Those that some size can make the largest: no other has as much of everything."""
    kept: list[Terms] = []
    for terms in sorted(found, key=sum, reverse=True):
        if not any(all(a >= b for a, b in zip(one, terms, strict=True)) for one in kept):
            kept.append(terms)
    return tuple(kept)

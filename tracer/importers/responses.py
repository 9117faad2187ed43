"""Replies of a server as JSON: one object, a list of them, or one per line."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .mend import checked, written_part
from .request import ImportRequest, refuse
from .sequences import Sequences

_ARRAY_OF = "[tokens, layers, k]"


@dataclass(frozen=True, slots=True)
class Reply:
    """The routing of one completion: ids [rows, layers, k], the first `prompt_rows` of them the prompt's."""

    place: str
    name: str
    ids: np.ndarray
    prompt_rows: int


@dataclass(frozen=True, slots=True)
class Replies:
    """Sequences, and which of the model's layers they are of."""

    sequences: Sequences
    layers: tuple[int, ...]
    num_layers: int


def read_documents(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each reply in the file and where it stands. Raises InputError naming the line that is no reply."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as JSON: {error}.") from None
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    found = whole if isinstance(whole, list) else [whole]
    if whole is None:
        yield from _lines(path, text)
        return
    for number, document in enumerate(found):
        where = f"reply {number}"
        if not isinstance(document, Mapping):
            raise InputError(f"{path}: {where} is {_kind(document)}; expected an object.")
        yield where, document


def _lines(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: {where} is not JSON ({error}).") from None
        if not isinstance(document, Mapping):
            raise InputError(f"{path}: {where} is {_kind(document)}; expected an object.")
        yield where, document


def choices_of(
    path: Path, where: str, document: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The completions of one reply: its `choices`, or the reply itself."""
    choices = document.get("choices")
    if choices is None:
        yield where, document
        return
    if not isinstance(choices, list) or not all(isinstance(item, Mapping) for item in choices):
        raise InputError(f"{path}: choices of {where} is {_kind(choices)}; expected objects.")
    for number, choice in enumerate(choices):
        yield (where if len(choices) == 1 else f"{where}, choice {number}"), choice


def count_of(document: Mapping[str, Any], section: str, name: str) -> int | None:
    """A count out of one section of a reply; None if it is not told."""
    found = document.get(section)
    value = found.get(name) if isinstance(found, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def decoded(path: Path, where: str, text: str) -> bytes:
    """The bytes of a base64 text. Raises InputError naming the reply."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{path}: routed_experts of {where} is no base64 ({error}).") from None


def prompt_rows(
    request: ImportRequest, where: str, rows: int, prompt: int | None, generated: int | None
) -> int:
    """How many of a completion's rows are its prompt's.

    A row is an input token's. The last generated token is never fed in, so there are prompt + generated − 1; fewer
    if the beginning of the prompt was left out. Raises InputError if no reading fits.
    """
    path = request.file
    if prompt is None and request.phase is not None:
        return rows if request.phase == "prefill" else 0
    refuse(request, "replies that tell their prompts", "--phase")
    if prompt is None:
        raise InputError(
            f"{path}: {where} does not tell how many tokens its prompt has, so its {rows} rows cannot be "
            "divided. Keep usage.prompt_tokens (meta_info.prompt_tokens), or pass --phase decode or prefill."
        )
    if generated is None:
        return min(rows, prompt)
    if rows > prompt + generated:
        raise InputError(
            f"{path}: {where} has {rows} rows for {prompt} prompt tokens and {generated} generated; "
            f"expected {max(prompt + generated - 1, 0)}."
        )
    return max(0, min(prompt, rows - max(generated - 1, 0)))


def joined(request: ImportRequest, replies: Sequence[Reply], warnings: list[str]) -> Replies:
    """Replies as sequences, without what no router wrote. Raises InputError naming the reply that is wrong."""
    path = request.file
    if not replies:
        raise InputError(f"{path} holds no routed_experts. Was the server told to return them?")
    first = replies[0].ids.shape[1:]
    for reply in replies:
        if reply.ids.shape[1:] != first:
            raise InputError(
                f"{path}: routed_experts of {reply.place} is {list(reply.ids.shape)}; expected [rows, "
                f"{first[0]}, {first[1]}] as in {replies[0].place}."
            )
    ids = np.concatenate([reply.ids for reply in replies]).astype(np.int64)
    lengths = np.asarray([len(reply.ids) for reply in replies])
    bounds = np.r_[0, np.cumsum(lengths)]
    written = written_part(path, ids, warnings)
    row = np.flatnonzero(written.is_kept)

    def place(token: int) -> str:
        number = int(np.searchsorted(bounds, row[token], side="right")) - 1
        return f"row {row[token] - bounds[number]} of {replies[number].place}"

    experts, _ = checked(path, written.ids, None, warnings, name="routed_experts", place=place)
    reply_of = np.searchsorted(bounds, row, side="right") - 1
    is_prompt = row - bounds[reply_of] < np.asarray([r.prompt_rows for r in replies])[reply_of]
    kept = np.bincount(reply_of, minlength=len(replies))
    if (kept == 0).any():
        warnings.append(f"Left out {int((kept == 0).sum())} replies that had no row left.")
    names = [reply.name for reply, count in zip(replies, kept, strict=True) if count]
    sequences = Sequences(
        experts=experts,
        weights=None,
        bounds=np.r_[0, np.cumsum(kept[kept > 0])],
        prompts=np.bincount(reply_of[is_prompt], minlength=len(replies))[kept > 0],
        prompt_ids=tuple(names),
        domains=("",) * len(names),
    )
    return Replies(sequences, written.layers, int(first[0]))


def ids_of(path: Path, where: str, values: np.ndarray) -> np.ndarray:
    """Check that ids are whole numbers [tokens, layers, k]. Raises InputError naming the reply."""
    if values.ndim != 3 or values.dtype.kind not in "iu" or 0 in values.shape[1:]:
        raise InputError(
            f"{path}: routed_experts of {where} is {values.dtype} of shape {list(values.shape)}; expected "
            f"whole numbers of shape {_ARRAY_OF}."
        )
    return values


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(
        type(value), "a number"
    )

"""Routing that vLLM returns with its replies (`--enable-return-routed-experts`).

- vLLM 0.21 (docs.vllm.ai/en/v0.21.0/training/routed_experts_replay): `prompt_routed_experts` [prompt, layers, k] by
  reply and `routed_experts` [generated, layers, k] by choice, int16, in JSON as nested lists.
- Since 0.22 (docs.vllm.ai/en/latest/training/routed_experts, pull request 38939): base64 of a `.npy` file by choice,
  whose rows are the prompt's and then the generated tokens'; the last one was never fed in. Ids may be int32.
- The Python API gives the arrays themselves; they are read from `.npz` (one reply, arrays of these names) or `.npy`.
- Dynamo and others wrap them: {"data": base64, "shape", "dtype"} (ai-dynamo/dynamo, pull request 10529).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .request import ImportRequest, phase_of, refuse
from .responses import (
    Replies,
    Reply,
    choices_of,
    count_of,
    decoded,
    ids_of,
    joined,
    prompt_rows,
    read_documents,
)
from .torch_file import BAD_ARCHIVE

PROMPT, IDS = "prompt_routed_experts", "routed_experts"
_MAGIC = b"\x93NUMPY"


def read_vllm(request: ImportRequest, warnings: list[str]) -> Replies:
    """Read replies as JSON, or one reply's arrays. Raises InputError naming the reply that is wrong."""
    refuse(request, "vLLM's arrays, whose axes are known", "--layers", "--top-k", "--layout")
    with request.file.open("rb") as file:
        start = file.read(len(_MAGIC))
    is_numpy = start == _MAGIC or start[:2] == b"PK"
    replies = [_arrays(request)] if is_numpy else list(_replies(request))
    found = joined(request, replies, warnings)
    warnings.append(
        "vLLM does not say which requests ran together: they are taken one after another, at batch 1."
    )
    return found


def _replies(request: ImportRequest) -> Iterator[Reply]:
    path = request.file
    for where, document in read_documents(path):
        shared = document.get(PROMPT)
        prompt = None if shared is None else _ids(path, where, shared)
        for place, choice in choices_of(path, where, document):
            found = choice.get(IDS)
            if found is None and prompt is None:
                raise InputError(
                    f"{path}: {place} has no {IDS}. Start vLLM with --enable-return-routed-experts."
                )
            ids = None if found is None else _ids(path, place, found)
            name = str(document.get("id") or place)
            if prompt is not None:
                refuse(request, f"replies that have {PROMPT}", "--phase")
                yield Reply(place, name, _stacked(path, place, prompt, ids), len(prompt))
            elif ids is not None:
                told = _prompt_tokens(document, choice)
                generated = _generated_tokens(document, choice)
                rows = prompt_rows(request, place, len(ids), told, generated)
                yield Reply(place, name, ids, rows)


def _prompt_tokens(document: Mapping[str, Any], choice: Mapping[str, Any]) -> int | None:
    told = count_of(document, "usage", "prompt_tokens")
    ids = choice.get("prompt_token_ids") or document.get("prompt_token_ids")
    return len(ids) if told is None and isinstance(ids, list) else told


def _generated_tokens(document: Mapping[str, Any], choice: Mapping[str, Any]) -> int | None:
    ids, choices = choice.get("token_ids"), document.get("choices")
    if isinstance(ids, list):
        return len(ids)
    # The usage is of all choices together.
    is_alone = not isinstance(choices, list) or len(choices) == 1
    return count_of(document, "usage", "completion_tokens") if is_alone else None


def _arrays(request: ImportRequest) -> Reply:
    """One reply of the Python API, saved by numpy."""
    path = request.file
    try:
        found = np.load(path, allow_pickle=False)
        arrays = {IDS: found} if isinstance(found, np.ndarray) else dict(found)
    except BAD_ARCHIVE as error:
        raise InputError(f"{path} cannot be read as numpy arrays: {error}.") from None
    known = {name: ids_of(path, name, arrays[name]) for name in (PROMPT, IDS) if name in arrays}
    if PROMPT in known:
        refuse(request, f"a file that has {PROMPT}", "--phase")
        ids = _stacked(path, IDS, known[PROMPT], known.get(IDS))
        return Reply(path.name, path.stem, ids, len(known[PROMPT]))
    if IDS not in known:
        raise InputError(f"{path} holds {', '.join(arrays) or 'nothing'}; expected {IDS}.")
    rows = len(known[IDS]) if phase_of(request) == "prefill" else 0
    return Reply(path.name, path.stem, known[IDS], rows)


def _ids(path: Path, where: str, value: Any) -> np.ndarray:
    """Ids out of JSON: nested lists, a base64 `.npy`, or an object with data, shape and dtype."""
    if isinstance(value, str):
        body = decoded(path, where, value)
        try:
            return ids_of(path, where, np.load(io.BytesIO(body), allow_pickle=False))
        except (ValueError, OSError, EOFError) as error:
            raise InputError(
                f"{path}: {IDS} of {where} is base64 of something else than a .npy ({error}). If SGLang wrote "
                "it, pass --format sglang."
            ) from None
    try:
        if isinstance(value, Mapping):
            body = decoded(path, where, str(value["data"]))
            values = np.frombuffer(body, np.dtype(str(value["dtype"]))).reshape(value["shape"])
        else:
            values = np.asarray(value)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {IDS} of {where} is no array of ids ({error}).") from None
    return ids_of(path, where, values)


def _stacked(path: Path, where: str, prompt: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    if ids is None:
        return prompt
    if prompt.shape[1:] != ids.shape[1:]:
        raise InputError(
            f"{path}: {PROMPT} of {where} is {list(prompt.shape)} and {IDS} is {list(ids.shape)}; expected "
            "the same layers and k."
        )
    return np.concatenate([prompt, ids])

"""Routing that SGLang returns with its replies (`--enable-return-routed-experts`, `return_routed_experts`).

`meta_info.routed_experts` (in choices for the OpenAI endpoints; `sglext.routed_experts` in later ones) is base64 of
int32, flat [rows, layers, k]; layers without experts have rows too, of 0 or −1. There are prompt + completion − 1 rows,
as many as tokens were fed in. Pull requests sgl-project/sglang 12162 and 17434; `extract_routed_experts_from_meta_info`
in python/sglang/srt/layers/moe/routed_experts_capturer.py; sglang-jax docs/features/return_routed_experts.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import InputError, UsageError
from .request import ImportRequest, refuse
from .responses import (
    Replies,
    Reply,
    choices_of,
    count_of,
    decoded,
    joined,
    prompt_rows,
    read_documents,
)

IDS = "routed_experts"
SECTIONS = ("meta_info", "sglext")


def read_sglang(request: ImportRequest, warnings: list[str]) -> Replies:
    """Read replies as JSON. Raises UsageError without --layers or --top-k, InputError naming the reply."""
    refuse(request, "SGLang's replies", "--layout")
    found = joined(request, list(_replies(request)), warnings)
    warnings.append(
        "SGLang does not say which requests ran together: they are taken one after another, at batch 1."
    )
    return found


def _replies(request: ImportRequest) -> Iterator[Reply]:
    path = request.file
    for where, document in read_documents(path):
        for place, choice in choices_of(path, where, document):
            payload = _payload(choice) or _payload(document)
            if payload is None:
                raise InputError(
                    f"{path}: {place} has no meta_info.{IDS}. Start SGLang with "
                    "--enable-return-routed-experts and ask for return_routed_experts."
                )
            body = decoded(path, place, payload)
            if len(body) % 4:
                raise InputError(f"{path}: {IDS} of {place} is {len(body)} bytes, no whole int32s.")
            told = _count(document, choice, "prompt_tokens")
            generated = _count(document, choice, "completion_tokens")
            ids = _shaped(request, place, np.frombuffer(body, "<i4"), told, generated)
            rows = prompt_rows(request, place, len(ids), told, generated)
            yield Reply(place, _name(document, choice) or place, ids, rows)


def _payload(document: Mapping[str, Any]) -> str | None:
    for section in SECTIONS:
        found = document.get(section)
        value = found.get(IDS) if isinstance(found, Mapping) else None
        if isinstance(value, str):
            return value
    return None


def _name(document: Mapping[str, Any], choice: Mapping[str, Any]) -> str:
    for place in (choice, document):
        info = place.get("meta_info")
        if isinstance(info, Mapping) and info.get("id"):
            return str(info["id"])
    return str(document.get("id") or "")


def _count(document: Mapping[str, Any], choice: Mapping[str, Any], name: str) -> int | None:
    for place, section in ((choice, "meta_info"), (document, "meta_info"), (document, "usage")):
        found = count_of(place, section, name)
        if found is not None:
            return found
    return None


def _shaped(
    request: ImportRequest, where: str, flat: np.ndarray, prompt: int | None, generated: int | None
) -> np.ndarray:
    """Flat ids as [rows, layers, k]; what is not told follows from how many tokens were fed in."""
    layers, top_k = request.layers, request.top_k
    if layers is None and top_k is None:
        raise UsageError(
            f"{request.file}: SGLang's ids are flat. Pass --layers (all of the model's layers, those without "
            "experts too), --top-k (experts per token), or both."
        )
    if layers is None or top_k is None:
        rows = max((prompt or 0) + (generated or 0) - 1, 0)
        each, rest = divmod(len(flat), rows * (layers or top_k or 1)) if rows else (0, 1)
        if rest:
            raise InputError(
                f"{request.file}: {where} has {len(flat):,} ids, which do not divide into its {rows} input "
                "tokens. Pass both --layers and --top-k."
            )
        layers, top_k = layers or each, top_k or each
    if len(flat) % (layers * top_k) or not len(flat):
        raise InputError(
            f"{request.file}: {where} has {len(flat):,} ids; expected a multiple of {layers} layers × "
            f"{top_k} experts."
        )
    return flat.reshape(-1, layers, top_k)

"""Reads prompts from text or JSON lines, and cuts them into batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import embedded
from .errors import InputError, UsageError
from .generate import Prompt

MAX_PROMPT_TOKENS = 2048
"""Longer prompts are cut here."""


@dataclass(frozen=True, slots=True)
class PromptText:
    """One prompt as given. `domain` is empty if the file has no labels."""

    prompt_id: str
    domain: str
    text: str

    @property
    def sha256(self) -> str:
        """Hash of the text: what a trace keeps when the text itself is not stored."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_prompts(path: Path | None) -> list[PromptText]:
    """Prompts of a `.jsonl` file (fields text or prompt, id, domain) or one per line of a text file.

    None gives the held-out prompts of the embedded model. Raises InputError naming the line.
    """
    path = path or embedded.PROMPTS
    try:
        # Not splitlines: JSON and prose may hold U+2028 and other characters it takes for line ends.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as cause:
        raise InputError(f"Prompts {path} cannot be read: {cause}.") from None
    read = _json_line if path.suffix in (".jsonl", ".json") else _text_line
    prompts = [
        read(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not prompts:
        raise InputError(f"Prompts {path} is empty; write one prompt per line.")
    return prompts


def _text_line(path: Path, number: int, line: str) -> PromptText:
    return PromptText(str(number), "", line)


def _json_line(path: Path, number: int, line: str) -> PromptText:
    try:
        row: Any = json.loads(line)
    except ValueError as cause:
        raise InputError(f"{path}, line {number}: not JSON ({cause}).") from None
    text = row.get("text", row.get("prompt")) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text:
        raise InputError(
            f"{path}, line {number}: expected an object with a non-empty string `text`."
        )
    return PromptText(str(row.get("id", number)), str(row.get("domain", "")), text)


def choose_prompts(prompts: Sequence[PromptText], limit: int | None) -> list[PromptText]:
    """At most `limit` prompts, spread evenly over the file so that every domain stays in."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    if limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}.")
    stride = len(prompts) / limit
    return [prompts[int(place * stride)] for place in range(limit)]


def tokenize(tokenizer: Any, prompts: Sequence[PromptText], max_tokens: int) -> list[Prompt]:
    """Token ids of each prompt, cut at `max_tokens`. Raises InputError for a prompt of no tokens."""
    tokenized: list[Prompt] = []
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt.text)["input_ids"][:max_tokens]
        if not ids:
            raise InputError(f"Prompt {prompt.prompt_id!r} has no tokens.")
        tokenized.append(Prompt(number, tuple(ids)))
    return tokenized


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Consecutive batches of `size`, the last one smaller if it must be."""
    if size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {size}.")
    for start in range(0, len(prompts), size):
        yield list(prompts[start : start + size])

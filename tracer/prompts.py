"""Reads prompts from text or JSON lines, turns them into tokens, and cuts them into batches.

A prompt is text, or a conversation for the tokenizer's chat template. It may bring the text that follows it
(`completion`), which a run then feeds instead of what the model would write (teacher forcing), and images
(tracer/images.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from . import embedded
from .errors import InputError, ResourceError, UsageError
from .generate import Prompt
from .image_files import (
    Content,
    ImageFile,
    Part,
    as_written,
    content_of,
    image_files,
    images_in,
    placed,
    words_of,
)

MAX_PROMPT_TOKENS = 2048
"""Longer prompts are cut here."""


_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = ("role", "content")
CHAT_TEMPLATE = "chat"
"""Label of prompts that went through the tokenizer's chat template and have none of their own."""


@dataclass(frozen=True, slots=True)
class PromptText:
    """One prompt as given. `domain` and `template` are empty if the file has no labels.

    `messages` are the (role, content) of a conversation; `text` is then their JSON. `completion` is text
    that is to follow. `images` are all that the prompt shows, in order.
    """

    prompt_id: str
    domain: str
    text: str
    template: str = ""
    completion: str | None = None
    messages: tuple[tuple[str, Content], ...] = ()
    images: tuple[ImageFile, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of the text and the images' files: what a trace keeps when the text itself is not stored."""
        digest = hashlib.sha256(self.text.encode())
        for image in self.images:
            digest.update(image.sha256.encode())
        return digest.hexdigest()


class ReadsImages(Protocol):
    """Makes tokens and model inputs of prompts that show images."""

    def read(self, prompt: PromptText, sequence: int, max_tokens: int) -> Prompt:
        """One prompt, cut at `max_tokens`. Raises InputError if it cannot be read, or the cut would hit an image."""
        ...


def read_prompts(path: Path | None) -> list[PromptText]:
    """Prompts of a `.jsonl` file or one per line of a text file.

    Fields of a line: `text` (or `prompt`) or `messages`, and if wanted `id`, `domain`, `template`, `completion`
    and `images`. A conversation that ends with the assistant brings that answer as its completion.
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
    where = f"{path}, line {number}"
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with a non-empty string `text`.")
    labels = str(row.get("id", number)), str(row.get("domain", ""))
    template = str(row.get("template", ""))
    completion = row.get("completion")
    if completion is not None and not (isinstance(completion, str) and completion):
        raise InputError(f"{where}: `completion` must be a non-empty string.")
    images = image_files(path, where, row.get("images", []))
    if "messages" in row:
        messages = placed(where, _messages(path, where, row["messages"]), images)
        if completion is None and len(messages) > 1 and messages[-1][0] == "assistant":
            completion, messages = _answer(where, messages[-1][1]), messages[:-1]
        text = json.dumps([{"role": role, "content": as_written(said)} for role, said in messages])
        return PromptText(*labels, text, template, completion, messages, images_in(messages))
    text = row.get("text", row.get("prompt"))
    if not isinstance(text, str) or not text:
        raise InputError(f"{where}: expected an object with a non-empty string `text`.")
    return PromptText(*labels, text, template, completion, images=images)


def _answer(where: str, content: Content) -> str:
    if not isinstance(content, str) and any(isinstance(part, ImageFile) for part in content):
        raise InputError(
            f"{where}: the assistant's last message is text to be fed, and holds an image."
        )
    return words_of(content)


def _messages(
    path: Path, where: str, value: Any
) -> list[tuple[str, str | tuple[Part | None, ...]]]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `messages` must be a non-empty list.")
    found: list[tuple[str, str | tuple[Part | None, ...]]] = []
    for place, item in enumerate(value):
        role, content = (item.get(key) if isinstance(item, dict) else None for key in _KEYS)
        if role not in _ROLES or not isinstance(content, (str, list)) or not content:
            raise InputError(
                f"{where}: message {place} must have a `role` ({', '.join(_ROLES)}) and a non-empty "
                "string `content`, or a list of parts."
            )
        said = content if isinstance(content, str) else content_of(path, where, content)
        found.append((str(role), said))
    return found


def as_chat(prompts: Sequence[PromptText]) -> list[PromptText]:
    """Plain prompts as conversations of one message by the user, images first; those that are conversations stay."""
    return [
        prompt if prompt.messages else replace(prompt, messages=(("user", _said(prompt)),))
        for prompt in prompts
    ]


def _said(prompt: PromptText) -> Content:
    return (*prompt.images, prompt.text) if prompt.images else prompt.text


def labelled(prompts: Sequence[PromptText]) -> list[PromptText]:
    """Conversations without a template label get one that says how they were written out."""
    return [
        replace(prompt, template=CHAT_TEMPLATE)
        if prompt.messages and not prompt.template
        else prompt
        for prompt in prompts
    ]


def is_teacher_forced(prompts: Sequence[PromptText], wanted: bool | None) -> bool:
    """Whether the text that follows is given: as wanted, or else if the prompts bring it.

    Raises InputError if only some of them do.
    """
    bring = [prompt for prompt in prompts if prompt.completion is not None]
    if wanted is None and bring and len(bring) < len(prompts):
        lacking = next(prompt for prompt in prompts if prompt.completion is None)
        raise InputError(
            f"{len(bring)} of {len(prompts)} prompts bring a completion, and prompt "
            f"{lacking.prompt_id!r} does not. Give all of them one, or choose with --teacher-forced "
            "or --own-generation."
        )
    return bool(bring) if wanted is None else wanted


def choose_prompts(prompts: Sequence[PromptText], limit: int | None) -> list[PromptText]:
    """At most `limit` prompts, spread evenly over the file so that every domain stays in."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    if limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}.")
    stride = len(prompts) / limit
    return [prompts[int(place * stride)] for place in range(limit)]


def tokenize(
    tokenizer: Any,
    prompts: Sequence[PromptText],
    max_tokens: int,
    images: ReadsImages | None = None,
) -> list[Prompt]:
    """Token ids of each prompt, cut at `max_tokens`; conversations go through the chat template.

    `images` reads the prompts that show some (tracer/images.py). Raises InputError for a prompt of no tokens, and
    one with images that nobody reads; ResourceError if the tokenizer has no chat template.
    """
    tokenized: list[Prompt] = []
    for number, prompt in enumerate(prompts):
        if prompt.images:
            tokenized.append(_shown(prompt, images).read(prompt, number, max_tokens))
            continue
        ids = _token_ids(tokenizer, prompt)[:max_tokens]
        if not ids:
            raise InputError(f"Prompt {prompt.prompt_id!r} has no tokens.")
        tokenized.append(Prompt(number, tuple(ids)))
    return tokenized


def _shown(prompt: PromptText, images: ReadsImages | None) -> ReadsImages:
    if images is None:
        raise InputError(
            f"{prompt.images[0].where}: the prompt shows images, which are not read here. Leave them out."
        )
    return images


def teacher_forced(
    tokenizer: Any,
    prompts: Sequence[PromptText],
    max_tokens: int,
    max_new_tokens: int,
    images: ReadsImages | None = None,
) -> list[Prompt]:
    """Prompts with the tokens that are to follow them, at most `max_new_tokens`.

    A prompt without a completion gives its own last tokens, and keeps one at least. Raises InputError for
    a prompt too short for that, or with images, or a completion of no tokens.
    """
    forced: list[Prompt] = []
    for prompt, one in zip(prompts, tokenize(tokenizer, prompts, max_tokens, images), strict=True):
        if prompt.images and prompt.completion is None:
            raise InputError(
                f"Prompt {prompt.prompt_id!r} ({prompt.images[0].where}) shows images, so its own last tokens are "
                "not fed: give it a `completion`, or run with --own-generation."
            )
        if prompt.completion is None:
            count = min(max_new_tokens, len(one.token_ids) - 1)
            head, tail = one.token_ids[: len(one.token_ids) - count], one.token_ids[-count:]
            follow = tail if count else ()
        else:
            head = one.token_ids
            plain = tokenizer(prompt.completion, add_special_tokens=False)["input_ids"]
            follow = tuple(plain[:max_new_tokens])
        if not follow:
            raise InputError(
                f"Prompt {prompt.prompt_id!r} leaves no token to be fed after it. Teacher forcing needs "
                "a `completion`, or a text of two tokens or more."
            )
        forced.append(Prompt(one.sequence, head, follow, one.inputs))
    return forced


def _token_ids(tokenizer: Any, prompt: PromptText) -> list[int]:
    if not prompt.messages:
        return tokenizer(prompt.text)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise ResourceError(
            "The model's tokenizer has no chat template, so conversations cannot be written out. Use a "
            "chat model, or give plain `text` without --chat."
        )
    messages = [{"role": role, "content": words_of(said)} for role, said in prompt.messages]
    try:
        written = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except Exception as cause:  # templates are programs of their own, and raise what they like
        raise InputError(
            f"Prompt {prompt.prompt_id!r} does not fit the model's chat template: {cause}."
        ) from None
    # The template writes the special tokens itself.
    return tokenizer(written, add_special_tokens=False)["input_ids"]


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Consecutive batches of `size`, the last one smaller if it must be."""
    if size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {size}.")
    for start in range(0, len(prompts), size):
        yield list(prompts[start : start + size])

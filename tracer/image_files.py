"""Images that a line of a prompt file names: which files they are, and where they stand among the words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError

_ELSEWHERE = ("http:", "https:", "data:", "file:", "s3:", "hf:")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image that a prompt shows, by the hash of its file. `where` is the line that names it."""

    path: Path
    sha256: str
    where: str


Part = str | ImageFile
Content = str | tuple[Part, ...]
"""What one message says: words, or words and images in turn."""


def image_files(prompts: Path, where: str, names: Any) -> tuple[ImageFile, ...]:
    """Files of a list of paths, relative to the prompt file's folder. Raises InputError naming the line."""
    if not isinstance(names, list):
        raise InputError(f"{where}: `images` must be a list of paths, relative to {prompts.name}.")
    return tuple(image_file(prompts, where, name) for name in names)


def image_file(prompts: Path, where: str, name: Any) -> ImageFile:
    """One file. Raises InputError if it is none, or lies elsewhere than on this machine."""
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: an image must be named by a non-empty path, got {name!r}.")
    if name.lower().startswith(_ELSEWHERE):
        raise InputError(
            f"{where}: image {name[:60]!r} is no path. Images are read from files: fetch it, and name the file "
            f"relative to {prompts.name}."
        )
    path = prompts.parent / name
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise InputError(
            f"{where}: image {name!r} cannot be read: {reason} ({path}). Paths are relative to {prompts.name}."
        ) from None
    return ImageFile(path, digest, where)


def content_of(prompts: Path, where: str, value: Any) -> tuple[Part | None, ...]:
    """The parts of a message's list; None stands for an image that the line's `images` name.

    Raises InputError for a part that is neither words nor an image.
    """
    return tuple(_part(prompts, where, part) for part in value)


def _part(prompts: Path, where: str, part: Any) -> Part | None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str) and part["text"]:
        return part["text"]
    if kind == "image":
        names = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
        return image_file(prompts, where, names[0]) if names else None
    raise InputError(
        f'{where}: a part of a message must be {{"type": "text", "text": "…"}} or {{"type": "image"}}, with a '
        f"`path` or in the order of the line's `images`; got {str(part)[:80]!r}."
    )


def placed(
    where: str,
    said: Sequence[tuple[str, str | tuple[Part | None, ...]]],
    images: Sequence[ImageFile],
) -> tuple[tuple[str, Content], ...]:
    """Messages with the line's `images` at the places left for them, or ahead of the user's first words.

    Conversations without images come back as words alone. Raises InputError if places and images are not as many.
    """
    places = sum(
        part is None for _, content in said if not isinstance(content, str) for part in content
    )
    if images and not places:
        said = _ahead(where, said, images)
    elif places != len(images):
        raise InputError(
            f"{where}: the messages leave {places} places for images, and `images` names {len(images)}."
        )
    left = iter(images)
    found: list[tuple[str, Content]] = []
    for role, content in said:
        if isinstance(content, str):
            found.append((role, content))
        else:
            found.append((role, tuple(next(left) if part is None else part for part in content)))
    if images_in(found):
        return tuple(found)
    return tuple((role, words_of(content)) for role, content in found)


def _ahead(
    where: str,
    said: Sequence[tuple[str, str | tuple[Part | None, ...]]],
    images: Sequence[ImageFile],
) -> list[tuple[str, str | tuple[Part | None, ...]]]:
    first = next((place for place, (role, _) in enumerate(said) if role == "user"), None)
    if first is None:
        raise InputError(f"{where}: no message is the user's, so `images` have no place.")
    role, content = said[first]
    parts = (content,) if isinstance(content, str) else content
    return [*said[:first], (role, (*[None] * len(images), *parts)), *said[first + 1 :]]


def images_in(messages: Sequence[tuple[str, Content]]) -> tuple[ImageFile, ...]:
    """All images of a conversation, in order."""
    return tuple(
        part
        for _, content in messages
        if not isinstance(content, str)
        for part in content
        if isinstance(part, ImageFile)
    )


def words_of(content: Content) -> str:
    """The words of a message alone."""
    if isinstance(content, str):
        return content
    return "".join(part for part in content if isinstance(part, str))


def as_written(content: Content) -> str | list[dict[str, str]]:
    """A message's content as chat templates want it; images are places, without their files."""
    if isinstance(content, str):
        return content
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in content
    ]

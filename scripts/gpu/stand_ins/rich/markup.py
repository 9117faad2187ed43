"""Markup that is taken out again."""

from __future__ import annotations

import re

_TAG = re.compile(r"(?<!\\)\[/?[a-z][a-z0-9 ,#/_.-]*\]|(?<!\\)\[/\]")


def escape(text: str) -> str:
    """Keep what looks like a tag from being one."""
    return re.sub(r"(\[/?[a-z])", r"\\\1", text)


def plain(text: str) -> str:
    """The text without its tags."""
    return _TAG.sub("", text).replace("\\[", "[")

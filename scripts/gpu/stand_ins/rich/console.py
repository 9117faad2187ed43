"""A console that prints."""

from __future__ import annotations

import sys

from .markup import plain


class Console:
    """Writes to stdout, or stderr; never a terminal, so that nobody draws bars on it."""

    is_terminal = False

    def __init__(
        self, *, stderr: bool = False, highlight: bool = True, soft_wrap: bool = False
    ) -> None:
        self._is_stderr = stderr

    def print(self, message: object = "", *, markup: bool = True) -> None:
        """Write a line."""
        text = plain(str(message)) if markup else str(message)
        print(text, file=sys.stderr if self._is_stderr else sys.stdout, flush=True)

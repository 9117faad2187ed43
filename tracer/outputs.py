"""Files that results go to: refused before the work that makes them, and there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ResourceError, UsageError

_STREAMS = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
_MADE_FROM = ("trace", "policy", "machine", "profile", "path_predictor", "sweep")
"""Formats of ours that others are made from. To write a result over one costs more than a result."""
_LARGEST_READ = 64 * 2**20
"""Bytes of a file that is looked into before it is replaced; ours that matter are smaller."""


def require_place(path: Path | None, *, replaces: str = "") -> Path | None:
    """Give back the path of a file to write, or refuse it while nothing has been done yet. None passes.

    `replaces` names the one format of ours, of those that other files are made from, that it may take the place of.
    Raises UsageError for a file of such another format, ResourceError if the folder cannot be written to.
    """
    if path is None or _is_stream(path):
        return path
    folder = next(place for place in path.absolute().parents if os.path.lexists(place))
    if not folder.is_dir():
        raise ResourceError(f"{path} cannot be written: {folder} is not a folder. Choose another.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ResourceError(f"{path} cannot be written: {folder} is read-only. Choose another.")
    found = _format_of(path)
    if found in _MADE_FROM and found != replaces:
        raise UsageError(
            f"{path} holds expertflow.{found}, which results are made from, so it is not replaced. Choose another "
            "name, or remove it yourself."
        )
    return path


@contextmanager
def taking_place(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` at the end; nothing is left if the block raises.

    A device or a pipe is written to as it is. Of a link, what it points to is replaced. Raises ResourceError if that
    cannot be written.
    """
    if _is_stream(path):
        yield path
        return
    place = Path(os.path.realpath(path))
    partial = place.with_name(place.name + ".partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(place)
    except OSError as error:
        raise ResourceError(
            f"Cannot write {path}: {error.strerror or error}. Free some space or choose another place."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _is_stream(path: Path) -> bool:
    """Whether a path leads to a device or a pipe, which a file must not take the place of."""
    is_special = path.exists() and not path.is_file() and not path.is_dir()
    return is_special or path.absolute().parent in _STREAMS


def _format_of(path: Path) -> str:
    """The middle of `expertflow.policy/1` for a JSON file of ours; nothing for whatever else there is."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_READ:
            return ""
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    named = document.get("format") if isinstance(document, dict) else None
    return named.removeprefix("expertflow.").partition("/")[0] if isinstance(named, str) else ""

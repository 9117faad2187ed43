"""Folders that are not on this machine: `s3://…`, `memory://…` and whatever else fsspec knows. Reading only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from .errors import ResourceError, UsageError

_URL = re.compile(r"^([a-z][a-z0-9+.]+):/{1,3}(.*)$", flags=re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or folder behind fsspec, with what a reader needs of `pathlib.Path`.

    `system` is the fsspec file system, `inner` the path as that system writes it.
    """

    protocol: str
    system: Any
    inner: PurePosixPath

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.inner.name

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return self.inner.suffix

    @property
    def size(self) -> int:
        """Bytes of the file. Raises OSError if it cannot be asked."""
        return int(self.system.size(str(self.inner)))

    def with_name(self, name: str) -> RemotePath:
        """The path beside this one."""
        return RemotePath(self.protocol, self.system, self.inner.with_name(name))

    def is_file(self) -> bool:
        """Whether a file is there."""
        return bool(self.system.isfile(str(self.inner)))

    def is_dir(self) -> bool:
        """Whether a folder is there."""
        return bool(self.system.isdir(str(self.inner)))

    def exists(self) -> bool:
        """Whether anything is there."""
        return bool(self.system.exists(str(self.inner)))

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open for reading bytes; parts of the file are fetched as they are read."""
        return self.system.open(str(self.inner), mode)

    def read_bytes(self) -> bytes:
        """The whole file."""
        return self.system.cat_file(str(self.inner))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding, errors)

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Every file below this folder whose name fits `pattern`."""
        for found in self.system.find(str(self.inner)):
            path = RemotePath(self.protocol, self.system, PurePosixPath(found))
            if path.inner.match(pattern):
                yield path

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """The path as seen from a folder above it."""
        return self.inner.relative_to(other.inner)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.protocol, self.system, self.inner / name)

    def __lt__(self, other: RemotePath) -> bool:
        return self.inner < other.inner

    def __str__(self) -> str:
        return f"{self.protocol}://{str(self.inner).lstrip('/')}"


Location = Path | RemotePath
"""A place that can be read."""


def location_of(path: Path | RemotePath | str) -> Location:
    """The place that `path` names: a local one, or one behind fsspec if it is a URL.

    `Path("s3://bucket/x")` has lost a slash on the way (`s3:/bucket/x`) and is understood all the same;
    `file://` is local. Raises ResourceError if fsspec or the protocol's own package is missing.
    """
    if isinstance(path, RemotePath):
        return path
    match = _URL.match(str(path))
    if not match or Path(path).exists():
        return Path(path)
    protocol, rest = match[1].lower(), match[2]
    if protocol == "file":
        return Path("/", rest)
    return _remote(protocol, rest)


def local_only(path: Path | RemotePath | str, what: str) -> Path:
    """A local path; raises UsageError saying that `what` needs one."""
    found = location_of(path)
    if isinstance(found, RemotePath):
        raise UsageError(
            f"{found} is remote, and {what} needs a folder on this machine. Copy the trace here first."
        )
    return found


def _remote(protocol: str, rest: str) -> RemotePath:
    try:
        import fsspec
    except ModuleNotFoundError:
        raise ResourceError(
            f"Reading {protocol}:// needs fsspec, which is not installed. "
            "Run: pip install 'expertflow-trace[remote]'"
        ) from None
    try:
        system, inner = fsspec.core.url_to_fs(f"{protocol}://{rest}")
    except ImportError as missing:
        raise ResourceError(f"{protocol}:// needs another package: {missing}.") from None
    except ValueError as unknown:
        raise UsageError(
            f"{protocol}:// is not understood: {unknown}. Give a folder, or a URL that fsspec knows, "
            "such as s3://bucket/trace."
        ) from None
    return RemotePath(protocol, system, PurePosixPath(inner))

"""Files that appear whole or not at all."""

from __future__ import annotations

import gzip
import io
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import ResourceError, UsageError
from ..outputs import taking_place


def require_free(out: Path, *, overwrite: bool) -> None:
    """Raise UsageError if something stands at `out` that is not to be replaced."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder; name a file, or remove it yourself.")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists. Choose another name, or pass --overwrite.")


@contextmanager
def whole_file(out: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file to write into, which takes its place at the end of the block; nothing is left if that raises.

    Raises UsageError if `out` exists and `overwrite` is false, ResourceError if the disk is full or not writable.
    """
    require_free(out, overwrite=overwrite)
    with taking_place(out) as place, place.open("wb") as file:
        yield file


@contextmanager
def whole_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes its place at the end of the block; nothing is left if that raises.

    With `overwrite` only a folder of CSV files is replaced. Raises UsageError and ResourceError as `whole_file`.
    """
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists. Choose another name, or pass --overwrite.")
    if out.exists() and not (out.is_dir() and all(p.suffix == ".csv" for p in out.iterdir())):
        raise UsageError(f"{out} holds more than an export, so it is not overwritten.")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        raise UsageError(f"{partial} is left from an export that was killed; remove it.")
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.replace(out)
    except OSError as error:
        raise ResourceError(f"Cannot write {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def written_text(out: Path, lines: Iterable[str], *, overwrite: bool = False) -> int:
    """Write lines as UTF-8, packed by gzip if `out` ends in .gz; returns the bytes of the file."""
    with whole_file(out, overwrite=overwrite) as file:
        if out.suffix == ".gz":
            # No name and no time inside, so that the same run gives the same bytes.
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                _write(packed, lines)
        else:
            _write(file, lines)
    return out.stat().st_size


def _write(file: BinaryIO | gzip.GzipFile, lines: Iterable[str]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="\n", write_through=False)  # type: ignore[arg-type]
    for line in lines:
        text.write(line)
        text.write("\n")
    text.flush()
    text.detach()

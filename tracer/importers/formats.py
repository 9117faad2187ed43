"""Which format a file is of, told by what is in it, and the import of each."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from ..errors import InputError, unknown_name
from ..schema import Manifest
from .llamacpp import EXPERT, EXPERTS, LAYER, read_llamacpp
from .npz import import_npz
from .request import ImportRequest, origin_of, refuse, require_possible
from .responses import Replies
from .sglang import SECTIONS, read_sglang
from .sglang_recorder import Recording, read_recorder
from .shape import imported_shape
from .torch_file import BAD_ARCHIVE
from .untimed import write_untimed
from .vllm import IDS, PROMPT, read_vllm

FORMATS = ("auto", "npz", "vllm", "sglang", "llamacpp")
_START = 1 << 16


def import_file(request: ImportRequest) -> Manifest:
    """Turn a recording of another tool into the trace `request.out`, and return its manifest.

    Raises UsageError for options that cannot be, InputError naming what is wrong in the file. On failure nothing is
    left behind.
    """
    if request.format not in FORMATS:
        raise unknown_name("format", request.format, FORMATS)
    require_possible(request)
    note = origin_of(request.file)
    kind = detect(request.file) if request.format == "auto" else request.format
    if kind == "npz":
        return import_npz(request)
    refuse(request, f"a file of {kind}", "--domain", "--layout")
    warnings: list[str] = []
    found = _read(request, kind, warnings)
    if isinstance(found, Recording):
        routing, experts = found.routing, found.experts
    else:
        routing = found.sequences.limited(request.limit_tokens, warnings).passes(warnings)
        experts = None
    shape = imported_shape(
        request,
        routing,
        warnings,
        experts=experts,
        moe_layers=found.layers,
        num_layers=found.num_layers,
    )
    return write_untimed(
        request.out,
        routing,
        shape=shape,
        notes=[note],
        warnings=warnings,
        extra={"source": request.file.name, "format": kind},
        overwrite=request.overwrite,
    )


def detect(path: Path) -> str:
    """The format of a file, by its contents. Raises InputError if it is none that is known."""
    with path.open("rb") as file:
        start = file.read(_START)
    if start.startswith(b"\x93NUMPY"):
        return "vllm"
    if start.startswith(b"PK"):
        return _of_archive(path)
    if start.startswith(b"\x80"):
        raise InputError(
            f"{path} looks like a bare pickle, which is never read. Save it again with torch 1.6 or later."
        )
    text = start.decode("utf-8", errors="replace").lstrip()
    if text[:1] in ("{", "["):
        return _of_json(path, text)
    first = text.partition("\n")[0].strip().lower()
    names = {cell.strip() for cell in first.split(",")}
    is_pair = len(names) in (1, 2) and all(name.isdigit() for name in names) and "," in first
    if is_pair or names & set(LAYER):
        return "llamacpp"
    raise _unknown(path)


def _of_archive(path: Path) -> str:
    try:
        names = zipfile.ZipFile(path).namelist()
    except BAD_ARCHIVE:
        return "npz"  # whose reader says what is wrong
    if any(name.endswith("/data.pkl") for name in names):
        return "sglang"
    is_vllm = {f"{IDS}.npy", f"{PROMPT}.npy"} & set(names)
    return "vllm" if is_vllm else "npz"


def _of_json(path: Path, text: str) -> str:
    """By the keys that come first: a reply may be too long to read for that alone."""
    line = text.partition("\n")[0]
    try:
        pair = json.loads(line)
    except (ValueError, RecursionError):
        pair = None
    if isinstance(pair, list) and len(pair) == 2 and all(type(value) is int for value in pair):
        return "llamacpp"
    if isinstance(pair, dict) and set(pair) & set(LAYER) and set(pair) & {*EXPERT, *EXPERTS}:
        return "llamacpp"
    whole = path.read_text(encoding="utf-8", errors="replace")
    if any(f'"{section}"' in whole for section in SECTIONS):
        return "sglang"
    if IDS in whole:
        return "vllm"
    raise _unknown(path)


def _unknown(path: Path) -> InputError:
    return InputError(
        f"{path} is of no format that is known. Known: {', '.join(FORMATS[1:])}; say which with --format, "
        "see docs/interop.md."
    )


def _read(request: ImportRequest, kind: str, warnings: list[str]) -> Replies | Recording:
    if kind == "vllm":
        return read_vllm(request, warnings)
    if kind == "llamacpp":
        return read_llamacpp(request, warnings)
    is_dump = zipfile.is_zipfile(request.file)
    return read_recorder(request, warnings) if is_dump else read_sglang(request, warnings)

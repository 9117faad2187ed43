"""What an importer is asked to do, and the options that need no look at the file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ..errors import InputError, UsageError, unknown_name
from ..types import Phase

LAYOUTS = ("auto", "tokens-first", "layers-first")
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRequest:
    """What to import and what the file itself cannot say. Sizes are bytes; 0 means unknown.

    `phase` None: as the file says, or decode where it does not. `layers` and `top_k` are for formats whose
    rows are flat.
    """

    file: Path
    out: Path
    format: str = "auto"
    phase: str | None = None
    experts: int | None = None
    layers: int | None = None
    top_k: int | None = None
    model: str | None = None
    dtype: str | None = None
    expert_bytes: int = 0
    non_expert_bytes: int = 0
    hidden_size: int = 0
    limit_tokens: int | None = None
    domain: str | None = None
    layout: str = "auto"
    overwrite: bool = False


def require_possible(request: ImportRequest) -> None:
    """Raise UsageError for numbers and names that cannot be."""
    counts = {
        "--experts": request.experts,
        "--layers": request.layers,
        "--top-k": request.top_k,
        "--limit-tokens": request.limit_tokens,
    }
    for option, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"{option} must be at least 1, got {value}.")
    if request.hidden_size < 0:
        raise UsageError(f"--hidden-size must be 0 (unknown) or more, got {request.hidden_size}.")
    if request.layout not in LAYOUTS:
        raise unknown_name("layout", request.layout, LAYOUTS)
    if request.phase is not None:
        phase_of(request)


def phase_of(request: ImportRequest) -> Phase:
    """The phase asked for; decode if none was. Raises UsageError for an unknown one."""
    asked = request.phase or "decode"
    for phase in PHASES:
        if phase == asked:
            return phase
    raise unknown_name("phase", asked, PHASES)


def refuse(request: ImportRequest, kind: str, *options: str) -> None:
    """Raise UsageError if an option was given that a file of this `kind` has no use for."""
    given = {
        "--phase": request.phase is not None,
        "--domain": request.domain is not None,
        "--layout": request.layout != "auto",
        "--layers": request.layers is not None,
        "--top-k": request.top_k is not None,
    }
    for option in options:
        if given[option]:
            raise UsageError(f"{option} says nothing about {kind}; leave it out.")


def origin_of(path: Path) -> str:
    """A note that names the file and its hash. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as body:
            digest = hashlib.file_digest(body, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    return f"Imported from {path.name} (sha256 {digest})."

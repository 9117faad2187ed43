"""How functions of this package are compiled: strict floating point, kept on disk under a hash of the sources.

Numba renews a function's cache when its own file changes, but not when one it calls does; the hash makes
the cache of one version of this package invisible to every other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

from ..policy import ranks

F = TypeVar("F", bound=Callable[..., Any])


def _cache_dir() -> Path:
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(str(ranks.__file__))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "expertflow" / f"numba-{digest}"


_CACHE_DIR = _cache_dir()


def compiled(function: F) -> F:
    """Compile without fast-math, as the reference engine's floats must come out; for functions that make no arrays.

    Without Numba's reference counts: they would cost more than all the rest, at every call for every array.
    """
    return _compile(function, makes_arrays=False)


def array_maker(function: F) -> F:
    """The same for functions that make arrays."""
    return _compile(function, makes_arrays=True)


def _compile(function: F, *, makes_arrays: bool) -> F:
    config: Any = numba.config  # pyright knows no setting of it
    before, config.CACHE_DIR = config.CACHE_DIR, str(_CACHE_DIR)
    try:
        njit: Any = numba.njit
        settings = {"cache": True, "nogil": True, "error_model": "numpy"}
        # Inlining is what makes many small functions as quick as one large one: they pass dozens of arrays.
        return njit(**settings, _nrt=makes_arrays, forceinline=not makes_arrays)(function)
    finally:
        config.CACHE_DIR = before

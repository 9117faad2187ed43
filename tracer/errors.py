"""The one exception tree of the toolkit, and the exit code each branch ends a command with.

    ExpertFlowError            1  something failed
    ├── UsageError             2  the call is wrong: an unknown name, an impossible value
    ├── InputError             3  a file is wrong: damaged trace, foreign policy
    │   ├── TraceError
    │   └── PolicyError
    ├── ResourceError          4  something is missing: device, model, memory, disk, extra
    └── NotValidatedError      5  the run finished, the forecast did not hold

Every message says what was wrong, what was got, what is allowed, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExpertFlowError(Exception):
    """Base of every error this toolkit raises on purpose."""

    exit_code = 1


class UsageError(ExpertFlowError):
    """The caller asked for something that does not exist or cannot be."""

    exit_code = 2


class InputError(ExpertFlowError):
    """A file handed to us cannot be used."""

    exit_code = 3


class TraceError(InputError):
    """A trace folder is damaged, incomplete, or of another kind."""


class PolicyError(InputError):
    """A policy file is damaged or does not fit the model."""


class ResourceError(ExpertFlowError):
    """Something the command needs is not on this machine."""

    exit_code = 4


class NotValidatedError(ExpertFlowError):
    """Measured and predicted differ by more than the tolerance."""

    exit_code = 5


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host, where torch has no error of its own for it.

    Nor has a library that meets it amid its work and raises something else: what it was raised from counts as well.
    """
    found: BaseException | None = error
    while found is not None:
        is_memory = (
            isinstance(found, MemoryError)
            or type(found).__name__ == "OutOfMemoryError"
            or (isinstance(found, RuntimeError) and "allocate memory" in str(found).lower())
        )
        if is_memory:
            return True
        found = found.__cause__ or found.__context__
    return False


def unknown_name(what: str, got: str, known: Iterable[str]) -> UsageError:
    """Build the error for a name that is not registered, with the nearest one that is."""
    names = sorted(known)
    near = nearest(got, names)
    hint = f" Did you mean {near!r}?" if near else ""
    return UsageError(f"Unknown {what} {got!r}. Known: {', '.join(names) or 'none'}.{hint}")


def nearest(got: str, names: Iterable[str]) -> str:
    """The name somebody may have meant: the first that goes on as `got` begins, or one that is close; or nothing."""
    by_lower = {name.lower(): name for name in names}
    word = got.strip().lower()
    begun = [lower for lower in by_lower if len(word) > 2 and lower.startswith(word)]
    near = begun[:1] or difflib.get_close_matches(word, by_lower, n=1)
    return by_lower[near[0]] if near else ""

"""Whether layers share slots, in one word."""

from __future__ import annotations

from ..tracer.errors import UsageError, unknown_name

SCOPES = {"layer": "equal", "global": "global"}
"""`layer` is the default: what most published hit rates mean."""


def allocation_of(scope: str) -> str:
    """The allocation a scope stands for. Raises UsageError."""
    if scope not in SCOPES:
        raise unknown_name("scope", scope, list(SCOPES))
    return SCOPES[scope]


def chosen_allocation(allocation: str | None, scope: str | None) -> str:
    """The allocation asked for by name or by scope. Raises UsageError if they contradict each other."""
    if scope is None:
        return allocation or SCOPES["layer"]
    meant = allocation_of(scope)
    if allocation not in (None, meant):
        raise UsageError(
            f"--scope {scope} means --allocation {meant}, but --allocation {allocation} was given; give one of them."
        )
    return meant

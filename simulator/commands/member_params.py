"""Parameters of members on the command line: `--predictor-param horizon=2`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..policy.registry import Registry

CacheParam = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE for the cache; again for more.", metavar="KEY=VALUE"),
]
PredictorParam = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE for the predictor; again for more.", metavar="KEY=VALUE"),
]

RoutingParam = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE for the routing; again for more.", metavar="KEY=VALUE"),
]
SchedulerParam = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE for the scheduler; again for more.", metavar="KEY=VALUE"),
]
SchedulerName = Annotated[
    str, typer.Option(help="Which sequences run together, and whether batches are regrouped.")
]
RoutingName = Annotated[
    str, typer.Option(help="Which experts compute a token; others than as_routed are LOSSY.")
]


def parse_params(family: Registry, name: str, given: Sequence[str] | None) -> dict[str, Any]:
    """Read what was typed for a member: numbers and true or false as such, all else as text.

    Raises UsageError for parameters it does not have, with the nearest one.
    """
    from ...tracer.errors import UsageError, unknown_name

    member = family.get(name)
    known = settable(member)
    found: dict[str, Any] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise UsageError(f"{text!r} is no parameter; write KEY=VALUE, for example horizon=2.")
        if key not in known:
            if not known:
                raise UsageError(f"{family.kind} {name!r} takes no parameters, got {key!r}.")
            raise unknown_name(f"parameter of {family.kind} {name!r}", key, known)
        if key in found:
            raise UsageError(f"Parameter {key!r} of {family.kind} {name!r} was given twice.")
        found[key] = _fitting(value.strip(), known[key], f"{family.kind} {name!r}: {key}")
    return found


def settable(member: type) -> dict[str, Any]:
    """Parameters that people set, with their defaults; what `needs` brings is left out."""
    import inspect

    taught = {*getattr(member, "needs", ()), "copy_s", "expert_s", "token_s"}
    return {
        name: parameter.default
        for name, parameter in inspect.signature(member).parameters.items()
        if name not in taught
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _fitting(text: str, default: Any, what: str) -> Any:
    """The value a text stands for, of the kind of the default."""
    from ...tracer.errors import UsageError

    value = _value(text)
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    if type(default) in kinds:
        allowed = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, allowed) or isinstance(value, bool) != isinstance(default, bool):
            raise UsageError(f"{what} is {kinds[type(default)]}, got {text!r}.")
    return value


def _value(text: str) -> Any:
    import json
    import math

    try:
        found = json.loads(text)
    except ValueError:
        return text
    is_number = isinstance(found, (int, float)) and math.isfinite(found)
    return found if is_number else text

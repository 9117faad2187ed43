"""A space from a TOML file, every key and value checked; what is not said is as in the built-in space."""

from __future__ import annotations

import difflib
import inspect
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..tracer.errors import ExpertFlowError, InputError, UsageError
from ..tracer.types import ModelShape
from .budget import parse_budget
from .hardware import parse_link
from .policy.base import LESSONS
from .policy.registry import FAMILIES, Registry
from .space import Budget, Option, Range, Space, Values
from .sweep_row import OBJECTIVES

METHODS = ("auto", "grid", "optuna")
_PLURAL = {
    "cache": "caches",
    "allocation": "allocations",
    "predictor": "predictors",
    "scheduler": "schedulers",
    "misses": "misses",
    "routing": "routings",
}
_LEARNED = ("popularity", "curves", "layer_times", *LESSONS, "future")
"""Parameters that a trace teaches and nobody types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How a space is walked. `trials` are distinct points that Optuna may try."""

    method: str = "auto"
    trials: int = 200
    objectives: tuple[str, ...] = ("tokens_per_s", "peak_device_bytes")


def read_space(path: Path, shape: ModelShape, builtin: Space) -> tuple[Space, Search]:
    """Read a space for models of `shape`. Raises InputError naming the file and the key."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as cause:
        raise InputError(f"{path} is not readable TOML: {cause}.") from None
    with _named(str(path)):
        _known_keys(document, ("space", "search"))
        space = _space(_table(document.get("space", {}), "space"), shape, builtin)
        search = _search(_table(document.get("search", {}), "search"))
        if search.method == "grid" and space.size() is None:
            raise InputError(
                '[search] method = "grid" cannot walk a continuous range; list the values, or choose '
                '"auto" or "optuna".'
            )
        if search.method == "grid" and (space.size() or 0) > MAX_LISTED:
            raise InputError(
                f"the grid has {space.size():,} points, more than {MAX_LISTED:,}; list fewer values, or "
                'choose "auto" or "optuna".'
            )
    return space, search


MAX_LISTED = 200_000
"""Points of a grid that are listed in memory on request."""


def parse_budgets(texts: Sequence[str], shape: ModelShape) -> tuple[Budget, ...]:
    """Budgets as typed. Raises UsageError."""
    return tuple(Budget(text, parse_budget(text, shape)) for text in texts)


def parse_links(texts: Sequence[str]) -> tuple[str, ...]:
    """Links by their names or numbers. Raises UsageError."""
    return tuple(parse_link(text).text for text in texts)


def _space(table: Mapping[str, Any], shape: ModelShape, builtin: Space) -> Space:
    _known_keys(table, ("budgets", "links", "bounds", *_PLURAL.values()), "[space] ")
    members = dict(builtin.members)
    for family in FAMILIES:
        key = _PLURAL[family.kind]
        if key in table:
            with _named(f"[space] {key}"):
                members[family.kind] = tuple(_option(e, family) for e in _list(table[key]))
    rivals = () if _PLURAL["predictor"] in table else builtin.rivals
    answers = () if _PLURAL["misses"] in table else builtin.answers
    space = replace(builtin, members=members, rivals=rivals, answers=answers)
    if "budgets" in table:
        with _named("[space] budgets"):
            space = replace(space, budgets=_budgets(table["budgets"], shape))
    if "links" in table:
        with _named("[space] links"):
            space = replace(space, links=parse_links([_text(e) for e in _list(table["links"])]))
    if "bounds" in table:
        with _named("[space] bounds"):
            space = replace(space, bounds=_bool(table["bounds"]))
    return space


def _search(table: Mapping[str, Any]) -> Search:
    _known_keys(table, ("method", "trials", "objectives"), "[search] ")
    search = Search()
    if "method" in table:
        with _named("[search] method"):
            search = replace(search, method=_one_of(_text(table["method"]), METHODS))
    if "trials" in table:
        with _named("[search] trials"):
            search = replace(search, trials=_positive(table["trials"]))
    if "objectives" in table:
        with _named("[search] objectives"):
            names = [_one_of(_text(e), OBJECTIVES) for e in _list(table["objectives"])]
            if len(set(names)) < len(names):
                raise InputError("an objective is listed twice.")
            search = replace(search, objectives=tuple(names))
    return search


def _budgets(value: Any, shape: ModelShape) -> tuple[Budget, ...] | Range:
    if isinstance(value, Mapping):
        low, high = (_budget(end, shape) for end in _ends(value))
        if low.slots >= high.slots:
            raise _not_rising(low.text, high.text)
        return Range(low.slots, high.slots)
    return tuple(_budget(entry, shape) for entry in _list(value))


def _budget(value: Any, shape: ModelShape) -> Budget:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = f"{value:.10f}".rstrip("0").rstrip(".")
    else:
        text = _text(value)
    return Budget(text, parse_budget(text, shape))


def _option(entry: Any, family: Registry) -> Option:
    if isinstance(entry, str):
        family.get(entry)
        return Option(entry)
    if not isinstance(entry, Mapping):
        raise InputError(f'expected a name or {{name = "…", …}}, got {entry!r}.')
    if "name" not in entry:
        raise InputError(f"the entry {dict(entry)!r} has no name.")
    name = _text(entry["name"])
    params = {key: value for key, value in entry.items() if key != "name"}
    with _named(name):
        allowed = _parameters(family.get(name))
        if not allowed and params:
            raise InputError(f"unknown parameter {next(iter(params))!r}: {name} takes none.")
        _known_keys(params, allowed, what="parameter")
        return Option(name, {key: _values(key, value) for key, value in params.items()})


def _parameters(member: type) -> tuple[str, ...]:
    found = inspect.signature(member).parameters
    return tuple(name for name in found if name not in _LEARNED)


def _values(key: str, value: Any) -> Values:
    with _named(key):
        if isinstance(value, Mapping):
            return Range(*_rising(*(_number(end) for end in _ends(value))))
        if isinstance(value, list):
            return tuple(_scalar(entry) for entry in _list(value))
        return (_scalar(value),)


def _ends(table: Mapping[str, Any]) -> tuple[Any, Any]:
    _known_keys(table, ("low", "high"))
    if set(table) != {"low", "high"}:
        raise InputError(f"a range has both low and high, got {dict(table)!r}.")
    return table["low"], table["high"]


def _rising(low: float, high: float) -> tuple[float, float]:
    if low >= high:
        raise _not_rising(low, high)
    return low, high


def _not_rising(low: object, high: object) -> InputError:
    return InputError(f"a range rises from low to high, got {low} to {high}.")


def _known_keys(
    table: Mapping[str, Any], allowed: Sequence[str], where: str = "", what: str = "key"
) -> None:
    for key in table:
        if key not in allowed:
            raise InputError(f"{where}unknown {what} {key!r}; {_allowed(key, allowed)}")


def _one_of(value: str, allowed: Sequence[str] | Mapping[str, Any]) -> str:
    if value not in allowed:
        raise InputError(f"got {value!r}; {_allowed(value, tuple(allowed))}")
    return value


def _allowed(got: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(got, allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"allowed: {', '.join(allowed)}.{hint}"


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"[{where}] is a table, got {value!r}.")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"expected a list, got {value!r}.")
    if not value:
        raise InputError("the list is empty; leave the key out for the built-in values.")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"expected text, got {value!r}.")
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"expected true or false, got {value!r}.")
    return value


def _positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"expected a whole number of at least 1, got {value!r}.")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"expected a number, got {value!r}.")
    return value


def _scalar(value: Any) -> Any:
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return _number(value)
    raise InputError(f"expected a number, text, true or false, got {value!r}.")


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Put the place before whatever is wrong inside; in a file all of it is the file's fault."""
    try:
        yield
    except ExpertFlowError as error:
        if not isinstance(error, (InputError, UsageError)):
            raise
        raise InputError(f"{where}: {error}") from None

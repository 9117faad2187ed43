"""Frozen records to JSON and back, strictly.

Files that people edit or send each other (manifest, policy, result) are plain dataclasses here.
Decoding checks every field and names the one that is wrong. The standard library is enough for that,
and keeps the runtime importable on machines where only torch, transformers and pyarrow exist
(docs/adr/0004).
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError
from .outputs import taking_place

T = TypeVar("T")


def to_json(record: Any) -> Any:
    """Turn a dataclass (and what it holds) into plain JSON values."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_json(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, Mapping):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [to_json(item) for item in record]
    if isinstance(record, Path):
        return str(record)
    return record


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """Build a `kind` from plain JSON values.

    Raises InputError naming the field for unknown, missing or wrongly typed values.
    """
    where = where or kind.__name__
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected an object, got {type(value).__name__}.")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise InputError(f"{where}: unknown field {unknown[0]!r}; allowed: {', '.join(fields)}.")
    kwargs: dict[str, Any] = {}
    for name, field in fields.items():
        if name in value:
            kwargs[name] = _decode(hints[name], value[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: field {name!r} is missing.")
    return kind(**kwargs)


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        if value not in args:
            raise InputError(f"{where}: got {value!r}; allowed: {', '.join(map(repr, args))}.")
        return value
    if origin in (typing.Union, types.UnionType):
        return _decode_union(args, value, where)
    if origin is tuple:
        return _decode_tuple(args, value, where)
    if origin in (dict, Mapping) or origin is typing.get_origin(Mapping[str, int]):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: expected an object, got {type(value).__name__}.")
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, where)
    return _decode_scalar(hint, value, where)


def _decode_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors: list[str] = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _decode(option, value, where)
        except InputError as error:
            errors.append(str(error))
    raise InputError(errors[0])


def _decode_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: expected a list, got {type(value).__name__}.")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(args) != len(value):
        raise InputError(f"{where}: expected {len(args)} items, got {len(value)}.")
    return tuple(
        _decode(arg, item, f"{where}[{i}]")
        for i, (arg, item) in enumerate(zip(args, value, strict=True))
    )


def _decode_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_wrong = not isinstance(value, hint) or (hint is not bool and isinstance(value, bool))
    if is_wrong:
        raise InputError(f"{where}: expected {hint.__name__}, got {value!r}.")
    return value


def read_json(path: Path, error: type[InputError] = InputError) -> Any:
    """Read a JSON file; raises `error` naming the path when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist.") from None
    except IsADirectoryError:
        raise error(f"{path} is a folder, and a JSON file is expected.") from None
    except (OSError, UnicodeDecodeError, ValueError) as cause:
        raise error(f"{path} is not readable JSON: {cause}.") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, never a half. Raises ResourceError."""
    text = json.dumps(to_json(value), indent=2) + "\n"
    with taking_place(path) as place:
        place.write_text(text, encoding="utf-8")

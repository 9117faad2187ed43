"""Stands in for Typer: a command's signature becomes an argument parser."""

from __future__ import annotations

import argparse
import inspect
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Exit(SystemExit):
    """End with this code."""


class Context:
    """Does not know which options were said."""

    def get_parameter_source(self, name: str) -> None:
        """Where a value came from: not known."""
        del name


class _Parameter:
    def __init__(self, *names: Any, **settings: Any) -> None:
        self.names = [name for name in names if isinstance(name, str)]
        self.help = settings.get("help", "")


class _Option(_Parameter):
    pass


class _Argument(_Parameter):
    pass


Option, Argument = _Option, _Argument


def echo(text: str = "", *, nl: bool = True) -> None:
    """Write to stdout."""
    sys.stdout.write(text + ("\n" if nl else ""))


class Typer:
    """Holds commands by name; called with arguments, runs the one they begin with."""

    def __init__(self, *, help: str = "", **settings: Any) -> None:
        self._help = help
        self._commands: dict[str, tuple[Callable[..., Any], str]] = {}

    def callback(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Options before the command are somebody else's business."""
        return lambda function: function

    def command(self, name: str, *, help: str = "") -> Callable[..., Any]:
        """Add a command."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self._commands[name] = function, help
            return function

        return add

    def __call__(self, arguments: Sequence[str], *, prog_name: str = "") -> None:
        """Run the command, and exit with its code."""
        words = [word for word in arguments if word not in ("-h", "--help")]
        name = words[0] if words else ""
        if name not in self._commands:
            lines = [f"  {known:<16} {words}" for known, (_, words) in self._commands.items()]
            echo("\n".join([self._help, "", "Commands:", *lines]))
            raise SystemExit(0)
        function, _ = self._commands[name]
        parser, names = _parser(function, f"{prog_name} {name}")
        given = vars(parser.parse_args(list(arguments)[1:]))
        values: dict[str, Any] = {name: given[name] for name in names}
        values |= {name: Context() for name in _contexts(function)}
        function(**values)
        raise SystemExit(0)


def _parser(
    function: Callable[..., Any], program: str
) -> tuple[argparse.ArgumentParser, list[str]]:
    about = (inspect.getdoc(function) or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=program, description=about, allow_abbrev=False)
    hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    signature = inspect.signature(inspect.unwrap(function))
    names = [name for name in signature.parameters if name not in _contexts(function)]
    for name in names:
        parameter = signature.parameters[name]
        hint, extra = hints[name], None
        if typing.get_origin(hint) is typing.Annotated:
            hint, extra = typing.get_args(hint)[:2]
        _add(parser, name, hint, extra or _Option(), parameter.default)
    return parser, names


def _contexts(function: Callable[..., Any]) -> list[str]:
    """Parameters that are not said: they tell of what was."""
    hints = typing.get_type_hints(inspect.unwrap(function))
    return [name for name, hint in hints.items() if hint is Context]


def _add(
    parser: argparse.ArgumentParser, name: str, hint: Any, extra: _Parameter, default: Any
) -> None:
    is_required = default is inspect.Parameter.empty
    kind, is_list = _kind(hint)
    words = extra.help.replace("%", "%%")
    more: dict[str, Any] = {} if is_required else {"default": default}
    if isinstance(extra, _Argument):
        count = {"nargs": "*" if is_list else "?"} if not is_required or is_list else {}
        parser.add_argument(name, type=kind, help=words, **count, **more)
        return
    flags = extra.names or ["--" + name.replace("_", "-")]
    if kind is bool:
        action = argparse.BooleanOptionalAction if not extra.names else "store_true"
        parser.add_argument(*flags, dest=name, action=action, help=words, **more)
        return
    action = "append" if is_list else "store"
    parser.add_argument(
        *flags, dest=name, type=kind, action=action, required=is_required, help=words, **more
    )


def _kind(hint: Any) -> tuple[Callable[[str], Any], bool]:
    """What a value is made with, and whether there may be several."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return (hint if hint in (str, int, float, bool, Path) else str), False

"""The command `expertflow-trace`: finds the subcommand asked for, loads that one, runs it.

Subcommands are entry points of the group `expertflow.commands`, so packages above this one and
third parties add theirs without being imported here. Help reads their docstrings from source.
"""

from __future__ import annotations

import ast
import errno
import functools
import importlib
import importlib.util
import inspect
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .errors import ExpertFlowError, ResourceError, is_out_of_memory, unknown_name

GROUP = "expertflow.commands"
PROGRAM = "expertflow-trace"
_DEBUG = "EXPERTFLOW_DEBUG"
_ABOUT = (
    "Trace, simulate, tune, deploy and verify expert offloading for mixture-of-experts models.\n\n"
    "Run `expertflow-trace COMMAND --help` for one command."
)
_WRONG_PATH = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
_EXTRA_OF = {
    "torch": "model",
    "transformers": "model",
    "safetensors": "model",
    "psutil": "model",
    "streamlit": "dashboard",
    "plotly": "dashboard",
    "numba": "fast",
    "optuna": "sweep",
    "ray": "ray",
    "accelerate": "accelerate",
    "prometheus_client": "metrics",
}


class _Interrupted(Exception):
    """Ctrl-C, carried past Typer, whose releases differ in what they make of it."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code (see `errors.py`)."""
    arguments = list(sys.argv[1:] if args is None else args)
    is_debug = os.environ.get(_DEBUG, "") not in ("", "0")
    if "--debug" in arguments:
        arguments.remove("--debug")
        is_debug = True
    _ready_streams()
    sys.exit(_guarded(lambda: _dispatch(arguments), is_debug))


def _ready_streams() -> None:
    """Make the streams take whatever is printed: none may be missing, and no letter may end a command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller, as in `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("COLUMNS") == "0":  # a window of no width, in which Rich would show nothing
        del os.environ["COLUMNS"]


def commands() -> dict[str, str]:
    """Return every known subcommand and its target, `module:function`."""
    found = _declared_in_tree()
    found.update({entry.name: entry.value for entry in entry_points(group=GROUP)})
    return found


def one_line_help(target: str) -> str:
    """Return the first line of the docstring of `module:function`, without importing it."""
    module, _, function = target.partition(":")
    source = _source_of(module)
    if source is None:
        return f"(not available: {module} is not installed)"
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return f"(not available: {module} cannot be read)"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return _first_line(ast.get_docstring(node) or ast.get_docstring(tree))
    return _first_line(ast.get_docstring(tree))


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else ""
    if first == "--version":
        from .probe import toolkit_version

        sys.stdout.write(f"{PROGRAM} {toolkit_version()}\n")
        return 0
    targets = commands()
    if not first or first.startswith("-"):
        if not first:
            _listing(targets, ["--help"])
            return 2
        return _listing(targets, ["--help"] if first in ("-h", "--help") else arguments)
    if first not in targets:
        raise unknown_name("command", first, targets)
    return _run(_load(first, targets[first]), first, arguments)


def _listing(targets: dict[str, str], arguments: list[str]) -> int:
    """Let Typer show the help of all commands, from stand-ins that know their first line only."""

    def stand_in() -> None: ...

    app = _app()
    for name, target in targets.items():
        app.command(name, help=one_line_help(target))(stand_in)
    return _invoke(app, arguments)


def _run(command: Callable[..., Any], name: str, arguments: list[str]) -> int:
    app = _app()
    app.command(name, help=_paragraphs(command))(_carrying_interrupts(command))
    return _invoke(app, arguments)


def _paragraphs(command: Callable[..., Any]) -> str:
    """A docstring whose lines are as long as its paragraphs: Typer would keep the breaks of the source."""
    parts = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)


def _app() -> Any:
    import typer

    app = typer.Typer(
        name=PROGRAM,
        help=_ABOUT,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        version: bool = typer.Option(False, "--version", help="Show the version and exit."),
        debug: bool = typer.Option(
            False, "--debug", help=f"Show tracebacks of errors (also {_DEBUG}=1)."
        ),
    ) -> None: ...

    options.__doc__ = _ABOUT
    return app


def _invoke(app: Any, arguments: list[str]) -> int:
    try:
        app(arguments, prog_name=PROGRAM)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # Rich and Click make an error of it
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _carrying_interrupts(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def carried(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            raise _Interrupted from stop

    return carried


def _load(name: str, target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _EXTRA_OF:
            raise _lacking(missing) from error
        raise ResourceError(f"Command {name!r} cannot be loaded: {error}.") from error


def _lacking(library: str) -> ResourceError:
    extra = _EXTRA_OF[library]
    return ResourceError(
        f"This command needs {library}, which is not installed. "
        f"Run: pip install '{PROGRAM}[{extra}]'"
    )


def _guarded(work: Callable[[], int], is_debug: bool) -> int:
    """Run `work` and turn what it raises into a line on stderr and an exit code."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except (KeyboardInterrupt, _Interrupted):
        sys.stderr.write("Interrupted.\n")
        return 130
    except BrokenPipeError:
        # The reader has enough. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if _is_interrupt(error):
            sys.stderr.write("Interrupted.\n")
            return 130
        if is_debug:
            traceback.print_exc()
        message, code = _explain(error, is_debug)
        from .console import print_error

        with suppress(OSError):  # nobody may be there to read it; the code still says it
            print_error(message)
        return code


def _is_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an error: Python makes another of it while classes are being made."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (KeyboardInterrupt, _Interrupted)):
            return True
        found = found.__cause__
    return False


def _explain(error: Exception, is_debug: bool) -> tuple[str, int]:
    if isinstance(error, ExpertFlowError):
        return str(error), error.exit_code
    if is_out_of_memory(error):
        return "Out of memory. Use a smaller batch, fewer prompts or a smaller model.", 4
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {error}. Free some space or choose another --out.", 4
    if isinstance(error, FileNotFoundError) and not error.filename and _is_nowhere():
        return "The current folder no longer exists. Change into one that does.", 4
    if isinstance(error, _WRONG_PATH) and error.filename:
        return f"{error.filename} cannot be used: {error.strerror}.", 3
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRA_OF:
        return str(_lacking(error.name)), 4
    words = (
        f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else '(no message)'}"
    )
    hint = "" if is_debug else f" This is a bug; {_DEBUG}=1 or --debug shows where."
    return f"{words}{hint}", 1


def _is_nowhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _declared_in_tree() -> dict[str, str]:
    """Commands named by pyproject.toml beside the packages, when they run uninstalled."""
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    if not pyproject.is_file():
        return {}
    import tomllib

    project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
    return dict(project.get("entry-points", {}).get(GROUP, {}))


def _source_of(module: str) -> Path | None:
    # By hand where that works, since find_spec on a dotted name imports its parents.
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for root in spec.submodule_search_locations or ():
        place = Path(root, *rest)
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path
    # An editable install maps packages by a hook instead of folders: ask it, parents and all.
    try:
        found = importlib.util.find_spec(module)
    except ImportError:
        return None
    return Path(found.origin) if found and found.origin else None


def _first_line(text: str | None) -> str:
    return text.strip().splitlines()[0] if text and text.strip() else ""

"""When requests arrive and how long they are: drawn, spaced evenly, one after another, or from a recorded file."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..tracer.errors import InputError, UsageError, unknown_name

FORMS = "poisson:RATE (requests/s), every:SECONDS, closed:USERS, or a file (.csv, .jsonl, or .gz of them)"
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. Seconds count from the first; lengths are None where the source does not say."""

    time_s: float
    prompt_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Requests in order of arrival.

    `users` is set for a closed loop: so many requests are in flight, the next arrives when one is finished, and the
    times in `requests` mean nothing.
    """

    requests: tuple[Arrival, ...]
    description: str
    users: int | None = None

    @property
    def has_lengths(self) -> bool:
        """Whether the source says how long requests are."""
        return all(request.prompt_tokens is not None for request in self.requests)


def read_arrivals(text: str, *, limit: int | None, seed: int = 0, speed: float = 1.0) -> Arrivals:
    """Understand one of FORMS: at most `limit` requests, `speed` times as fast as it says.

    Only a file can do without a limit. Raises UsageError for a form, number or limit that cannot be, InputError
    for a file that is missing or wrong.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"The number of requests must be at least 1, got {limit}.")
    if not (math.isfinite(speed) and speed > 0):
        raise UsageError(f"The arrival speed must be above 0, got {speed:g}; 2 is twice as fast.")
    faster = "" if speed == 1 else f", {speed:g}× as fast"
    if (reader := _reader(text)) is not None:
        requests = sorted(reader(Path(text)), key=lambda request: request.time_s)
        if not requests:
            raise InputError(f"{text} holds no requests.")
        first_s = requests[0].time_s
        times = [(request.time_s - first_s) / speed for request in requests[:limit]]
        return Arrivals(
            requests=tuple(
                Arrival(time_s, request.prompt_tokens, request.output_tokens)
                for time_s, request in zip(times, requests, strict=False)
            ),
            description=f"{Path(text).name}{faster}",
        )
    form, _, number = text.partition(":")
    if form not in ("poisson", "every", "closed"):
        if ":" in text:
            raise unknown_name("form of arrivals", form, ("poisson", "every", "closed"))
        raise UsageError(f"Arrivals {text!r} are not understood; expected {FORMS}.")
    if limit is None:
        raise UsageError(f"Arrivals {text!r} go on for ever; say how many requests to run.")
    if form == "closed":
        users = _users(number)
        return Arrivals(
            requests=(Arrival(0.0),) * limit, description=f"closed loop of {users}", users=users
        )
    value = _positive(form, number)
    if form == "poisson":
        gaps = np.random.default_rng(seed).exponential(1 / value, limit - 1)
        times = np.concatenate(([0.0], np.cumsum(gaps)))
        description = f"Poisson, {value:g}/s, seed {seed}{faster}"
    else:
        times = np.arange(limit) * value
        description = f"one every {value:g} s{faster}"
    requests = tuple(Arrival(time_s) for time_s in (times / speed).tolist())
    return Arrivals(requests=requests, description=description)


def queue_times(path: Path) -> list[float]:
    """The `arrival_s` of every line of a queue, a .jsonl file of prompts with times, in the file's order.

    Raises InputError for a file that is none.
    """
    reader = _reader(str(path))
    found = list(reader(path)) if reader is not None else []
    if not found or any(request.prompt_tokens is not None for request in found):
        raise InputError(
            f"{path} is no queue: expected a .jsonl file with `arrival_s`, in seconds, in every line."
        )
    return [request.time_s for request in found]


def _positive(form: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        unit = "requests/s" if form == "poisson" else "seconds"
        raise UsageError(f"{form}: needs {unit} above 0, got {text!r}; for example {form}:2.5.")
    return value


def _users(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise UsageError(
            f"closed: needs a whole number of users, at least 1, got {text!r}; for example closed:8."
        )
    return int(text)


def _reader(text: str) -> Callable[[Path], Iterator[Arrival]] | None:
    name = text.lower().removesuffix(".gz")
    return _azure if name.endswith(".csv") else _json_lines if name.endswith(".jsonl") else None


def _lines(path: Path) -> Iterator[str]:
    try:
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rt", encoding="utf-8", newline="") as body:
            yield from body
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged, or not the text it should be"
        raise InputError(f"{path} cannot be read: {reason}.") from None


def _azure(path: Path) -> Iterator[Arrival]:
    """Rows of the Azure LLM inference traces."""
    rows = csv.DictReader(_lines(path))
    found = tuple(rows.fieldnames or ())
    if missing := [name for name in _AZURE if name not in found]:
        raise InputError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(found) or 'none'}. "
            f"Expected the columns of an Azure LLM inference trace: {', '.join(_AZURE)}."
        )
    start: datetime | None = None
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        try:
            moment = datetime.fromisoformat(row["TIMESTAMP"])
            start = start or moment
            time_s = (moment - start).total_seconds()
        except (TypeError, ValueError):
            raise InputError(
                f"{where}: TIMESTAMP is {row['TIMESTAMP']!r}; expected a date and time such as "
                "2023-11-16 18:17:03.97996, with or without a time zone as in the first row."
            ) from None
        yield Arrival(time_s, *(_length(where, name, row[name]) for name in _AZURE[1:]))


def _json_lines(path: Path) -> Iterator[Arrival]:
    """Lines of the Mooncake traces, or of a queue: prompts, each with its `arrival_s`."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _record(where, line)
        if "arrival_s" in row:
            yield Arrival(_seconds(where, row["arrival_s"]))
            continue
        moment = row["timestamp"]
        if not isinstance(moment, (int, float)) or not math.isfinite(moment):
            raise InputError(f"{where}: timestamp is {moment!r}; expected milliseconds.")
        yield Arrival(moment / 1e3, *(_length(where, name, row[name]) for name in _MOONCAKE[1:]))


def _record(where: str, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object; expected one with {', '.join(_MOONCAKE)}.")
    missing = [name for name in _MOONCAKE if name not in row]
    if missing and "arrival_s" not in row:
        raise InputError(
            f"{where} has no {', '.join(missing)}; expected a line of a Mooncake trace with "
            f"{', '.join(_MOONCAKE)}, or `arrival_s`."
        )
    return row


def _seconds(where: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise InputError(f"{where}: arrival_s is {value!r}; expected seconds.")
    return float(value)


def _length(where: str, name: str, value: object) -> int:
    try:
        length = int(value) if isinstance(value, (str, int)) else 0
    except ValueError:
        length = 0
    if length < 1:
        raise InputError(f"{where}: {name} is {value!r}; expected a whole number of 1 or more.")
    return length

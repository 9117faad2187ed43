"""Numbers and origins in words: one way to write a size, a time, a rate and where it comes from."""

from __future__ import annotations

import math
import re
from typing import Final

from ..simulator.result import Check
from ..tracer.types import Origin

EMULATED: Final = (
    "EMULATED link: every copy is really made, then the rest of the time that a slower, named link "
    "would need is waited out. The waits are real; the hardware they stand for is not here."
)

_ORIGINS: Final[dict[Origin, str]] = {
    "measured": "measured on this machine",
    "emulated": "EMULATED",
    "declared": "declared from a data sheet, not measured",
}
_UNKNOWN: Final = "–"
_RATE_UNITS: Final = frozenset({"rate", "share", "point", "points", "pp", "absolute", "1", ""})


def origin(value: Origin) -> str:
    """Where a link's numbers come from, spelled out."""
    return _ORIGINS[value]


def size(num_bytes: float) -> str:
    """Bytes with a binary unit."""
    if not math.isfinite(num_bytes):
        return _UNKNOWN
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.4g} {unit}"
    return f"{num_bytes:.0f} B"


def seconds(value: float) -> str:
    """A time with the unit that keeps it readable."""
    if not math.isfinite(value):
        return _UNKNOWN
    if value == 0 or abs(value) >= 1:
        return f"{value:.3g} s"
    if abs(value) >= 1e-3:
        return f"{value * 1e3:.3g} ms"
    return f"{value * 1e6:.3g} µs"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{share * 100:.{digits}f} %" if math.isfinite(share) else _UNKNOWN


def rate(value: float) -> str:
    """Tokens per second, three digits."""
    if not math.isfinite(value):
        return _UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def times(new: float, old: float) -> str:
    """How many times the old value the new one is."""
    return f"{new / old:.2f}×" if old > 0 and math.isfinite(new) else _UNKNOWN


def is_absolute(check: Check) -> bool:
    """Whether gap and tolerance of a check are differences (of rates), not relative numbers.

    The numbers decide, because they cannot be misspelled; the unit's name breaks the tie.
    """
    difference = check.predicted - check.measured
    relative = difference / check.measured if check.measured else math.inf
    off_absolute, off_relative = abs(check.gap - difference), abs(check.gap - relative)
    if math.isclose(off_absolute, off_relative, rel_tol=1e-6, abs_tol=1e-12):
        return is_rate(check)
    return off_absolute < off_relative


def is_rate(check: Check) -> bool:
    """Whether a check compares shares between 0 and 1."""
    named = "rate" in check.quantity.lower() or "share" in check.quantity.lower()
    bounded = max(abs(check.predicted), abs(check.measured)) <= 1
    return bounded and (named or check.unit.lower() in _RATE_UNITS)


def amount(check: Check, value: float) -> str:
    """A predicted or measured value of a check, with its unit."""
    unit = check.unit.lower()
    name = check.quantity.lower()
    if is_rate(check):
        return percent(value)
    if unit in {"b", "bytes"} or (unit in {"relative", "%"} and ("byte" in name or "mem" in name)):
        return size(value)
    if unit in {"s", "seconds"} or (name.endswith("_s") and "per_s" not in name):
        return seconds(value)
    plain_unit = "" if unit in _RATE_UNITS | {"relative", "%"} else f" {check.unit}"
    return f"{rate(value)}{plain_unit}"


def gap(check: Check, value: float, *, sign: bool = True) -> str:
    """A gap, tolerance or noise of a check: percent if relative, points if absolute."""
    if not math.isfinite(value):
        return _UNKNOWN
    number = f"{value * 100:+.1f}" if sign else f"{value * 100:.1f}"
    return f"{number} points" if is_absolute(check) else f"{number} %"


def is_outside(check: Check) -> bool:
    """Whether a check counts against a verdict."""
    return check.is_judged and not check.passed


def miss(check: Check) -> str:
    """A check that failed, in words."""
    side = "high" if check.gap > 0 else "low"
    return f"{label(check.quantity)} predicted {gap(check, abs(check.gap), sign=False)} too {side}"


def label(name: str) -> str:
    """A field name as a person would write it."""
    text = name.replace("_", " ").replace(" per s", "/s").strip()
    text = text.replace("ttft", "time to first token").replace("tpot", "time per token")
    return text.removesuffix(" s")


def plain(text: str) -> str:
    """Text that may hold anything, made safe to stand inside Markdown."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!$~|<>:])", r"\\\1", " ".join(text.split()))


def size_unit(num_bytes: float) -> tuple[float, str]:
    """Factor and name of the binary unit that keeps numbers up to this size readable."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= factor:
            return 1 / factor, unit
    return 1.0, "B"

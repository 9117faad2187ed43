"""Quantities as people write them: `6GiB`, `8GB/s+10us`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import UsageError
from .types import Origin

_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
_SIZE = re.compile(rf"^{_NUMBER}\s*({'|'.join(_BYTES)})$")
_DURATION = re.compile(rf"^{_NUMBER}\s*({'|'.join(_SECONDS)})$")
_LINK = re.compile(
    rf"^{_NUMBER}\s*({'|'.join(_BYTES)})/s(?:\+{_NUMBER}\s*({'|'.join(_SECONDS)}))?$"
)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `6GiB` or `512MB`. Raises UsageError."""
    match = _SIZE.match(text.strip())
    if not match or not math.isfinite(float(match[1])):
        raise UsageError(
            f"Size {text!r} is not understood; write a number and one of {', '.join(_BYTES)}, "
            "for example 6GiB."
        )
    return int(float(match[1]) * _BYTES[match[2]])


def parse_seconds(text: str) -> float:
    """Seconds of a duration such as `200us` or `1.5ms`; 0 needs no unit. Raises UsageError."""
    match = _DURATION.match(text.strip())
    if match and math.isfinite(float(match[1])):
        return float(match[1]) * _SECONDS[match[2]]
    if text.strip() == "0":
        return 0.0
    raise UsageError(
        f"Duration {text!r} is not understood; write a number and one of {', '.join(_SECONDS)}, "
        "for example 200us."
    )


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A link by bandwidth and per-copy latency, as in `8GB/s+10us`.

    A measured one also knows how many times as long a copy takes beside compute; `note` says where it is from.
    """

    text: str
    bandwidth_Bps: float
    latency_s: float
    origin: Origin = "declared"
    busy_factor: float = 1.0
    note: str = ""

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """Read a link. Raises UsageError."""
        match = _LINK.match(text.strip())
        bandwidth = float(match[1]) * _BYTES[match[2]] if match else 0.0
        latency = float(match[3]) * _SECONDS[match[4]] if match and match[3] else 0.0
        # Beyond these nothing is a link, and sums of times stop being numbers.
        if not 1.0 <= bandwidth < math.inf or latency > 3600.0:
            raise UsageError(
                f"Link {text!r} is not understood; write BANDWIDTH/s (at least 1B/s), and after a + the latency of "
                "one copy if there is any (at most an hour), for example 8GB/s+10us."
            )
        return cls(text.strip(), bandwidth, latency)

    def copy_s(self, num_bytes: float) -> float:
        """Seconds of one copy."""
        return self.latency_s + num_bytes / self.bandwidth_Bps


def format_bytes(num_bytes: float) -> str:
    """A size for people, in decimal units."""
    for unit in ("TB", "GB", "MB", "KB"):
        if abs(num_bytes) >= _BYTES[unit]:
            return f"{_short(num_bytes / _BYTES[unit])} {unit}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """A duration for people."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= scale:
            return f"{_short(seconds / scale)} {unit}"
    return f"{_short(seconds / 1e-9)} ns" if seconds else "0 s"


def _short(number: float) -> str:
    # Three digits, but never 1e+03.
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"

"""Where profiles are kept: any file, or by name in the user's own folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import InputError, UsageError, unknown_name
from ..quantities import LinkSpec, format_bytes, format_seconds
from ..records import from_json, read_json, write_json
from .document import PROFILE_FORMAT, ProfileFile
from .fit import POOR_FIT

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
HOME = "EXPERTFLOW_HOME"
"""Environment variable that moves the user's folder."""


def profiles_folder() -> Path:
    """The folder of named profiles: under $EXPERTFLOW_HOME, else under the user's data folder."""
    home = os.environ.get(HOME)
    if home:
        return Path(home) / "profiles"
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "expertflow" / "profiles"


def named_path(name: str) -> Path:
    """The file of a named profile. Raises UsageError for names that are no file names."""
    if not _NAME.fullmatch(name) or name.endswith(".json"):
        raise UsageError(
            f"Profile name {name!r} is not possible; use letters, digits, '.', '_' and '-', and leave "
            "'.json' out."
        )
    return profiles_folder() / f"{name}.json"


def saved_names() -> tuple[str, ...]:
    """Names of the profiles in the user's folder."""
    return tuple(sorted(path.stem for path in profiles_folder().glob("*.json")))


def read_profile(path: Path) -> ProfileFile:
    """Read and check a profile. Raises InputError naming the file."""
    document = read_json(path)
    found = document.get("format") if isinstance(document, dict) else None
    if found != PROFILE_FORMAT:
        raise InputError(
            f"{path} is not a profile: format is {found!r}, expected {PROFILE_FORMAT!r}. "
            "Make one with `expertflow-trace profile --out profile.json`."
        )
    profile = from_json(ProfileFile, document, path.name)
    if not profile.copy_lines:
        raise InputError(f"{path} holds no line for its link. Measure the profile again.")
    return profile


def write_profile(path: Path, profile: ProfileFile) -> None:
    """Write a profile, at once or not at all."""
    write_json(path, profile)


def is_profile(text: str) -> bool:
    """Whether `text`, given as a link, means a profile: a .json file, or the name of a saved one."""
    return text.strip().endswith(".json") or text.strip() in saved_names()


def link_of(text: str) -> LinkSpec:
    """The link of a profile, by file or saved name, with a note on where it was measured.

    Raises UsageError for names that are not saved, InputError for a file that is no profile.
    """
    text = text.strip()
    if text.endswith(".json"):
        profile = read_profile(Path(text))
    elif text in saved_names():
        profile = read_profile(named_path(text))
    else:
        raise unknown_name("profile", text, saved_names())
    idle, busy = profile.copy_line(busy=False), profile.copy_line(busy=True)
    at_block = idle.latency_s + profile.expert_bytes * idle.line.weights[1]
    under_compute = busy.latency_s + profile.expert_bytes * busy.line.weights[1]
    poor = f" (a poor fit: median error {idle.line.residual:.0%})"
    note = (
        f"Link {text}: {profile.link}, {profile.link_origin} on {profile.machine} ({profile.device}) at "
        f"{profile.provenance.created}: {format_bytes(idle.bandwidth_Bps)}/s and "
        f"{format_seconds(idle.latency_s)} a copy"
        f"{poor if idle.line.residual > POOR_FIT else ''}."
    )
    return LinkSpec(
        text,
        idle.bandwidth_Bps,
        idle.latency_s,
        origin=profile.link_origin,
        busy_factor=under_compute / at_block if at_block else 1.0,
        note=note,
    )

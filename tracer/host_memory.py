"""Host memory that this process could still take: the machine's, or its container's if that is less."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_host_bytes(root: Path = _CGROUP) -> int:
    """Bytes that can be taken without swapping or being killed.

    Page cache counts as free, in the machine and in the container. Needs psutil.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    left = _container_bytes(root)
    return free if left is None else min(free, left)


def _container_bytes(root: Path) -> int | None:
    """What the container's limit leaves (cgroup 2, then 1); None if there is no limit that can be read."""
    for folder, limit, used, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (
            root / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        most, now = _number(folder / limit), _number(folder / used)
        if most is not None and now is not None:
            return max(0, most - now + _counter(folder / "memory.stat", cache))
    return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # absent, unreadable, or "max": no limit
        return None


def _counter(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = (line.split() for line in lines)
    return next((int(words[1]) for words in found if words[:1] == [name]), 0)

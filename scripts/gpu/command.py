"""`expertflow-trace` from the tree, on a machine with torch, transformers, pyarrow and numpy and nothing else.

Where a small library of the toolkit's is not installed, its stand-in beside this file takes its place.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = Path(__file__).resolve().parent / "stand_ins"


def prepare() -> None:
    """Let Python find the tree, and the stand-ins behind everything that is installed."""
    for path in (str(ROOT / ".typing"), str(ROOT)):
        if path not in sys.path:
            sys.path.insert(0, path)
    if str(STAND_INS) not in sys.path:
        sys.path.append(str(STAND_INS))


if __name__ == "__main__":
    prepare()
    from expertflow.tracer.main import main

    main()

"""Lets the tests run from a checkout that was never installed."""

import importlib.util
import sys
from pathlib import Path

TREE = Path(__file__).parent.parent / ".typing"

if importlib.util.find_spec("expertflow") is None:
    sys.path.insert(0, str(TREE))

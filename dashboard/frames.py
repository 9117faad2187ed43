"""Data frames as the type checker should see them: pandas' types make every column a union of all it could be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    Frame = Any
else:
    Frame = pd.DataFrame

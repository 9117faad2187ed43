"""Step 3.7: stacked experts in the library's layout that lack its decorator."""

from __future__ import annotations

from typing import Any

from ..hooks import register_experts


def adapt(block: Any, model: Any) -> None:
    """Register the block's experts."""
    register_experts(block.experts, model.config.get_text_config())

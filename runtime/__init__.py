"""Runs a model with its experts offloaded under a policy, and checks the forecast.

from expertflow.runtime import offload
model = offload("org/model", "policy.json")
model.generate(...)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .offloading import offload

__all__ = ["offload"]


def __getattr__(name: str) -> Any:
    # torch and transformers are imported only when the runtime is used.
    if name == "offload":
        from .offloading import offload

        return offload
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""How large the bench is: for a GPU, or scaled down to be tried on a CPU."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EMBEDDED = "embedded"
REPLAYED = ("olmoe-1b-7b", "gpt-oss-20b")

_QUICK: dict[str, dict[str, Any]] = {
    "olmoe-1b-7b": {
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "eos_token_id": None,
    },
    "gpt-oss-20b": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "head_dim": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "eos_token_id": None,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is run, and how much of it. `changes` scale a config down; `routing` is a trace folder or file by model."""

    device: str
    link: str | None
    dtype: str = "auto"
    subjects: tuple[str, ...] = (*REPLAYED, EMBEDDED)
    kinds: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    sequences: Mapping[int, int] = field(default_factory=lambda: {1: 6, 8: 24})
    new_tokens: int = 16
    prompt_tokens: int = 64
    repeats: int = 3
    epochs: int = 8
    network: Mapping[str, int] = field(default_factory=dict)
    plain_tokens: int = 5
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    routing: Mapping[str, Path] = field(default_factory=dict)
    threads: int | None = None

    def fingerprint(self) -> str:
        """Twelve hex digits over everything that changes what a cell measures."""
        fields = asdict(self)
        del fields["subjects"], fields["kinds"], fields["batches"]
        text = json.dumps(fields, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def full(device: str, link: str | None, **more: Any) -> Settings:
    """For a GPU: models of real size."""
    return Settings(device=device, link=link, **more)


def quick(device: str, link: str | None, **more: Any) -> Settings:
    """The same cells on models scaled down: for trying the script, never for its numbers."""
    small: dict[str, Any] = {
        "changes": _QUICK,
        "sequences": {1: 3, 8: 12},
        "new_tokens": 4,
        "prompt_tokens": 8,
        "repeats": 1,
        "epochs": 1,
        "network": {"hidden": 16, "feedforward": 32, "heads": 2, "head_size": 8},
        "plain_tokens": 4,
    }
    return Settings(device=device, link=link, **{**small, **more})

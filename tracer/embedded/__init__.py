"""The embedded model: a small mixture-of-experts language model, shipped as package data.

It lets every command run without a download. README.md beside this file is its model card.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).parent
PROMPTS = MODEL_DIR / "prompts.jsonl"

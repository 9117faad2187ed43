"""How near `plan` comes, family by family: what tiny models really make and keep, against what was told before.

Each family of the installed transformers is built as a tiny random model, described from its config alone, and run on
the CPU with every tensor counted. Prints a table, and the range that docs/plan.md states. Some minutes; give names of
families to see only those.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIZES = ((1, 300), (3, 60), (4, 150))
"""Sequences of a batch, and tokens of its longest."""


def main(names: list[str]) -> None:
    """Print one row per family, then the range."""
    sys.path.insert(0, str(ROOT))
    from tests.families import SERVED

    sizes = " | ".join(f"{batch} x {width}" for batch, width in SIZES)
    print(
        f"| family | cache, told / held | working tensors, told / measured: {sizes} | from the config |"
    )
    print("|---|---|" + "---|" * (len(SIZES) + 1))
    rows = [_row(family) for family in names or SERVED]
    told = sorted(number for _, numbers, _ in rows for number in numbers)
    before = sorted(number for *_, numbers in rows for number in numbers)
    print(
        f"\nWorking tensors, told / measured: {told[0]:.2f} to {told[-1]:.2f}, median {told[len(told) // 2]:.2f}; "
        f"estimated from the config: {before[0]:.2f} to {before[-1]:.2f}. Cache, told / held: "
        f"{min(row[0] for row in rows):.3f} to {max(row[0] for row in rows):.3f}."
    )


def _row(family: str) -> tuple[float, list[float], list[float]]:
    import torch
    from expertflow.tracer.generate import Prompt
    from expertflow.tracer.load import load_model
    from expertflow.tracer.memory import peaks
    from expertflow.tracer.unloaded import _widths, describe

    from tests.families import folder

    cpu = torch.device("cpu")
    loaded = load_model(str(folder(family)), device=cpu)
    widths = describe(str(folder(family)), dtype="float32").widths
    by_config = _widths(loaded.model, loaded.layers, loaded.shape, widths.kept_per_sequence)
    told: list[float] = []
    before: list[float] = []
    for batch, width in SIZES[:1] if hasattr(loaded.model.config, "canvas_length") else SIZES:
        prompts = [
            Prompt(number, tuple(2 + place % 200 for place in range(width - 7 * number)))
            for number in range(batch)
        ]
        real = 0
        for info, peak in peaks(loaded, prompts, cpu):
            kept = loaded.shape.kv_bytes_per_token * info.context + widths.kept_per_sequence
            real = max(real, peak - batch * kept)
        tokens, context = batch * width, width + 2
        for found, how in ((told, widths), (before, by_config)):
            size = how.activation_bytes(batch=batch, tokens=tokens, context=context)
            found.append(size / real)
    cache = _cache(family, loaded, widths.kept_per_sequence)
    cells = " | ".join(f"{number:.2f}" for number in told)
    print(
        f"| `{family}` | {cache:.3f} | {cells} | {min(before):.2f} to {max(before):.2f} |",
        flush=True,
    )
    return cache, told, before


def _cache(family: str, loaded: Any, per_sequence: int) -> float:
    import torch

    from tests.tracer.test_kept import held

    with torch.inference_mode():
        positions, really = held(family, loaded.model, 128)
    return (loaded.shape.kv_bytes_per_token * positions + per_sequence) / really


if __name__ == "__main__":
    main(sys.argv[1:])

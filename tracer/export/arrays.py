"""A trace's routing as one numpy archive, which `import` reads again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import InputError
from ..store import Trace
from .file import whole_file


def write_npz(trace: Trace, out: Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write expert_ids [tokens, layers, k], seq_bounds, prompt_rows, labels and, if recorded, gate_weights.

    Tokens are in order of sequences and positions; padding is left out. Returns what was written and left out.
    Raises InputError if a sequence is not listed or lacks layers of a token, UsageError and ResourceError as
    `whole_file`.
    """
    rows = trace.routing_arrays()
    layers = trace.shape.num_moe_layers
    real = np.flatnonzero(~rows.is_pad)
    order = real[np.lexsort((rows.layer[real], rows.position[real], rows.sequence[real]))]
    grid = order[: len(order) // layers * layers].reshape(-1, layers)
    sequence, position = rows.sequence[grid], rows.position[grid]
    is_whole = len(order) % layers == 0 and (rows.layer[grid] == np.arange(layers)).all()
    if not is_whole or (sequence != sequence[:, :1]).any() or (position != position[:, :1]).any():
        raise InputError(
            f"{trace.path}: some token is recorded twice or lacks layers, so its routing fits no array. Run "
            f"`expertflow-trace check {trace.path}`."
        )
    labels = trace.table("sequences", ["sequence", "domain", "prompt_id"]).to_pydict()
    numbers, lengths = np.unique(sequence[:, 0], return_counts=True)
    place = {number: row for row, number in enumerate(labels["sequence"])}
    lacking = [number for number in numbers.tolist() if number not in place]
    if lacking or len(place) < len(labels["sequence"]):
        raise InputError(
            f"{trace.path}: its table of sequences does not fit its routing. Run `expertflow-trace check {trace.path}`."
        )
    chosen = [place[number] for number in numbers.tolist()]
    of_prompt = ~rows.phase_is_decode[grid[:, 0]]
    starts = np.r_[0, np.cumsum(lengths)]
    arrays = {
        "expert_ids": rows.experts[grid],
        "seq_bounds": starts.astype(np.int64),
        "prompt_rows": np.add.reduceat(of_prompt.astype(np.int64), starts[:-1]),
        "domain": np.asarray([labels["domain"][row] for row in chosen], dtype=str),
        "prompt_id": np.asarray([labels["prompt_id"][row] for row in chosen], dtype=str),
    }
    if rows.weights is not None:
        arrays["gate_weights"] = rows.weights[grid]
    with whole_file(out, overwrite=overwrite) as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    return {
        "tokens": len(grid),
        "sequences": len(numbers),
        "padding": len(np.unique(rows.step[rows.is_pad])) and int(rows.is_pad.sum()) // layers,
    }

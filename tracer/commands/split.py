"""`expertflow-trace split`: a trace as one to learn from and one to judge by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .derived import Overwrite, Seed, WholeBatches, tell
from .options import Json, TraceDir

SPLIT_FORMAT = "expertflow.split/1"


def split(
    trace: TraceDir,
    train: Annotated[Path, typer.Option(help="Trace folder to write: the part to learn from.")],
    heldout: Annotated[Path, typer.Option(help="Trace folder to write: the part to judge by.")],
    share: Annotated[float, typer.Option(help="Share of the sequences that --train gets.")] = 0.8,
    by: Annotated[
        str,
        typer.Option(help="prompt: any prompts; domain: whole domains, to judge on unseen ones."),
    ] = "prompt",
    whole_batches: WholeBatches = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Split a trace in two, never within a prompt.

    Prompts with the same text stay together. Where a batch is torn apart its times describe neither part, so
    times are left out of both traces, with a warning; --whole-batches keeps them.

    Example: expertflow-trace split traces/mine --train traces/train --heldout traces/heldout --share 0.8
    """
    from ..division import split_sequences
    from ..errors import UsageError
    from ..remote import local_only
    from ..store import Trace
    from ..subset import write_subset

    if train.resolve() == heldout.resolve():
        raise UsageError(f"--train and --heldout are both {train}; give two folders.")
    if train.resolve().is_relative_to(heldout.resolve()) or heldout.resolve().is_relative_to(
        train.resolve()
    ):
        raise UsageError(f"{train} and {heldout} lie in one another; give two folders apart.")
    for out in (train, heldout):
        local_only(out, "writing")
        if out.exists() and not overwrite:
            raise UsageError(f"{out} exists. Choose another name, or pass --overwrite.")
    source = Trace.open(trace)
    first, second = split_sequences(source, share, by=by, seed=seed, whole_batches=whole_batches)
    total = len(first) + len(second)
    units = f"by {by}{', whole batches' if whole_batches else ''}, share {share:g}, seed {seed}"
    written = {
        str(out): write_subset(
            source,
            sequences,
            out,
            seed=seed,
            note=f"The {name} part, {len(sequences)} of {total} sequences: split {units}.",
            overwrite=overwrite,
        )
        for name, out, sequences in (("training", train, first), ("held-out", heldout, second))
    }
    tell(SPLIT_FORMAT, written, as_json)

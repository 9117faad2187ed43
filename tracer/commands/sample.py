"""`expertflow-trace sample`: a smaller trace of some sequences of a large one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .derived import Overwrite, Seed, WholeBatches, tell
from .options import Json, TraceDir

SAMPLE_FORMAT = "expertflow.sample/1"


def sample(
    trace: TraceDir,
    out: Annotated[Path, typer.Option(help="Trace folder to write.")],
    sequences: Annotated[int | None, typer.Option(help="Sequences to draw, at least one.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Share of the sequences instead, for example 0.1.")
    ] = None,
    whole_batches: WholeBatches = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw some sequences of a trace into a smaller one.

    Where a batch is torn apart its times describe it no more, so times are left out, with a warning;
    --whole-batches keeps them.

    Example: expertflow-trace sample traces/mine --sequences 20 --out traces/small
    """
    from ..division import sample_sequences
    from ..store import Trace
    from ..subset import write_subset

    source = Trace.open(trace)
    chosen = sample_sequences(
        source, sequences=sequences, share=share, seed=seed, whole_batches=whole_batches
    )
    total = source.manifest.rows("sequences")
    units = "whole batches" if whole_batches else "sequences"
    manifest = write_subset(
        source,
        chosen,
        out,
        seed=seed,
        note=f"A sample of {len(chosen)} of {total} sequences, drawn as {units} with seed {seed}.",
        overwrite=overwrite,
    )
    tell(SAMPLE_FORMAT, {str(out): manifest}, as_json)

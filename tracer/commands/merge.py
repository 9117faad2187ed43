"""`expertflow-trace merge`: several traces of one model as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .derived import Overwrite, tell
from .options import Json

MERGE_FORMAT = "expertflow.merge/1"


def merge(
    traces: Annotated[
        list[Path], typer.Argument(help="Traces of one model, two or more.", metavar="DIR...")
    ],
    out: Annotated[Path, typer.Option(help="Trace folder to write.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge traces of one model into one.

    Sequences, batches and steps are numbered on; clocks follow one another. What not all of the traces recorded is
    left out. Traces of different machines are merged with a warning: the manifest describes the first.

    Example: expertflow-trace merge traces/monday traces/tuesday --out traces/both
    """
    from ..merge import merge_traces
    from ..store import Trace

    manifest = merge_traces([Trace.open(path) for path in traces], out, overwrite=overwrite)
    tell(MERGE_FORMAT, {str(out): manifest}, as_json)

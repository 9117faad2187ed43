"""Options of `simulate` that draw the run, and the drawing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...tracer.commands.options import result_place
from ...tracer.console import say

if TYPE_CHECKING:
    from ..forecast import Forecaster
    from ..policy.spec import PolicySpec
    from ..result import Result

TimelineOut = Annotated[
    Path | None,
    typer.Option(
        "--timeline",
        help="Also draw the run for Perfetto (.json or .json.gz).",
        dir_okay=False,
        callback=result_place,
    ),
]
TimelineSteps = Annotated[
    str | None, typer.Option(help="Forward passes to draw, as 100:200; default: all.")
]


def draw_run(
    out: Path | None, steps: str | None, ready: Forecaster, spec: PolicySpec, result: Result
) -> None:
    """Write the timeline of a prediction if one was asked for.

    Raises UsageError for requests that arrive, for a window without steps, and without --timeline.
    """
    from ...tracer.errors import UsageError
    from ...tracer.export.perfetto import parse_window, write_timeline
    from ..timeline import predicted_timeline

    if out is None:
        if steps is not None:
            raise UsageError("--timeline-steps is about --timeline FILE; add it.")
        return
    if result.arrivals is not None:
        raise UsageError("--timeline draws the recorded batches only; leave --arrivals out.")
    window = None if steps is None else parse_window("--timeline-steps", steps)
    timeline = predicted_timeline(ready, spec, result, window)
    if not timeline.slices:
        raise UsageError(f"No step lies in {steps}; nothing is drawn.")
    write_timeline(out, timeline, overwrite=True)
    say(f"Wrote {out}: open it in https://ui.perfetto.dev")

"""`expertflow-trace report`: results as one file for others to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...tracer.commands.options import Json
from ...tracer.console import print_json, say


def report(
    results: Annotated[
        Path,
        typer.Argument(
            help="A result, tuning, verdict or policy (.json), a trace, a sweep, or a folder of such.",
            metavar="RESULT_OR_FOLDER",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Write the report here; default: report.html.", dir_okay=False),
    ] = None,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Markdown for an issue instead, on stdout without --out."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file if it exists.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put results, figures and where they come from into one file that opens offline.

    Example: expertflow-trace report traces/demo --out report.html
    """
    from ...tracer.errors import UsageError
    from ...tracer.outputs import require_place, taking_place
    from ..report import report_on

    if as_json and markdown and out is None:
        raise UsageError(
            "--json and --markdown both print on stdout; name a file for one with --out."
        )
    target = out or (None if markdown else Path("report.html"))
    if target is not None and target.exists() and not overwrite:
        raise UsageError(f"{target} exists already. Choose another --out, or pass --overwrite.")
    if target is not None and target.resolve() == results.resolve():
        raise UsageError(f"{target} is what the report is made of; choose another --out.")
    require_place(target)
    found = report_on(results)
    if markdown:
        from ..report_markdown import to_markdown

        text = to_markdown(found)
    else:
        from ..report_html import to_html

        text = to_html(found)
    if target is None:
        typer.echo(text, nl=False)
        return
    with taking_place(target) as place:
        place.write_text(text, encoding="utf-8")
    size = len(text.encode())
    if as_json:
        print_json(
            {
                "format": "expertflow.report/1",
                "path": str(target),
                "bytes": size,
                "sections": [section.title for section in found.sections],
            }
        )
    else:
        say(f"Wrote {target} ({size / 1e6:.1f} MB, {len(found.sections)} sections).")

"""A report as Markdown, to be pasted into an issue: the same findings and tables, without the figures."""

from __future__ import annotations

from collections.abc import Iterator
from html import unescape

import pandas as pd

from .report import Report, Section


def to_markdown(report: Report) -> str:
    """The whole text."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# {plain(report.title)}"
    yield ""
    yield plain(report.about)
    for section in report.sections:
        yield ""
        yield from _section(section)


def _section(section: Section) -> Iterator[str]:
    yield f"## {plain(section.title)}"
    for line in section.lines:
        yield ""
        yield plain(line)
    if section.facts:
        yield ""
        yield from (f"- **{plain(name)}**: {plain(text)}" for name, text in section.facts)
    if section.pictures:
        yield ""
        yield from (f"- {plain(unescape(picture.finding))}" for picture in section.pictures)
    for table in section.tables:
        yield ""
        yield f"{plain(table.caption)}:"
        yield ""
        yield from table_lines(table.frame)
    if section.commands:
        yield ""
        yield "```"
        yield from section.commands
        yield "```"


def table_lines(frame: pd.DataFrame) -> Iterator[str]:
    """A table in GitHub's notation."""
    yield f"| {' | '.join(plain(str(name)) for name in frame.columns)} |"
    yield f"| {' | '.join('---' for _ in frame.columns)} |"
    for row in frame.itertuples(index=False):
        yield f"| {' | '.join(plain(str(value)) for value in row)} |"


def plain(text: str) -> str:
    """One line that is neither markup nor the end of a table's cell."""
    for mark in ("\\", "|", "`", "*", "_", "<", "[", "]"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())

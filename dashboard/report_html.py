"""A report as one HTML file: plotly.js inside, once; opens from disk, asks nobody, prints."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape, unescape

from .report import Report, Section
from .standalone import figure_html

# Nothing but what stands in the file may load; plotly's WebGL charts compile functions of their own.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
_STYLE = """
body{font-family:system-ui,sans-serif;line-height:1.5;color:#1C2127;background:#fff;max-width:1060px;margin:32px auto;
padding:0 24px}
h1{font-size:1.7em;margin-bottom:0}h2{font-size:1.25em;margin-top:2em;border-bottom:1px solid #D5D9DE}
figure{margin:1.2em 0;break-inside:avoid}.about{color:#5A6069;font-size:.9em}
table{border-collapse:collapse;width:100%;font-size:.85em;margin:.8em 0}
caption{text-align:left;font-weight:600;padding:.3em 0}
th,td{text-align:left;padding:.25em .6em;border-bottom:1px solid #E4E7EB;vertical-align:top}
tr{break-inside:avoid}dl{display:grid;grid-template-columns:max-content 1fr;gap:.2em 1em;font-size:.92em}
dt{color:#5A6069;overflow-wrap:anywhere;max-width:18em}dd{margin:0;overflow-wrap:anywhere}
pre{background:#F3F5F7;padding:.8em;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85em}
@media print{body{margin:0;max-width:none}.modebar-container{display:none!important}h2{break-after:avoid}
pre{border:1px solid #D5D9DE;background:none}}
"""


def to_html(report: Report) -> str:
    """The whole file."""
    return "".join(_pieces(report))


def _pieces(report: Report) -> Iterator[str]:
    title = escape(report.title)
    yield (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n<main>"
        f'<h1>{title}</h1>\n<p class="about">{escape(report.about)}</p>\n'
    )
    has_script = False
    for section in report.sections:
        for piece, is_figure in _section(section, has_script=has_script):
            has_script = has_script or is_figure
            yield piece
    yield "</main></body></html>\n"


def _section(section: Section, *, has_script: bool) -> Iterator[tuple[str, bool]]:
    yield f"<section><h2>{escape(section.title)}</h2>\n", False
    for line in section.lines:
        yield f"<p>{escape(line)}</p>\n", False
    if section.facts:
        rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in section.facts)
        yield f"<dl>{rows}</dl>\n", False
    for picture in section.pictures:
        # Findings are made for figures, so they are escaped already.
        words = escape(unescape(picture.alt))
        body = figure_html(picture.fig, script=not has_script)
        has_script = True
        yield (
            f'<figure role="group" aria-label="{words}">{body}</figure>\n',
            True,
        )
    for table in section.tables:
        body = table.frame.to_html(index=False, border=0, escape=True, na_rep="–")
        head, rest = body.split(">", 1)
        yield f"{head}><caption>{escape(table.caption)}</caption>{rest}\n", False
    if section.commands:
        yield f"<pre>{escape(chr(10).join(section.commands))}</pre>\n", False
    yield "</section>\n", False

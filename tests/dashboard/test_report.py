"""The report: one file, nobody asked, everything in it that one needs to judge it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from expertflow.dashboard import report, report_markdown
from expertflow.dashboard.report_html import to_html
from expertflow.tracer.errors import InputError
from expertflow.tracer.main import main
from expertflow.tracer.records import write_json

from .conftest import make_result


@pytest.fixture(scope="module")
def html(demo: Path) -> str:
    return to_html(report.report_on(demo))


def test_one_file_with_the_library_inside_once(html: str) -> None:
    assert len(html.encode()) < 6_000_000
    assert len(re.findall(r"plotly\.js v\d", html)) == 1
    assert html.count('class="plotly-graph-div"') >= 8
    figures = html.count('class="plotly-graph-div"')
    assert html.count('"showSendToCloud": false') == figures


def test_nothing_outside_is_asked_for(html: str) -> None:
    assert not re.findall(r"<(?:script|img|iframe)[^>]+src=", html)
    assert not re.findall(r"<link\b", html)
    assert "default-src 'none'" in html


def test_it_says_what_was_found_and_how_to_make_it_again(html: str) -> None:
    for text in (
        "Did the forecast hold? Validated",
        "Did the forecast hold? NOT validated",
        "Which policy, for a budget of 0.5",
        "What was recorded",
        "What was swept",
        "Single runs",
        "EMULATED link",
        "expertflow-trace tune traces/demo --budget 0.5",
        "expertflow-trace deploy demo-policy.json",
    ):
        assert text in html, text


def test_every_figure_has_words(html: str) -> None:
    labels = re.findall(r'<figure role="group" aria-label="([^"]+)"', html)
    assert len(labels) == html.count('class="plotly-graph-div"')
    assert all(len(label) > 20 for label in labels)


def test_names_cannot_smuggle_markup(tmp_path: Path) -> None:
    evil = make_result("<script>alert(1)</script>|`x`")
    write_json(tmp_path / "run.json", evil)
    found = report.report_on(tmp_path / "run.json")
    assert "<script>alert" not in to_html(found)
    assert not re.search(r"(?<!\\)<script", report_markdown.to_markdown(found))


def test_markdown_is_short_and_has_the_same_numbers(demo: Path) -> None:
    text = report_markdown.to_markdown(report.report_on(demo))
    assert "<div" not in text
    assert "| lfu | tokens/s | 24.6 tokens/s | 24.1 tokens/s |" in text
    assert "18 of 18 checks are within tolerance" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert all(width > 2 for width in widths)


def test_a_single_file_will_do(demo: Path) -> None:
    found = report.report_on(demo / "demo-verdict.json")
    assert found.sections[0].title.startswith("Did the forecast hold?")
    trace = report.report_on(demo / "demo")
    assert any(section.title.startswith("What was recorded") for section in trace.sections)


def test_broken_files_are_named(broken: Path) -> None:
    found = report.report_on(broken)
    (section,) = [s for s in found.sections if s.title == "What could not be read"]
    assert "torn/manifest.json" in dict(section.facts)


@pytest.mark.parametrize("name", ["nothing-here", "empty"])
def test_nothing_to_report_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"does not exist|holds nothing to report"):
        report.report_on(tmp_path / name)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["report", *arguments])
    return int(stop.value.code or 0)


def test_the_command_writes_and_does_not_overwrite(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    assert run(str(demo), "--out", str(out), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == out.stat().st_size
    assert run(str(demo), "--out", str(out)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(str(demo), "--out", str(out), "--overwrite") == 0


def test_markdown_goes_to_stdout(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(demo / "demo-run.json"), "--markdown") == 0
    assert capsys.readouterr().out.startswith("# ExpertFlow report")
    assert run(str(demo / "gone.json")) == 3


def test_a_report_never_takes_the_place_of_what_it_is_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    write_json(path, make_result("one"))
    before = path.read_bytes()

    with pytest.raises(SystemExit) as stop:
        main(["report", str(path), "--out", str(path), "--overwrite"])

    assert stop.value.code == 2
    assert "what the report is made of" in capsys.readouterr().err
    assert path.read_bytes() == before

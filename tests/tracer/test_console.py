"""Results on stdout, the rest on stderr, no colours in a pipe."""

import json

import numpy as np
from expertflow.tracer import console


def test_print_json_is_one_document_without_nan(capsys):
    console.print_json({"a": float("nan"), "b": [1.5, float("inf")], "c": "−é"})

    out = capsys.readouterr()
    assert json.loads(out.out) == {"a": None, "b": [1.5, None], "c": "−é"}
    assert out.err == ""


def test_notes_go_to_stderr_untouched(capsys):
    console.say("pip install 'expertflow-trace[model]'")
    console.warn("[bold] is kept")

    out = capsys.readouterr()
    assert out.out == ""
    assert "expertflow-trace[model]" in out.err
    assert "warning: [bold] is kept" in out.err
    assert "\x1b" not in out.err


def test_rows_are_aligned_and_never_cut(capsys):
    console.print_rows("Title", [("a", "x" * 300), ("long name", "[y]")])

    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  a          " + "x" * 300
    assert lines[2] == "  long name  [y]"


def test_progress_in_a_pipe_is_a_line_every_ten_seconds(capsys):
    now = iter(np.arange(0.0, 1000.0, 3.0).tolist())

    with console.progress("recording", 20, "tokens", clock=lambda: next(now)) as report:
        report.phase("prefill")
        for _ in range(8):
            report.advance()

    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert "recording (prefill): " in lines[0]
    assert "tokens/s" in lines[0]
    assert "s left" in lines[0]
    assert "8/20 tokens" in lines[-1]


def test_sizes_are_for_people():
    assert console.bytes_text(12) == "12 B"
    assert console.bytes_text(1536) == "1.5 KiB"
    assert console.bytes_text(3 << 40) == "3.0 TiB"

"""A committed trace of each format version still reads the same."""

import json
import runpy
from pathlib import Path

from expertflow.tracer.check import check_trace
from expertflow.tracer.store import Trace

TESTS = Path(__file__).parent.parent
GOLDEN = TESTS / "golden"


def test_golden_trace_is_sound():
    report = check_trace(GOLDEN / "trace-v1")

    assert report.steps == 8


def test_golden_trace_reads_the_same_as_when_it_was_made():
    expected = runpy.run_path(str(TESTS / "make_golden_trace.py"))["expected"]

    found = json.loads(json.dumps(expected(Trace.open(GOLDEN / "trace-v1"))))

    assert found == json.loads((GOLDEN / "trace-v1.expected.json").read_text(encoding="utf-8"))

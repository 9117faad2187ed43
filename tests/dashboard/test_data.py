"""Discovery: everything by format, nothing by luck, and bad files by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from expertflow.dashboard import data, routing
from expertflow.tracer.records import write_json

from .conftest import make_result, make_tuning, make_verdict


def test_demo_folder_is_found_and_linked(demo: Path) -> None:
    catalog = data.discover(demo)
    assert not catalog.problems
    assert [t.name for t in catalog.traces] == ["demo"]
    (subject,) = data.subjects(catalog)
    assert subject.trace is not None
    assert len(subject.tunings) == len(subject.policies) == len(subject.results) == 1
    assert len(subject.verdicts) == 2


def test_routing_counts_are_the_tables(demo: Path) -> None:
    (trace,) = data.discover(demo).traces
    summary = routing.routing_summary(trace)
    assert isinstance(summary, routing.RoutingSummary)
    table = pq.read_table(demo / "demo" / "routing").to_pandas()
    assert summary.rows == len(table)
    wanted = np.zeros((4, 16), dtype=int)
    rows = table[table["phase"] == "decode"]
    for layer, experts in zip(rows["layer"], rows["experts"], strict=True):
        wanted[layer, experts] += 1
    np.testing.assert_array_equal(summary.select("decode", data.ALL), wanted)
    by_domain = sum(summary.select("decode", domain) for domain in summary.domains)
    np.testing.assert_array_equal(by_domain, wanted)


def test_sequences_are_summed(demo: Path) -> None:
    (trace,) = data.discover(demo).traces
    summary = data.sequence_summary(trace)
    assert isinstance(summary, data.SequenceSummary)
    assert summary.sequences == 8
    assert summary.generated_tokens == 8 * 24
    assert summary.domains == ("code", "prose")


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    assert data.discover(tmp_path) == data.Catalog(root=tmp_path)
    (problem,) = data.discover(tmp_path / "nowhere").problems
    assert "does not exist" in problem.reason


def test_broken_files_are_named_with_a_reason(broken: Path) -> None:
    catalog = data.discover(broken)
    reasons = {problem.name: problem.reason for problem in catalog.problems}
    assert set(reasons) == {
        "cut/routing/part-00000.parquet",
        "torn/manifest.json",
        "verdict.json",
    }
    assert isinstance(data.sweep_table(catalog.sweeps[0]), data.Problem)
    assert "truncated" in reasons["cut/routing/part-00000.parquet"]
    assert "JSON" in reasons["torn/manifest.json"]
    assert "Verdict" in reasons["verdict.json"]
    assert not any(str(broken) in reason for reason in reasons.values())
    (trace,) = catalog.traces
    assert isinstance(routing.routing_summary(trace), data.Problem)
    assert isinstance(data.sequence_summary(trace), data.SequenceSummary)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not readable JSON"),
        ('{"format": "expertflow.result/9"}', "unknown format"),
        ('{"format": "expertflow.result/1"}', "is missing"),
        ("[" * 100_000, ""),
    ],
)
def test_every_kind_of_bad_json_is_a_problem(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    (problem,) = data.discover(tmp_path).problems
    assert problem.name == "x.json"
    assert reason in problem.reason


def test_foreign_hidden_partial_and_deep_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8}', encoding="utf-8")
    (tmp_path / "list.json").write_text("[1, 2]", encoding="utf-8")
    for folder in (".git", "run.partial", "a/b/c/d/e"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.json").write_text("{", encoding="utf-8")
    assert data.discover(tmp_path) == data.Catalog(root=tmp_path)


def test_what_no_page_shows_is_passed_over_without_a_warning(tmp_path: Path) -> None:
    kinds = ("curve", "import", "check", "doctor", "info", "members", "run")
    for kind in kinds:
        (tmp_path / f"{kind}.json").write_text(json.dumps({"format": f"expertflow.{kind}/1"}))
    (tmp_path / "parts").mkdir()
    (tmp_path / "results.parquet").write_bytes(b"PAR1")
    (tmp_path / "parts" / "part-00000.parquet").write_bytes(b"PAR1")

    assert data.discover(tmp_path) == data.Catalog(root=tmp_path)


def test_a_trace_that_never_finished_is_named(tmp_path: Path) -> None:
    (tmp_path / "half" / "routing").mkdir(parents=True)
    (problem,) = data.discover(tmp_path).problems
    assert problem.name == "half"
    assert "did not finish" in problem.reason


def test_results_without_their_trace_are_a_subject(tmp_path: Path) -> None:
    write_json(tmp_path / "tuning.json", make_tuning("elsewhere"))
    write_json(tmp_path / "verdict.json", make_verdict("elsewhere", validated=True))
    (subject,) = data.subjects(data.discover(tmp_path))
    assert subject.trace is None
    assert subject.tunings
    assert subject.verdicts


def test_a_file_written_again_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, make_result("lru", tokens_per_s=1.0))
    os.utime(path, ns=(1, 1))
    assert data.discover(tmp_path).results[0].value.tokens_per_s == 1.0
    write_json(path, make_result("lru", tokens_per_s=2.0))
    os.utime(path, ns=(2, 2))
    assert data.discover(tmp_path).results[0].value.tokens_per_s == 2.0


def test_a_policy_changed_by_hand_is_a_problem(demo: Path, tmp_path: Path) -> None:
    document = json.loads((demo / "demo-policy.json").read_text(encoding="utf-8"))
    document["behaviour"]["slots"] = 33
    (tmp_path / "policy.json").write_text(json.dumps(document), encoding="utf-8")
    (problem,) = data.discover(tmp_path).problems
    assert "changed by hand" in problem.reason


def test_where_the_data_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EXPERTFLOW_DATA", raising=False)
    assert data.data_root(["--data", "x"]) == Path("x")
    assert data.data_root(["--data=y"]) == Path("y")
    assert data.data_root([]).name == "traces"
    monkeypatch.setenv("EXPERTFLOW_DATA", str(tmp_path))
    assert data.data_root([]) == tmp_path

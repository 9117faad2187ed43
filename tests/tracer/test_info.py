"""What `info` prints stays readable, and its figures are those of the statistics."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from expertflow.tracer.main import main
from expertflow.tracer.stats import routing_stats
from expertflow.tracer.stats.pace import pace_stats
from expertflow.tracer.store import Trace
from expertflow.tracer.synthetic import synthetic_trace

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("Routing", "Caching", "Prediction", "Batching", "Domains and prompts", "In words")


def shown(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    names = [f"domain{number}" for number in range(9)]
    return synthetic_trace(
        tmp_path_factory.mktemp("info") / "t", sequences=27, batch_size=1, domains=names
    )


def test_sections_come_in_order_and_stay_short(trace, capsys):
    lines = shown(capsys, "info", trace.path).splitlines()

    titles = [line for line in lines if not line.startswith(" ")]
    places = [titles.index(title) for title in SECTIONS]
    assert all(first < second for first, second in pairwise(places))
    assert len(lines) < 60


def test_many_domains_show_the_closest_the_farthest_and_the_mean(trace, capsys):
    text = shown(capsys, "info", trace.path)

    stats = routing_stats(trace)
    assert len(stats.domains) == 36
    lines = [line for line in text.splitlines() if "domain" in line and "apart" not in line]
    assert len(lines) == 3  # the mean and both ends
    far = max(stats.domains, key=lambda pair: pair.distance)
    assert f"{far.first} and {far.second}, {far.distance:.2f}" in text
    assert f"differ by {np.mean([pair.distance for pair in stats.domains]):.2f}" in text


def test_json_holds_every_figure(trace, capsys):
    stats = json.loads(shown(capsys, "info", trace.path, "--json"))["stats"]

    assert len(stats["domains"]) == 36
    assert len(stats["layers"]) == 4
    assert {batch["sequences"] for batch in stats["batches"]} >= {2, 4, 8}
    for name in (
        "segments",
        "coverage",
        "transitions",
        "lookahead",
        "coactive",
        "pace",
        "prefixes",
    ):
        assert stats[name], name
    assert {finding["about"] for finding in stats["findings"]} >= {"caching", "prefetch", "link"}


def test_the_link_keeps_up_from_the_hit_rate_at_which_loads_take_as_long_as_work(trace):
    stats = routing_stats(trace)

    rows = trace.table("steps", filters=[("layer", ">=", 0), ("phase", "=", "decode")]).to_pandas()
    work_s = (rows.mixer_s + rows.readback_s + rows.experts_s).median()
    assert stats.pace is not None
    assert stats.pace.layer_s == pytest.approx(work_s)
    loads_s = (1 - stats.pace.needed_hits) * stats.pace.distinct * stats.pace.copy_s
    assert loads_s == pytest.approx(work_s)
    assert "declared" in stats.pace.origin
    assert any("declared" in finding.text for finding in stats.findings)
    assert pace_stats(trace, 0.0) is None


def test_the_demo_trace_has_locality_that_the_sentences_tell_of(capsys):
    text = shown(capsys, "info", ROOT / "traces" / "demo" / "trace")

    stats = routing_stats(Trace.open(ROOT / "traces" / "demo" / "trace"))
    assert stats.decode.reuse > 2 * stats.reuse_popular
    assert f"LRU alone would hit {stats.ratios[1].lru_hits:.0%}" in text
    assert "recency helps beyond popularity" in text


@pytest.mark.slow
def test_the_benchmark_of_reading_measures_every_layout():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "trace_reading.py"), "--quick", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [row[0] for row in document["tables"][0]["rows"]] == ["decode", "batched", "prefill"]
    assert all(bar["is_met"] for bar in document["bars"] if bar["is_judged"])

"""A killed run leaves a folder from which a valid trace of its whole steps is made."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from expertflow.tracer.check import check_trace
from expertflow.tracer.errors import TraceError, UsageError
from expertflow.tracer.salvage import salvage
from expertflow.tracer.store import Trace
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.writer import TraceWriter

TABLES = ("routing", "steps", "transfers", "sequences")
ENDLESS = """
import sys
from pathlib import Path
from expertflow.tracer import synthetic, synthetic_run, writer
original = writer.TraceWriter.__init__
def small_parts(self, *args, **more):
    original(self, *args, part_rows=60, **more)
writer.TraceWriter.__init__ = small_parts
synthetic.synthetic_trace(
    Path(sys.argv[1]), sequences=100_000, new_tokens=6, stream=True, lookahead=1
)
"""


def killed_after_parts(out: Path, parts: int) -> Path:
    listing = Path(f"{out}.partial") / "parts.jsonl"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(out)], env=env)
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            assert process.poll() is None
            if listing.exists() and listing.read_bytes().count(b"\n") >= parts:
                break
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return listing.parent


@pytest.mark.parametrize("parts", [9, 14, 23, 41])
def test_killed_run_is_salvaged_to_a_sound_trace(tmp_path, parts):
    partial = killed_after_parts(tmp_path / "t", parts)

    lost = salvage(partial, tmp_path / "t")

    report = check_trace(tmp_path / "t")
    assert report.salvaged
    assert report.steps >= 1
    assert [text for text in report.warnings if "Salvaged" in text] == [
        f"Salvaged: {words}" for words in lost
    ]
    assert partial.exists()


@pytest.fixture
def source(tmp_path):
    return synthetic_trace(tmp_path / "source", stream=True, new_tokens=8, sequences=4)


def left_behind(source: Trace, out: Path, part_rows: int = 40) -> Path:
    """The partial folder of a run that wrote everything but was killed before the end."""
    m = source.manifest
    writer = TraceWriter(
        out,
        shape=m.shape,
        hardware=m.hardware,
        run=m.run,
        provenance=m.provenance,
        recorded=m.recorded,
        part_rows=part_rows,
    )
    for step in range(m.rows("steps") // (m.shape.num_moe_layers + 1)):
        for name in TABLES[:3]:
            writer.append(name, source.table(name, filters=[("step", "=", step)]))
    writer.append("sequences", source.table("sequences"))
    writer.flush()
    return writer.partial


def test_nothing_is_lost_when_only_the_manifest_was_missing(source, tmp_path):
    partial = left_behind(source, tmp_path / "t")

    assert salvage(partial, tmp_path / "t") == []

    copy = Trace.open(tmp_path / "t")
    for name in TABLES:
        assert copy.table(name).to_pylist() == source.table(name).to_pylist()
    assert copy.manifest.salvaged


@pytest.mark.parametrize("table", ["routing", "steps"])
def test_damaged_part_costs_the_steps_from_there_on(source, tmp_path, table):
    partial = left_behind(source, tmp_path / "t")
    victim = partial / table / "part-00002.parquet"
    victim.write_bytes(victim.read_bytes()[:-7])

    lost = salvage(partial, tmp_path / "t")

    report = check_trace(tmp_path / "t")
    assert 0 < report.steps < 16
    assert any(f"{table}/part-00002.parquet is damaged" in words for words in lost)
    assert any("were not whole and were dropped" in words for words in lost)
    kept = Trace.open(tmp_path / "t").table("routing")
    assert kept.to_pylist() == source.table("routing").slice(0, kept.num_rows).to_pylist()


def test_torn_last_line_of_the_parts_list_is_dropped(source, tmp_path):
    partial = left_behind(source, tmp_path / "t")
    with (partial / "parts.jsonl").open("a") as parts:
        parts.write('{"table": "routing", "pa')

    lost = salvage(partial, tmp_path / "t")

    assert any("torn line" in words for words in lost)
    check_trace(tmp_path / "t")


def test_unfinished_sequences_are_rebuilt_from_the_routing(source, tmp_path):
    partial = left_behind(source, tmp_path / "t")
    for path in (partial / "sequences").iterdir():
        path.unlink()

    lost = salvage(partial, tmp_path / "t")

    found = Trace.open(tmp_path / "t").table("sequences").to_pylist()
    told = source.table("sequences").to_pylist()
    for name in ("sequence", "batch", "prompt_tokens", "generated_tokens"):
        assert [row[name] for row in found] == [row[name] for row in told]
    assert [row["ttft_s"] for row in found] == pytest.approx([row["ttft_s"] for row in told])
    assert {row["finish"] for row in found} == {"cut"}
    assert any("had not ended" in words for words in lost)


def test_complete_run_that_was_not_renamed_is_renamed(source, tmp_path):
    partial = source.path.rename(tmp_path / "t.partial")

    assert salvage(partial, tmp_path / "t") == []

    assert not Trace.open(tmp_path / "t").manifest.salvaged
    assert not partial.exists()


def test_damage_to_a_run_killed_while_closing_costs_only_its_part(source, tmp_path):
    partial = left_behind(source, tmp_path / "t")
    for name in ("manifest.json", "SHA256SUMS"):
        (partial / name).write_bytes((source.path / name).read_bytes())

    salvage(partial, tmp_path / "t")

    assert check_trace(tmp_path / "t").salvaged


def test_killed_salvage_can_be_run_again(source, tmp_path):
    partial = left_behind(source, tmp_path / "t")
    left_behind(source, tmp_path / "t.salvage")

    assert salvage(partial, tmp_path / "t") == []

    assert not (tmp_path / "t.salvage.partial").exists()


def test_nothing_whole_is_an_error_not_an_empty_trace(source, tmp_path):
    partial = left_behind(source, tmp_path / "t")
    for path in (partial / "steps").iterdir():
        path.unlink()

    with pytest.raises(TraceError, match="no step that is whole"):
        salvage(partial, tmp_path / "t")


def test_torn_header_is_named(source, tmp_path):
    partial = left_behind(source, tmp_path / "t")
    (partial / "header.json").write_text('{"shape":')

    with pytest.raises(TraceError, match=r"header\.json"):
        salvage(partial, tmp_path / "t")


def test_salvage_refuses_an_existing_output(source, tmp_path):
    partial = left_behind(source, tmp_path / "t")

    with pytest.raises(UsageError, match="exists"):
        salvage(partial, source.path)


def test_a_finished_trace_stays_where_it_is(source, tmp_path):
    with pytest.raises(UsageError, match=r"complete trace.*expertflow-trace check"):
        salvage(source.path, tmp_path / "elsewhere")

    assert Trace.open(source.path).manifest.trace_id
    assert not (tmp_path / "elsewhere").exists()

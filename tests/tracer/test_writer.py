"""Writing: bounded parts, refusals, crash safety, and what comes back is what went in."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from expertflow.tracer import writer as writer_module
from expertflow.tracer.check import check_trace
from expertflow.tracer.errors import ResourceError, TraceError, UsageError
from expertflow.tracer.salvage import salvage
from expertflow.tracer.store import Trace
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.writer import TraceWriter
from hypothesis import given, settings
from hypothesis import strategies as st

TABLES = ("routing", "steps", "transfers", "sequences")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "t"
    return synthetic_trace(path, lookahead=2, stream=True)


def new_writer(out: Path, source: Trace, **more) -> TraceWriter:
    m = source.manifest
    return TraceWriter(
        out,
        shape=m.shape,
        hardware=m.hardware,
        run=m.run,
        provenance=m.provenance,
        recorded=m.recorded,
        **more,
    )


@settings(max_examples=15, deadline=None)
@given(part_rows=st.integers(20, 400), piece=st.integers(7, 150))
def test_rows_come_back_in_order_however_they_are_cut(source, tmp_path_factory, part_rows, piece):
    out = tmp_path_factory.mktemp("round") / "t"

    with new_writer(out, source, part_rows=part_rows) as writer:
        for name in TABLES:
            rows = source.table(name)
            for start in range(0, rows.num_rows, piece):
                writer.append(name, rows.slice(start, piece))

    copy = Trace.open(out)
    for name in TABLES:
        assert copy.table(name).to_pylist() == source.table(name).to_pylist()
    limit = max(part_rows + piece, 1)
    assert all(file.rows <= limit for file in copy.manifest.tables["routing"])
    check_trace(out)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), top_k=st.integers(1, 4), rows=st.integers(0, 40))
def test_any_routing_survives_the_round_trip(tmp_path_factory, data, top_k, rows):
    base = synthetic_trace(
        tmp_path_factory.mktemp("any") / "base", layers=1, top_k=top_k, sequences=1, lookahead=1
    )
    draw = data.draw(
        st.lists(
            st.tuples(
                st.permutations(range(16)),
                st.integers(-1, 2**31 - 1),
                st.booleans(),
                st.floats(0, 1),
            ),
            min_size=rows,
            max_size=rows,
        )
    )
    records = [
        {
            "step": 0,
            "layer": 0,
            "sequence": 0,
            "position": position,
            "phase": "decode" if flag else "prefill",
            "token_id": 5,
            "modality": "pad" if position < 0 else "text",
            "experts": list(ids[:top_k]),
            "weights": [np.float16(weight)] * top_k,
            "lookahead_1": list(ids[:top_k]) if flag else None,
        }
        for ids, position, flag, weight in draw
    ]
    table = pa.Table.from_pylist(records, schema=base.schemas["routing"])
    out = tmp_path_factory.mktemp("any") / "t"

    with new_writer(out, base) as writer:
        writer.append("routing", table)
        writer.append("sequences", base.table("sequences"))
        writer.flush()
        if rows == 0:
            writer.append("routing", base.table("routing"))

    arrays = Trace.open(out).routing_arrays()
    if rows:
        assert arrays.experts.tolist() == [r["experts"] for r in records]
        assert arrays.phase_is_decode.tolist() == [r["phase"] == "decode" for r in records]
        assert arrays.is_pad.tolist() == [r["modality"] == "pad" for r in records]
        told = [r["lookahead_1"] or [65535] * top_k for r in records]
        assert arrays.lookahead[1].tolist() == told


def test_memory_is_bounded_by_part_rows(source, tmp_path):
    with new_writer(tmp_path / "t", source, part_rows=50) as writer:
        for start in range(0, 400, 10):
            writer.append("routing", source.table("routing").slice(start, 10))
            assert sum(rows.num_rows for rows in writer._buffers["routing"]) < 50
        writer.append("sequences", source.table("sequences"))


def test_existing_output_is_refused_and_named(source, tmp_path):
    (tmp_path / "t").mkdir()

    with pytest.raises(UsageError, match="--overwrite"):
        new_writer(tmp_path / "t", source)


def test_overwrite_keeps_the_old_trace_until_the_new_one_is_complete(source, tmp_path):
    out = synthetic_trace(tmp_path / "t", seed=3).path
    old = Trace.open(out).manifest.trace_id

    writer = new_writer(out, source, overwrite=True)
    for name in TABLES:
        writer.append(name, source.table(name))
    assert Trace.open(out).manifest.trace_id == old
    manifest = writer.close()

    assert Trace.open(out).manifest.trace_id == manifest.trace_id != old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


def test_overwrite_never_removes_a_folder_that_is_no_trace(source, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.tex").write_text("years of work")

    with pytest.raises(UsageError, match="not a trace"):
        new_writer(tmp_path / "t", source, overwrite=True)

    assert (tmp_path / "t" / "thesis.tex").exists()


def test_leftover_partial_is_refused_with_the_way_to_keep_it(source, tmp_path):
    new_writer(tmp_path / "t", source)

    with pytest.raises(UsageError, match=r"--salvage"):
        new_writer(tmp_path / "t", source)


def test_exception_in_the_block_leaves_a_flushed_partial(source, tmp_path):
    def fall_over():
        with new_writer(tmp_path / "t", source) as writer:
            for name in TABLES:
                writer.append(name, source.table(name))
            raise RuntimeError("the model fell over")

    with pytest.raises(RuntimeError):
        fall_over()

    assert not (tmp_path / "t").exists()
    assert salvage(tmp_path / "t.partial", tmp_path / "t") == []
    assert Trace.open(tmp_path / "t").table("routing").equals(source.table("routing"))


def test_full_disk_is_a_resource_error_with_a_next_step(source, tmp_path, monkeypatch):
    writer = new_writer(tmp_path / "t", source)
    writer.append("routing", source.table("routing"))

    def no_space(path, body):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer_module, "write_durably", no_space)
    with pytest.raises(ResourceError, match=r"No space left.*Free some space"):
        writer.flush()


def test_unwritable_folder_is_a_resource_error(source, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ResourceError):
        new_writer(tmp_path / "file" / "t", source)


def test_rows_that_do_not_fit_are_refused_with_the_column(source, tmp_path):
    with new_writer(tmp_path / "t", source) as writer:
        rows = source.table("routing")
        with pytest.raises(TraceError, match="lacks column 'experts'"):
            writer.append("routing", rows.drop_columns(["experts"]))
        with pytest.raises(TraceError, match="has no column 'extra'"):
            writer.append("routing", rows.append_column("extra", rows["step"]))
        holes = pa.array([None] * rows.num_rows, pa.int32())
        with pytest.raises(TraceError, match="'step' holds nulls"):
            writer.append("routing", rows.set_column(0, "step", holes))
        with pytest.raises(UsageError, match="Did you mean 'routing'"):
            writer.append("rooting", rows)
        for name in TABLES:
            writer.append(name, source.table(name))


def test_trace_without_routing_is_refused(source, tmp_path):
    with pytest.raises(TraceError, match="No routing was recorded"):
        new_writer(tmp_path / "t", source).close()

    assert not (tmp_path / "t").exists()


def test_card_names_every_table_for_load_dataset(source):
    yaml = pytest.importorskip("yaml")
    text = (source.path / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])

    configs = {config["config_name"]: config["data_files"][0]["path"] for config in head["configs"]}

    assert set(configs) == set(TABLES)
    for pattern in configs.values():
        assert list(source.path.glob(pattern))
    assert "declared" in text


def test_footer_says_what_a_stray_part_is(source):
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(source.path / "steps" / "part-00000.parquet").metadata

    assert metadata[b"expertflow.format"] == b"expertflow.trace/1"
    assert metadata[b"expertflow.table"] == b"steps"
    assert metadata[b"expertflow.part"] == b"0"


def test_manifest_is_plain_json_without_absolute_paths(source):
    text = (source.path / "manifest.json").read_text(encoding="utf-8")

    paths = [file["path"] for files in json.loads(text)["tables"].values() for file in files]

    assert not any(path.startswith("/") for path in paths)
    assert str(source.path.parent) not in text

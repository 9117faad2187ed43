"""Every kind of damage ends in one TraceError that names the file."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from expertflow.tracer.check import check_trace
from expertflow.tracer.errors import TraceError
from expertflow.tracer.schema import FileInfo
from expertflow.tracer.store import Trace
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.writer import TraceWriter, content_id

FILES = (
    "manifest.json",
    "SHA256SUMS",
    "sequences.parquet",
    "routing/part-00000.parquet",
    "steps/part-00000.parquet",
    "transfers/part-00000.parquet",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return synthetic_trace(tmp_path_factory.mktemp("damage") / "t", stream=True).path


@pytest.fixture
def copy(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "t"))


def assert_caught(copy: Path, name: str) -> None:
    with pytest.raises(TraceError) as caught:
        check_trace(copy)
    named = (name, "manifest.json") if name == "SHA256SUMS" else (name,)
    assert any(str(copy / file) in str(caught.value) for file in named), caught.value


@pytest.mark.parametrize("name", FILES)
def test_flipped_byte_anywhere_is_caught(copy, name):
    path = copy / name
    body = path.read_bytes()
    rng = np.random.default_rng(5)

    for offset in {0, len(body) - 1, *rng.integers(0, len(body), 40).tolist()}:
        damaged = bytearray(body)
        damaged[offset] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        assert_caught(copy, name)


@pytest.mark.parametrize("name", FILES)
def test_truncation_anywhere_is_caught(copy, name):
    path = copy / name
    body = path.read_bytes()

    for length in {0, 1, 4, len(body) - 1, *range(0, len(body), max(1, len(body) // 20))}:
        path.write_bytes(body[:length])
        assert_caught(copy, name)


@pytest.mark.parametrize("name", FILES)
def test_deleted_file_is_caught(copy, name):
    (copy / name).unlink()

    with pytest.raises(TraceError, match=name):
        check_trace(copy)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".parquet")])
def test_foreign_parquet_is_caught(copy, name):
    pd.DataFrame({"a": [1, 2, 3]}).to_parquet(copy / name)

    assert_caught(copy, name)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".parquet")])
def test_foreign_parquet_of_the_same_size_is_caught_while_reading(copy, name):
    size = (copy / name).stat().st_size
    body = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1, 2, 3]}), body)
    foreign = body.getvalue().to_pybytes()
    (copy / name).write_bytes(foreign[:4] + b"\0" * (size - len(foreign)) + foreign[4:])

    with pytest.raises(TraceError, match=name):
        Trace.open(copy).table(name.split("/")[0].removesuffix(".parquet"))
    assert_caught(copy, name)


def test_flipped_bytes_never_pass_as_data_without_a_check(copy):
    name = "routing/part-00000.parquet"
    body = (copy / name).read_bytes()

    for offset in np.random.default_rng(1).integers(4, len(body), 60).tolist():
        damaged = bytearray(body)
        damaged[offset] ^= 0x10
        (copy / name).write_bytes(damaged)
        with pytest.raises(TraceError, match=name):
            Trace.open(copy).table("routing", ["step"])


BROKEN = {"empty": "", "cut": "{", "list": "[]", "null": "null", "deep": "[" * 100_000, "odd": "{}"}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_broken_manifest_is_caught(copy, text):
    (copy / "manifest.json").write_text(text)

    assert_caught(copy, "manifest.json")


def test_manifest_field_of_the_wrong_kind_is_named(copy):
    document = json.loads((copy / "manifest.json").read_text())
    document["shape"]["top_k"] = "two"
    (copy / "manifest.json").write_text(json.dumps(document))

    with pytest.raises(TraceError, match=r"manifest\.json\.shape\.top_k"):
        check_trace(copy)


def test_changed_shape_is_caught_even_on_opening(copy):
    document = json.loads((copy / "manifest.json").read_text())
    document["shape"]["expert_bytes"] *= 2
    (copy / "manifest.json").write_text(json.dumps(document))
    (copy / "SHA256SUMS").unlink()

    with pytest.raises(TraceError, match="changed after the trace was written"):
        Trace.open(copy)


def test_part_the_manifest_does_not_list_is_caught(copy):
    shutil.copy(copy / "routing/part-00000.parquet", copy / "routing/part-00001.parquet")

    assert_caught(copy, "routing/part-00001.parquet")


def test_other_strays_are_only_warned_of(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / ".gitattributes").write_text("")

    warnings = check_trace(copy).warnings

    assert [text for text in warnings if "notes.txt" in text]
    assert not [text for text in warnings if ".gitattributes" in text]


def rewritten(source: Path, out: Path, change) -> Path:
    """A trace with right hashes whose routing or steps were changed in meaning."""
    trace = Trace.open(source)
    m = trace.manifest
    writer = TraceWriter(
        out,
        shape=m.shape,
        hardware=m.hardware,
        run=m.run,
        provenance=m.provenance,
        recorded=m.recorded,
    )
    with writer:
        for name in ("routing", "steps", "transfers", "sequences"):
            writer.append(name, change(name, trace.table(name)))
    return out


def with_experts(rows: pa.Table, edit) -> pa.Table:
    ids = np.stack(rows["experts"].to_pylist()).astype(np.uint16)
    edit(ids)
    column = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), ids.shape[1])
    return rows.set_column(rows.schema.get_field_index("experts"), "experts", column)


def too_high(ids):
    ids[5, 0] = 999


def twice(ids):
    ids[5] = 3


@pytest.mark.parametrize(("edit", "words"), [(too_high, "expert 999"), (twice, "one expert twice")])
def test_impossible_ids_are_caught(source, tmp_path, edit, words):
    out = rewritten(
        source,
        tmp_path / "t",
        lambda name, rows: with_experts(rows, edit) if name == "routing" else rows,
    )

    with pytest.raises(TraceError, match=rf"part-00000\.parquet.*{words}"):
        check_trace(out)


@pytest.mark.parametrize(
    ("table", "drop", "words"),
    [
        ("routing", lambda rows: rows.slice(1), "layers of different lengths"),
        ("routing", lambda rows: rows.filter(rows["layer"].to_numpy() != 1), "lacks layer 1"),
        ("steps", lambda rows: rows.slice(0, rows.num_rows - 1), "whole-step rows"),
        ("steps", lambda rows: rows.slice(1), "do not match the routing"),
        ("sequences", lambda rows: rows.slice(1), "sequence 0 .* not listed"),
        ("sequences", lambda rows: pa.concat_tables([rows, rows]), "listed twice"),
    ],
)
def test_tables_that_disagree_are_caught(source, tmp_path, table, drop, words):
    out = rewritten(
        source, tmp_path / "t", lambda name, rows: drop(rows) if name == table else rows
    )

    with pytest.raises(TraceError, match=words):
        check_trace(out)


def test_manifest_hash_is_over_the_bytes_on_disk(copy):
    sums = (copy / "SHA256SUMS").read_text().splitlines()

    for line in sums:
        digest, name = line.split("  ")
        assert hashlib.sha256((copy / name).read_bytes()).hexdigest() == digest


def test_report_is_a_plain_record(source):
    assert dataclasses.asdict(check_trace(source))["rows"]["sequences"] == 4


NO_CURVES = {"name": "x", "origin": "measured", "curves": []}


def sealed(copy: Path, change) -> Path:
    """Change the manifest as a careless writer would: with hashes that fit."""
    document = json.loads((copy / "manifest.json").read_text())
    change(document)
    files = [FileInfo(**file) for listed in document["tables"].values() for file in listed]
    document["trace_id"] = content_id(document["shape"], files)
    (copy / "manifest.json").write_text(json.dumps(document))
    (copy / "SHA256SUMS").unlink()
    return copy


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("shape", "expert_bytes"), -5, "expert_bytes is negative"),
        (("hardware", "link"), NO_CURVES, "curves of its link"),
        (("hardware", "link", "curves", 0, "points"), [], "curves of its link"),
        (("hardware", "link", "curves", 0, "points"), [[1, float("nan")]], "curves of its link"),
        (("hardware", "link", "curves", 0, "points"), [[1000, -1.0]], "curves of its link"),
    ],
)
def test_a_manifest_of_impossible_numbers_is_refused_on_opening(copy, path, value, words):
    def change(document):
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    with pytest.raises(TraceError, match=words):
        Trace.open(sealed(copy, change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda shape: shape.update(num_experts=shape["top_k"]), "names expert"),
        (lambda shape: shape.update(moe_layers=[0]), "a layer outside 0 to 0"),
    ],
    ids=["experts", "layers"],
)
def test_routing_to_what_the_model_lacks_is_refused_while_reading(copy, change, words):
    trace = Trace.open(sealed(copy, lambda document: change(document["shape"])))

    with pytest.raises(TraceError, match=f"{words}.*expertflow-trace check"):
        trace.routing_arrays()

"""Reading: what opens, what is refused and in which words."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from expertflow.tracer.arrays import expert_ids
from expertflow.tracer.errors import TraceError, UsageError
from expertflow.tracer.store import NO_EXPERT, Trace
from expertflow.tracer.synthetic import synthetic_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return synthetic_trace(tmp_path_factory.mktemp("store") / "t", lookahead=2)


def test_columns_and_filters_are_pushed_down(trace):
    rows = trace.table(
        "routing", ["step", "experts"], [("phase", "==", "decode"), ("layer", "=", 2)]
    )

    assert rows.column_names == ["step", "experts"]
    everything = trace.table("routing").to_pandas()
    assert rows.num_rows == ((everything.phase == "decode") & (everything.layer == 2)).sum()


def test_an_expression_filters_too(trace):
    rows = trace.table("steps", filters=pc.field("layer") == -1)

    assert set(rows["layer"].to_pylist()) == {-1}


def test_unknown_names_are_usage_errors_with_the_nearest(trace):
    with pytest.raises(UsageError, match="Did you mean 'routing'"):
        trace.table("routng")
    with pytest.raises(UsageError, match="Did you mean 'experts'"):
        trace.table("routing", ["expert"])
    with pytest.raises(UsageError, match="Did you mean 'layer'"):
        trace.table("routing", filters=[("layers", "=", 1)])


def test_table_that_was_not_recorded_is_empty(trace):
    rows = trace.table("transfers")

    assert rows.num_rows == 0
    assert rows.schema.equals(trace.schemas["transfers"])


def test_arrays_agree_with_the_table(trace):
    arrays = trace.routing_arrays()
    rows = trace.table("routing").to_pydict()

    assert arrays.experts.dtype == np.uint16
    assert arrays.experts.tolist() == rows["experts"]
    assert arrays.weights is not None
    assert arrays.weights.tolist() == rows["weights"]
    assert arrays.is_pad.tolist() == [label == "pad" for label in rows["modality"]]
    assert (arrays.is_pad == (arrays.position == -1)).all()
    for depth in (1, 2):
        told = [ids or [NO_EXPERT] * 2 for ids in rows[f"lookahead_{depth}"]]
        assert arrays.lookahead[depth].tolist() == told


def test_duckdb_reads_the_parts(trace):
    duckdb = pytest.importorskip("duckdb")
    pattern = str(trace.path / "routing" / "*.parquet")

    found = duckdb.sql(f"select count(*) from '{pattern}' where len(experts) = 2").fetchall()

    assert found == [(trace.manifest.rows("routing"),)]


def test_polars_reads_the_parts(trace):
    polars = pytest.importorskip("polars")

    found = polars.read_parquet(str(trace.path / "routing" / "*.parquet"))

    assert found.height == trace.manifest.rows("routing")


def test_pandas_reads_the_parts(trace):
    pandas = pytest.importorskip("pandas")

    found = pandas.read_parquet(trace.path / "routing")

    assert len(found) == trace.manifest.rows("routing")


def test_missing_folder_says_so(tmp_path):
    with pytest.raises(TraceError, match=r"nowhere does not exist"):
        Trace.open(tmp_path / "nowhere")


def test_folder_without_manifest_is_no_trace(tmp_path):
    with pytest.raises(TraceError, match=r"no manifest.json"):
        Trace.open(tmp_path)


def test_partial_is_named_with_the_salvage_command(tmp_path):
    (tmp_path / "t.partial").mkdir()
    (tmp_path / "t.partial" / "header.json").write_text("{}")

    for path in (tmp_path / "t", tmp_path / "t.partial"):
        with pytest.raises(TraceError, match=r"check .*t\.partial --salvage .*t`"):
            Trace.open(path)


def test_other_format_version_says_which_is_read(trace, tmp_path):
    copy = shutil.copytree(trace.path, tmp_path / "t")
    document = json.loads((copy / "manifest.json").read_text())
    document["format"] = "expertflow.trace/9"
    (copy / "manifest.json").write_text(json.dumps(document))

    with pytest.raises(TraceError, match=r"expertflow\.trace/9.*reads 'expertflow\.trace/1'"):
        Trace.open(copy)


@pytest.mark.parametrize("path", ["../outside.parquet", "/etc/hostname"])
def test_manifest_cannot_point_outside_its_folder(trace, tmp_path, path):
    copy = shutil.copytree(trace.path, tmp_path / "t")
    document = json.loads((copy / "manifest.json").read_text())
    document["tables"]["steps"][0]["path"] = path
    (copy / "manifest.json").write_text(json.dumps(document))

    with pytest.raises(TraceError, match="not the path of a file in this folder"):
        Trace.open(copy)


def test_unknown_numbers_are_nan_and_unknown_ids_are_no_expert():
    half, ids = pa.list_(pa.float16(), 2), pa.list_(pa.uint16(), 2)
    weights = pa.array([[0.5, None], None, [0.25, 0.75]], half).slice(0, 3)
    experts = pa.array([[3, 4], [5, None], None], ids)

    told = expert_ids(pa.chunked_array([weights, weights.slice(2)])).tolist()

    assert [[None if np.isnan(w) else w for w in row] for row in told] == [
        [0.5, None],
        [None, None],
        [0.25, 0.75],
        [0.25, 0.75],
    ]
    assert expert_ids(pa.chunked_array([experts])).tolist() == [
        [3, 4],
        [5, NO_EXPERT],
        [NO_EXPERT, NO_EXPERT],
    ]


def test_hugging_face_datasets_load_every_table_of_the_folder(trace, tmp_path, monkeypatch):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    datasets = pytest.importorskip("datasets")

    for name in trace.manifest.tables:
        loaded = datasets.load_dataset(
            str(trace.path), name, split="train", cache_dir=str(tmp_path)
        )
        assert loaded.num_rows == trace.manifest.rows(name)
    default = datasets.load_dataset(str(trace.path), split="train", cache_dir=str(tmp_path))
    assert default[0]["experts"] == trace.table("routing")["experts"][0].as_py()

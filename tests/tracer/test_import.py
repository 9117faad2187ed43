"""Published routing as a trace: both layouts, both phases, what is mended and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from expertflow.tracer.check import check_trace
from expertflow.tracer.errors import InputError, TraceError, UsageError
from expertflow.tracer.importers.npz import import_npz
from expertflow.tracer.importers.request import ImportRequest
from expertflow.tracer.importers.untimed import UNTIMED
from expertflow.tracer.main import main
from expertflow.tracer.schema import WHOLE_STEP
from expertflow.tracer.store import Trace
from expertflow.tracer.synthetic import synthetic_trace

TOKENS, LAYERS, TOP_K, EXPERTS = 10, 3, 2, 8
BOUNDS = np.asarray([0, 4, 5, 10])
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def drawn(tokens=TOKENS, layers=LAYERS, seed=0) -> np.ndarray:
    """Ids [tokens, layers, k] without duplicates; the last expert is named at least once."""
    dice = np.random.default_rng(seed)
    ids = np.argsort(dice.random((tokens, layers, EXPERTS)), axis=2)[..., :TOP_K]
    ids[0, 0] = [EXPERTS - 1, 0]
    return ids.astype(np.uint8)


def saved(folder: Path, **arrays) -> Path:
    path = folder / "routing.npz"
    np.savez(path, **arrays)
    return path


def imported(folder: Path, more=None, **arrays) -> Trace:
    arrays = {"expert_ids": drawn(), "seq_bounds": BOUNDS} | arrays
    path = saved(folder, **{key: value for key, value in arrays.items() if value is not None})
    import_npz(ImportRequest(file=path, out=folder / "t", overwrite=True, **(more or {})))
    check_trace(folder / "t")
    return Trace.open(folder / "t")


def ran(capsys, *args) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(stop.value.code), out, err


# --- what comes out ----------------------------------------------------------------------------


def test_each_row_becomes_one_decode_step(tmp_path):
    trace = imported(tmp_path)
    rows = trace.routing_arrays()

    assert rows.experts.reshape(TOKENS, LAYERS, TOP_K).tolist() == drawn().tolist()
    assert rows.step.tolist() == np.repeat(np.arange(TOKENS), LAYERS).tolist()
    assert rows.layer.tolist() == list(range(LAYERS)) * TOKENS
    assert rows.sequence[::LAYERS].tolist() == [0] * 4 + [1] + [2] * 5
    assert rows.position[::LAYERS].tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4]
    assert rows.phase_is_decode.all()
    assert (rows.token_id == -1).all()
    sequences = trace.table("sequences").to_pydict()
    assert sequences["prompt_tokens"] == [0, 0, 0]
    assert sequences["generated_tokens"] == [4, 1, 5]


def test_each_sequence_becomes_one_prefill_step(tmp_path):
    trace = imported(tmp_path, {"phase": "prefill"})
    rows = trace.routing_arrays()

    third = rows.step == 2
    by_layer = rows.experts[third].reshape(LAYERS, 5, TOP_K)
    assert by_layer.tolist() == drawn()[5:].transpose(1, 0, 2).tolist()
    assert rows.layer[third].tolist() == np.repeat(np.arange(LAYERS), 5).tolist()
    assert not rows.phase_is_decode.any()
    sequences = trace.table("sequences").to_pydict()
    assert sequences["prompt_tokens"] == [4, 1, 5]
    assert sequences["generated_tokens"] == [0, 0, 0]


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_steps_hold_sizes_and_no_times(tmp_path, phase):
    trace = imported(tmp_path, {"phase": phase})
    steps = trace.table("steps").to_pandas()
    routing = trace.routing_arrays()

    whole = steps[steps.layer == WHOLE_STEP]
    sizes = [1] * TOKENS if phase == "decode" else [4, 1, 5]
    context = [1, 2, 3, 4, 1, 1, 2, 3, 4, 5] if phase == "decode" else sizes
    assert whole.tokens.tolist() == sizes
    assert whole.context.tolist() == context
    assert (steps.batch == 1).all()
    for row in steps[steps.layer != WHOLE_STEP].itertuples():
        is_in = (routing.step == row.step) & (routing.layer == row.layer)
        assert row.distinct == len(np.unique(routing.experts[is_in]))
    assert steps.filter(like="_s").isna().all(axis=None)


def test_a_trace_without_times_says_so_everywhere(tmp_path):
    trace = imported(tmp_path)

    assert not trace.has_times
    assert "steps" not in trace.manifest.recorded
    assert trace.hardware.name == "not recorded"
    assert trace.hardware.origin == "declared"
    assert trace.manifest.provenance.text == "imported"
    assert UNTIMED in trace.manifest.warnings
    assert synthetic_trace(tmp_path / "timed").has_times


def test_times_where_none_were_recorded_are_damage(tmp_path):
    from expertflow.tracer import store

    trace = imported(tmp_path)
    path = trace.path / "manifest.json"
    document = json.loads(path.read_text())
    document["recorded"].append("steps")
    body = json.dumps(document)
    path.write_text(body)
    sums = trace.path / store.CHECKSUMS
    lines = [line for line in sums.read_text().splitlines() if not line.endswith(path.name)]
    digest = store.hashlib.sha256(body.encode()).hexdigest()
    sums.write_text("\n".join([*lines, f"{digest}  {path.name}"]) + "\n")

    with pytest.raises(TraceError, match="times were recorded"):
        check_trace(trace.path)


def test_layers_may_come_first(tmp_path):
    first = imported(tmp_path).routing_arrays().experts
    second = imported(tmp_path, expert_ids=drawn().swapaxes(0, 1)).routing_arrays().experts

    assert first.tolist() == second.tolist()


def test_gate_weights_put_experts_in_order(tmp_path):
    ids = drawn()
    gates = np.tile(np.float32([0.25, 0.5]), (TOKENS, LAYERS, 1))
    trace = imported(tmp_path, gate_weights=gates)
    rows = trace.routing_arrays()

    assert rows.experts.reshape(ids.shape).tolist() == ids[..., ::-1].tolist()
    assert rows.weights is not None
    assert (rows.weights == [0.5, 0.25]).all()
    assert "weights" in trace.manifest.recorded
    assert any("not in order of weight" in text for text in trace.manifest.warnings)


def test_ids_in_order_of_number_are_noticed(tmp_path):
    trace = imported(tmp_path, expert_ids=np.sort(drawn(), axis=2))

    assert any("order of their numbers" in text for text in trace.manifest.warnings)


def test_without_bounds_there_is_one_sequence_and_a_warning(tmp_path):
    trace = imported(tmp_path, seq_bounds=None)

    assert trace.manifest.rows("sequences") == 1
    assert any("seq_bounds" in text for text in trace.manifest.warnings)


@pytest.mark.parametrize(
    ("labels", "asked", "domains"),
    [
        ({}, None, ["", "", ""]),
        ({"dataset": ["a", "b", "a"]}, None, ["a", "b", "a"]),
        ({"dataset": ["a", "b", "a"], "category": ["x", "y", "z"]}, None, ["x", "y", "z"]),
        ({"dataset": ["a", "b", "a"], "category": ["x", "y", "z"]}, "dataset", ["a", "b", "a"]),
        ({"repetition": [True, False, True]}, "repetition", ["True", "False", "True"]),
    ],
)
def test_a_label_of_sequences_becomes_their_domain(tmp_path, labels, asked, domains):
    trace = imported(tmp_path, {"domain": asked}, **labels)

    assert trace.table("sequences")["domain"].to_pylist() == domains


def test_experts_are_counted_or_guessed(tmp_path):
    guessed = imported(tmp_path)
    told = imported(tmp_path, {"experts": 16, "expert_bytes": 5, "hidden_size": 7})

    assert guessed.shape.num_experts == EXPERTS
    assert any("guessed from the highest id" in text for text in guessed.manifest.warnings)
    assert told.shape.num_experts == 16
    assert told.shape.expert_bytes == 5
    assert told.shape.hidden_size == 7
    assert not any("guessed" in text for text in told.manifest.warnings)


@pytest.mark.parametrize("limit", [1, 3, 6, 9, 10, 99])
def test_a_limit_keeps_whole_sequences_if_it_can(tmp_path, limit):
    trace = imported(tmp_path, {"limit_tokens": limit})
    lengths = trace.table("sequences")["generated_tokens"].to_pylist()

    assert sum(lengths) <= limit
    assert set(lengths) <= {4, 1, 5} or len(lengths) == 1
    rows = trace.routing_arrays()
    assert rows.experts[: lengths[0] * LAYERS].tolist() == (
        drawn()[: lengths[0]].reshape(-1, TOP_K).tolist()
    )


def test_large_files_are_written_block_by_block(tmp_path, monkeypatch):
    from expertflow.tracer.importers import mend, untimed

    whole = imported(tmp_path).routing_arrays().experts
    monkeypatch.setattr(untimed, "_ROWS_PER_BLOCK", 2 * LAYERS)
    monkeypatch.setattr(untimed, "_ROWS_PER_PART", 3 * LAYERS)
    monkeypatch.setattr(mend, "_TOKENS_PER_CHECK", 3)
    pieces = imported(tmp_path)

    assert len(pieces.manifest.tables["routing"]) > 1
    assert pieces.routing_arrays().experts.tolist() == whole.tolist()


# --- what is refused ---------------------------------------------------------------------------


def twice() -> np.ndarray:
    ids = drawn()
    ids[7, 2] = [3, 3]
    return ids


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"expert_ids": None}, "lacks the array expert_ids; it holds seq_bounds"),
        ({"expert_ids": drawn().astype(np.float32)}, "is float32"),
        ({"expert_ids": drawn()[:, :, 0]}, r"shape \[10, 3\]"),
        ({"expert_ids": drawn()[:0]}, "empty"),
        ({"expert_ids": np.asarray([[[{}]]])}, "Python objects"),
        ({"expert_ids": twice()}, "one expert twice for token 7 in layer 2"),
        ({"expert_ids": drawn().astype(np.int16) - 1}, "holds -1"),
        ({"expert_ids": drawn().astype(np.int32) + 70_000}, "expected 0 to 65534"),
        ({"expert_ids": drawn(3), "seq_bounds": [0, 3]}, "--layout tokens-first"),
        ({"seq_bounds": [0, 4, 9]}, "ends at 9"),
        ({"seq_bounds": [1, 10]}, "does not start at 0"),
        ({"seq_bounds": [0, 6, 4, 10]}, r"does not ascend \(entry 2 is 4\)"),
        ({"seq_bounds": [0.0, 10.0]}, "is float64"),
        ({"gate_weights": np.ones((TOKENS, LAYERS), np.float32)}, "gate_weights is float32"),
        ({"gate_weights": np.full((TOKENS, LAYERS, TOP_K), np.nan)}, "not finite"),
    ],
)
def test_a_wrong_array_is_named(tmp_path, arrays, words):
    with pytest.raises(InputError, match=words):
        imported(tmp_path, **arrays)

    assert not (tmp_path / "t").exists()
    assert not (tmp_path / "t.partial").exists()


def test_a_layout_settles_what_the_sizes_leave_open(tmp_path):
    ids, bounds = drawn(3), [0, 3]
    found = []
    for layout in ("tokens-first", "layers-first"):
        trace = imported(tmp_path, {"layout": layout}, expert_ids=ids, seq_bounds=bounds)
        found.append(trace.routing_arrays().experts.reshape(ids.shape).tolist())

    assert found == [ids.tolist(), ids.swapaxes(0, 1).tolist()]


@pytest.mark.parametrize("body", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_what_is_no_archive_is_refused(tmp_path, body):
    path = tmp_path / "routing.npz"
    path.write_bytes(body)

    with pytest.raises(InputError, match="not a numpy archive"):
        import_npz(ImportRequest(file=path, out=tmp_path / "t"))


def test_a_single_array_is_no_archive(tmp_path):
    np.save(tmp_path / "ids.npy", drawn())

    with pytest.raises(InputError, match="not a numpy archive"):
        import_npz(ImportRequest(file=tmp_path / "ids.npy", out=tmp_path / "t"))


def test_a_damaged_array_is_named(tmp_path):
    path = saved(tmp_path, expert_ids=drawn(), seq_bounds=BOUNDS)
    body = bytearray(path.read_bytes())
    body[body.index(drawn().tobytes())] ^= 1
    path.write_bytes(bytes(body))

    with pytest.raises(InputError, match="expert_ids is damaged"):
        import_npz(ImportRequest(file=path, out=tmp_path / "t"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"phase": "decoding"}, "Did you mean 'decode'"),
        ({"layout": "tokens"}, "Did you mean 'tokens-first'"),
        ({"domain": "categry"}, "Did you mean 'category'"),
        ({"experts": 0}, "--experts"),
        ({"limit_tokens": 0}, "--limit-tokens"),
        ({"hidden_size": -1}, "--hidden-size"),
    ],
)
def test_a_wrong_option_is_a_usage_error(tmp_path, more, words):
    with pytest.raises(UsageError, match=words):
        imported(tmp_path, more, category=["x", "y", "z"])


def test_a_label_of_another_length_is_no_domain(tmp_path):
    with pytest.raises(InputError, match=r"one name per sequence, \[3\]"):
        imported(tmp_path, {"domain": "category"}, category=["x", "y"])


def test_ids_beyond_the_number_of_experts_are_refused(tmp_path):
    with pytest.raises(InputError, match="names expert 7, but --experts 4"):
        imported(tmp_path, {"experts": 4})


# --- the command -------------------------------------------------------------------------------


def test_the_command_imports_and_its_trace_can_be_read(capsys, tmp_path):
    path = saved(tmp_path, expert_ids=drawn(), seq_bounds=BOUNDS, category=["x", "y", "x"])
    out = tmp_path / "t"

    code, text, err = ran(
        capsys, "import", path, "--out", out, "--experts", 8, "--expert-bytes", "2MB", "--json"
    )

    document = json.loads(text)
    assert code == 0
    assert document["format"] == "expertflow.import/1"
    assert document["rows"] == {"routing": 30, "steps": 40, "sequences": 3}
    assert document["shape"]["expert_bytes"] == 2_000_000
    assert "no times were recorded" in err
    assert ran(capsys, "check", out)[0] == 0
    assert ran(capsys, "info", out)[0] == 0
    assert ran(capsys, "info", out, "--json")[0] == 0


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--phase", "both"), 2),
        (("--expert-bytes", "many"), 2),
        (("--experts", "3"), 3),
        ((), 0),
    ],
)
def test_the_command_ends_with_the_code_of_what_was_wrong(capsys, tmp_path, more, code):
    path = saved(tmp_path, expert_ids=drawn(), seq_bounds=BOUNDS)
    done, _, err = ran(capsys, "import", path, "--out", tmp_path / "t", *more)

    assert done == code
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == (code > 0)
    assert "bug" not in err


def test_a_missing_file_is_an_input_error(capsys, tmp_path):
    assert ran(capsys, "import", tmp_path / "none.npz", "--out", tmp_path / "t")[0] == 3


def test_an_existing_trace_is_replaced_only_on_demand(capsys, tmp_path):
    path = saved(tmp_path, expert_ids=drawn(), seq_bounds=BOUNDS)
    args = ("import", path, "--out", tmp_path / "t")

    assert ran(capsys, *args)[0] == 0
    assert ran(capsys, *args)[0] == 2
    assert ran(capsys, *args, "--overwrite")[0] == 0


@pytest.mark.parametrize("domain", ["intent", "law", "summary"])
def test_published_prefill_routing_imports(tmp_path, domain):
    path = DATA / "deepseek-v2-lite-prefill" / f"{domain}.npz"
    if not path.is_file():
        pytest.skip("the published routing is not on this machine")
    import_npz(ImportRequest(file=path, out=tmp_path / "t", phase="prefill", experts=64))
    report = check_trace(tmp_path / "t")

    assert report.steps == report.rows["sequences"]
    assert any("not in order of weight" in text for text in report.warnings)


def test_published_decode_routing_imports(tmp_path):
    path = DATA / "gpt-oss-20b-decode" / "routing.npz"
    if not path.is_file():
        pytest.skip("the published routing is not on this machine")
    manifest = import_npz(
        ImportRequest(file=path, out=tmp_path / "t", domain="dataset", limit_tokens=5000)
    )
    trace = Trace.open(tmp_path / "t")

    assert manifest.shape.num_experts == 32
    assert manifest.shape.num_moe_layers == 24
    assert len(set(trace.table("sequences")["domain"].to_pylist())) > 1
    assert check_trace(tmp_path / "t").steps <= 5000

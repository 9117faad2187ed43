"""Traced runs of the tiny model: the trace is sound, whole, and the same however the model lives."""

import numpy as np
import pytest
import torch
from expertflow.tracer.check import check_trace
from expertflow.tracer.console import progress
from expertflow.tracer.errors import ResourceError, TraceError, UsageError
from expertflow.tracer.load import load_model
from expertflow.tracer.schema import WHOLE_STEP
from expertflow.tracer.store import NO_EXPERT, Trace
from expertflow.tracer.tracing import TraceRequest, trace_run

from tests.models import FAMILIES, TEXTS, tiny, write_prompts

NEW_TOKENS = 6


def traced(folder, *, family="olmoe", texts=TEXTS, name="t", **more) -> Trace:
    prompts = write_prompts(folder / f"{name}.jsonl", texts)
    settings = {
        "model": str(tiny(family)),
        "max_new_tokens": NEW_TOKENS,
        "batch_size": 2,
        "device": "cpu",
        "threads": 1,
    }
    request = TraceRequest(out=folder / name, prompts=prompts, **{**settings, **more})
    trace_run(request, progress=progress, say=lambda words: None)
    return Trace.open(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("record")


@pytest.fixture(scope="module")
def resident(folder):
    return traced(folder, name="resident", residency="resident", lookahead=2)


@pytest.fixture(scope="module")
def stream(folder):
    return traced(folder, name="stream", residency="stream", lookahead=2, link="1GB/s+10us")


def test_trace_of_a_run_passes_the_check(resident, stream):
    for trace in (resident, stream):
        report = check_trace(trace.path)
        assert not report.salvaged
        assert report.steps == 3 * NEW_TOKENS
        assert [word for word in report.warnings if "scatter" not in word] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_traced_both_ways(tmp_path, family):
    traces = [
        traced(tmp_path, family=family, texts=TEXTS[:2], name=kind, residency=kind)
        for kind in ("resident", "stream")
    ]

    for trace in traces:
        check_trace(trace.path)
    assert output_ids(traces[0]) == output_ids(traces[1])
    same_routing(traces[0], traces[1])


def output_ids(trace: Trace) -> list[list[int]]:
    return trace.table("sequences", columns=["output_ids"])["output_ids"].to_pylist()


def same_routing(one: Trace, other: Trace) -> None:
    ours, theirs = one.routing_arrays(), other.routing_arrays()
    for name in ("step", "layer", "sequence", "position", "token_id", "experts"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.lookahead.keys() == theirs.lookahead.keys()
    for depth, ids in ours.lookahead.items():
        assert np.array_equal(ids, theirs.lookahead[depth])


def test_streaming_gives_the_residents_text_and_routing(resident, stream):
    assert output_ids(resident) == output_ids(stream)
    same_routing(resident, stream)


def test_text_is_that_of_generate(resident):
    loaded = load_model(str(tiny()), device=torch.device("cpu"))
    expected = []
    for text in TEXTS:
        ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        output = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=1,
        )
        expected.append(output[0, ids.shape[1] :].tolist())

    assert output_ids(resident) == expected


def test_routing_has_a_row_for_every_token_in_every_layer(resident):
    table = resident.table("steps").to_pandas()
    whole, layers = table[table.layer == WHOLE_STEP], table[table.layer != WHOLE_STEP]
    routing = resident.routing_arrays()

    assert len(routing.step) == int(whole.tokens.sum()) * 3 == int(layers.tokens.sum())
    assert np.array_equal(np.unique(routing.layer), [0, 1, 2])
    lengths = [len(text.encode()) for text in TEXTS]
    real = (routing.layer == 0) & ~routing.is_pad
    assert real.sum() == sum(lengths) + len(TEXTS) * (NEW_TOKENS - 1)


def test_prompt_tokens_stand_in_the_routing_in_order(resident):
    routing = resident.routing_arrays()
    for number, text in enumerate(TEXTS):
        own = (routing.sequence == number) & (routing.layer == 1) & ~routing.phase_is_decode
        own &= ~routing.is_pad
        assert routing.position[own].tolist() == list(range(len(text.encode())))
        assert len(set(routing.token_id[own].tolist())) == len(set(text))


def test_steps_say_how_many_experts_were_distinct(resident):
    routing = resident.routing_arrays()
    table = resident.table("steps").to_pandas()
    for row in table[table.layer != WHOLE_STEP].itertuples():
        own = (routing.step == row.step) & (routing.layer == row.layer)
        assert row.distinct == len(np.unique(routing.experts[own]))


def test_times_of_a_layer_add_up_and_fit_into_their_step(resident, stream):
    for trace in (resident, stream):
        table = trace.table("steps").to_pandas()
        laps = ["mixer_s", "readback_s", "decision_s", "lookahead_s", "stall_s", "experts_s"]
        layers = table[table.layer != WHOLE_STEP]
        whole = table[table.layer == WHOLE_STEP].set_index("step")
        assert (table[laps] >= 0).all().all()
        assert np.allclose(layers[laps].sum(axis=1), layers.total_s)
        inside = layers.groupby("step").total_s.sum()
        assert (inside <= whole.total_s.loc[inside.index] + 1e-6).all()


def test_streaming_records_every_copy_it_made(stream):
    copies = stream.table("transfers").to_pandas()
    steps = stream.table("steps").to_pandas()
    demanded = steps[steps.layer != WHOLE_STEP]

    assert len(copies) == demanded.distinct.sum()
    assert (copies.bytes == stream.shape.expert_bytes).all()
    assert (copies.why == "demand").all()
    assert (copies.queued_s <= copies.start_s).all()
    assert (copies.start_s <= copies.end_s).all()
    nominal = 10e-6 + stream.shape.expert_bytes / 1e9
    assert (copies.end_s - copies.start_s >= nominal * 0.999).all()
    by_event = copies.groupby(["step", "layer"]).size()
    told = demanded.set_index(["step", "layer"]).distinct
    assert by_event.to_dict() == told.to_dict()


def test_resident_run_moves_nothing(resident):
    assert resident.manifest.rows("transfers") == 0
    assert resident.manifest.run.residency == "resident"


def test_lookahead_is_null_where_no_layer_follows(resident):
    routing = resident.routing_arrays()

    for depth in (1, 2):
        is_missing = (routing.lookahead[depth] == NO_EXPERT).all(axis=1)
        assert np.array_equal(is_missing, routing.layer + depth > 2)


def test_manifest_says_how_the_run_was_driven(stream):
    manifest = stream.manifest

    assert manifest.run.batch_size == 2
    assert manifest.run.residency == "stream"
    assert manifest.run.lookahead == 2
    assert manifest.hardware.link.origin == "emulated"
    assert manifest.hardware.link.name == "1GB/s+10us"
    assert manifest.shape.model_id == str(tiny())
    assert len(manifest.memory) > 0


def test_prompts_leave_hash_and_length_only(resident):
    rows = resident.table("sequences").to_pylist()

    assert [row["prompt_text"] for row in rows] == [None] * len(TEXTS)
    assert [row["prompt_tokens"] for row in rows] == [len(text.encode()) for text in TEXTS]
    assert all(len(row["prompt_sha256"]) == 64 for row in rows)
    assert [row["prompt_id"] for row in rows] == [f"p{n}" for n in range(len(TEXTS))]
    assert {row["domain"] for row in rows} == {"a", "b"}
    assert all(row["ttft_s"] > 0 for row in rows)


def test_text_is_kept_when_asked_for(tmp_path):
    trace = traced(tmp_path, texts=TEXTS[:2], store_text=True)

    kept = trace.table("sequences")["prompt_text"].to_pylist()

    assert kept == list(TEXTS[:2])
    assert "text" in trace.manifest.recorded


def test_redacted_trace_holds_no_token_ids(tmp_path):
    trace = traced(tmp_path, texts=TEXTS[:2], redact=True)

    check_trace(trace.path)
    assert set(trace.routing_arrays().token_id.tolist()) == {-1}
    assert trace.table("sequences")["output_ids"].to_pylist() == [None, None]
    assert "token_ids" not in trace.manifest.recorded
    text = TEXTS[0].encode()
    assert not any(text in path.read_bytes() for path in trace.path.rglob("*") if path.is_file())


def test_limit_keeps_prompts_apart_from_each_other(tmp_path):
    trace = traced(tmp_path, limit=3)

    ids = trace.table("sequences")["prompt_id"].to_pylist()

    assert ids == ["p0", "p2", "p4"]


def test_lookahead_deeper_than_the_model_is_cut(tmp_path):
    trace = traced(tmp_path, texts=TEXTS[:1], lookahead=3)

    assert trace.manifest.run.lookahead == 2
    assert sorted(trace.routing_arrays().lookahead) == [1, 2]


def test_tracing_twice_gives_the_same_routing(tmp_path, resident):
    again = traced(tmp_path, residency="resident", lookahead=2)

    same_routing(resident, again)


def test_ended_sequences_are_padding_from_then_on(tmp_path):
    [first, *_] = output_ids(traced(tmp_path, texts=TEXTS[:2], name="free"))
    ending = tiny("olmoe", eos_token_id=first[1])

    trace = traced(tmp_path, texts=TEXTS[:2], model=str(ending))

    check_trace(trace.path)
    rows = trace.table("sequences").to_pylist()
    routing = trace.routing_arrays()
    assert rows[0]["finish"] == "eos"
    ended = rows[0]["generated_tokens"]
    assert ended == first.index(first[1]) + 1
    after = (routing.sequence == 0) & (routing.step >= ended)
    assert routing.is_pad[after].all()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"lookahead": 4}, "--lookahead"),
        ({"lookahead": -1}, "--lookahead"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"batch_size": 0}, "--batch-size"),
        ({"limit": 0}, "--limit"),
        ({"threads": 0}, "--threads"),
        ({"residency": "cloud"}, "resident"),
        ({"link": "fast"}, "8GB/s"),
        ({"dtype": "int8"}, "bfloat16"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(tmp_path, changes, word):
    with pytest.raises(UsageError, match=word):
        traced(tmp_path, **changes)

    assert not (tmp_path / "t").exists()
    assert not (tmp_path / "t.partial").exists()


def test_resident_model_larger_than_memory_is_refused(tmp_path, monkeypatch):
    from expertflow.tracer import placement

    monkeypatch.setattr(placement, "free_bytes", lambda device: 1000)

    with pytest.raises(ResourceError, match="Use --residency stream"):
        traced(tmp_path, residency="resident")


def test_model_larger_than_memory_is_streamed_by_itself(tmp_path, monkeypatch):
    from expertflow.tracer import placement

    monkeypatch.setattr(placement, "free_bytes", lambda device: 1000)

    trace = traced(tmp_path, texts=TEXTS[:1])

    assert trace.manifest.run.residency == "stream"


@pytest.mark.parametrize("table", ["routing", "steps"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_damaged_parquet_is_a_trace_error_that_names_the_file(tmp_path, stream, table, damage):
    import shutil

    shutil.copytree(stream.path, tmp_path / "t")
    path = tmp_path / "t" / table / "part-00000.parquet"
    body = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(body[:-100])
    elif damage == "flipped":
        middle = len(body) // 2
        path.write_bytes(body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :])
    else:
        path.write_bytes((stream.path / "sequences.parquet").read_bytes())

    with pytest.raises(TraceError, match=rf"{table}.part-00000\.parquet"):
        check_trace(tmp_path / "t")

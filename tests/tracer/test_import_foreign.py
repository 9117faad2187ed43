"""Recordings of vLLM, SGLang and llama.cpp, written to their documentation: exactly the routing put in comes out."""

import base64
import contextlib
import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from expertflow.tracer.check import check_trace
from expertflow.tracer.errors import InputError, UsageError
from expertflow.tracer.importers.formats import FORMATS, detect, import_file
from expertflow.tracer.importers.request import ImportRequest
from expertflow.tracer.main import main
from expertflow.tracer.stats import routing_stats
from expertflow.tracer.store import Trace
from hypothesis import given, settings
from hypothesis import strategies as st

LAYERS, TOP_K, EXPERTS = 3, 2, 8
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def drawn(tokens, seed=0, layers=LAYERS, top_k=TOP_K, experts=EXPERTS) -> np.ndarray:
    """Ids [tokens, layers, k] without duplicates, in no order."""
    dice = np.random.default_rng(seed)
    return np.argsort(dice.random((tokens, layers, experts)), axis=2)[..., :top_k]


def imported(path: Path, **more) -> Trace:
    out = path.parent / "t"
    import_file(ImportRequest(file=path, out=out, overwrite=True, **more))
    check_trace(out)
    return Trace.open(out)


def by_sequence(trace: Trace) -> list[list]:
    """The routing of each sequence in order of positions: [tokens, layers, k]."""
    rows, layers = trace.routing_arrays(), trace.shape.num_moe_layers
    found = []
    for number in range(trace.manifest.rows("sequences")):
        is_in = rows.sequence == number
        order = np.lexsort((rows.layer[is_in], rows.position[is_in]))
        found.append(rows.experts[is_in][order].reshape(-1, layers, trace.shape.top_k).tolist())
    return found


def sizes(trace: Trace) -> list[tuple[str, int, int]]:
    """Phase, tokens and batch of each pass."""
    steps = trace.table("steps").to_pandas()
    whole = steps[steps.layer == -1].sort_values("step")
    return list(zip(whole.phase, whole.tokens, whole.batch, strict=True))


def warned(trace: Trace, words: str) -> bool:
    return any(words in text for text in trace.manifest.warnings)


def fails(path: Path, words: str, kind=InputError, **more) -> None:
    with pytest.raises(kind, match=words):
        import_file(ImportRequest(file=path, out=path.parent / "t", **more))
    assert not (path.parent / "t").exists()
    assert not (path.parent / "t.partial").exists()


# --- writers, as the tools' documentation has it -----------------------------------------------


def npy(ids: np.ndarray) -> str:
    body = io.BytesIO()
    np.save(body, ids)
    return base64.b64encode(body.getvalue()).decode()


def vllm_old(prompt: np.ndarray, generated: np.ndarray) -> dict:
    """vLLM 0.21: nested lists, the prompt's apart."""
    return {
        "id": "cmpl-1",
        "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(generated)},
        "prompt_routed_experts": prompt.tolist(),
        "choices": [{"index": 0, "routed_experts": generated.tolist()}],
    }


def vllm_new(prompt: np.ndarray, generated: np.ndarray, name="cmpl-2") -> dict:
    """vLLM 0.22 and later: one base64 .npy; the last generated token was never fed in."""
    return {
        "id": name,
        "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(generated) + 1},
        "choices": [
            {"index": 0, "routed_experts": npy(np.concatenate([prompt, generated]).astype("i4"))}
        ],
    }


def sglang_reply(prompt: np.ndarray, generated: np.ndarray, name="r") -> dict:
    flat = np.concatenate([prompt, generated]).astype("<i4").tobytes()
    return {
        "text": "…",
        "meta_info": {
            "id": name,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(generated) + 1,
            "routed_experts": base64.b64encode(flat).decode(),
        },
    }


def record(number, mode, ids, positions, lengths=None, columns=8) -> dict:
    """One record of SGLang's recorder; the buffer is 8 columns wide and filled with −1."""
    torch = pytest.importorskip("torch")
    tokens, layers, top_k = ids.shape
    buffer = torch.full((layers, tokens, columns), -1, dtype=torch.int32)
    buffer[:, :, :top_k] = torch.from_numpy(ids.swapaxes(0, 1).copy()).int()
    return {
        "forward_pass_id": number,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": [1000 + position for position in positions],
        "positions": list(positions),
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": buffer,
        "misc_objects": [],
        "global_physical_count": torch.zeros((layers, EXPERTS), dtype=torch.int32),
    }


def recorder_file(folder: Path, records: list[dict], table=None) -> Path:
    torch = pytest.importorskip("torch")
    path = folder / "expert_distribution_recorder_1.0_0.pt"
    if table is None:
        layers = records[0]["topk_ids_of_layer"].shape[0] if records else LAYERS
        table = torch.arange(EXPERTS).repeat(layers, 1)
    torch.save({"records": records, "last_physical_to_logical_map": table}, path)
    return path


def moe_trace(passes: list[np.ndarray]) -> list[tuple[int, int]]:
    """`layer,expert` lines of passes [tokens, layers, k]: layer by layer, as the callback is called."""
    lines: list[tuple[int, int]] = []
    for ids in passes:
        for layer in range(ids.shape[1]):
            lines += [(layer, expert) for expert in ids[:, layer].reshape(-1).tolist()]
    return lines


def csv_file(folder: Path, lines, header="layer,expert\n") -> Path:
    path = folder / "moe_trace.csv"
    path.write_text(header + "".join(",".join(map(str, line)) + "\n" for line in lines))
    return path


def json_file(folder: Path, document, name="replies.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(document))
    return path


def lines_file(folder: Path, documents) -> Path:
    path = folder / "replies.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


# --- vLLM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [vllm_old, vllm_new])
def test_vllm_replies_give_the_routing_put_in(tmp_path, write):
    prompt, generated = drawn(5, 1), drawn(4, 2)
    trace = imported(json_file(tmp_path, write(prompt, generated)))

    assert by_sequence(trace) == [np.concatenate([prompt, generated]).tolist()]
    assert sizes(trace) == [("prefill", 5, 1)] + [("decode", 1, 1)] * 4
    sequences = trace.table("sequences").to_pydict()
    assert sequences["prompt_tokens"] == [5]
    assert sequences["generated_tokens"] == [5]
    assert trace.manifest.run.extra["format"] == "vllm"
    assert warned(trace, "one after another")


def test_vllm_replies_come_one_per_line_or_in_a_list(tmp_path):
    replies = [vllm_new(drawn(3, n), drawn(2, n + 10), f"c{n}") for n in range(3)]
    lines = by_sequence(imported(lines_file(tmp_path, replies)))
    listed = imported(json_file(tmp_path, replies))

    assert lines == by_sequence(listed)
    assert listed.table("sequences")["prompt_id"].to_pylist() == ["c0", "c1", "c2"]


def test_vllm_choices_share_the_prompt(tmp_path):
    prompt, first, second = drawn(3, 1), drawn(2, 2), drawn(4, 3)
    reply = vllm_old(prompt, first)
    reply["choices"].append({"index": 1, "routed_experts": second.tolist()})
    trace = imported(json_file(tmp_path, reply))

    assert by_sequence(trace) == [[*prompt.tolist(), *rest.tolist()] for rest in (first, second)]


def test_vllm_arrays_are_read_from_numpy_files(tmp_path):
    prompt, generated = drawn(3, 1).astype(np.int16), drawn(4, 2).astype(np.int16)
    path = tmp_path / "reply.npz"
    np.savez(path, prompt_routed_experts=prompt, routed_experts=generated)
    alone = tmp_path / "generated.npy"
    np.save(alone, generated)

    assert by_sequence(imported(path)) == [np.concatenate([prompt, generated]).tolist()]
    assert by_sequence(imported(alone)) == [generated.tolist()]
    assert sizes(imported(alone, phase="prefill")) == [("prefill", 4, 1)]


def test_vllm_ids_wrapped_with_shape_and_dtype_are_read(tmp_path):
    ids = drawn(5).astype("<i2")
    data = {
        "data": base64.b64encode(ids.tobytes()).decode(),
        "shape": list(ids.shape),
        "dtype": "int16",
    }
    reply = {"choices": [{"routed_experts": data}]}

    assert by_sequence(imported(json_file(tmp_path, reply), phase="decode")) == [ids.tolist()]


def test_rows_of_a_prompt_that_was_left_out_are_not_invented(tmp_path):
    reply = vllm_new(drawn(2, 1), drawn(3, 2))
    reply["usage"]["prompt_tokens"] = 10  # the first eight were not asked for

    assert sizes(imported(json_file(tmp_path, reply)))[0] == ("prefill", 2, 1)


def test_dense_layers_and_dummy_rows_are_left_out_and_told(tmp_path):
    prompt, generated = drawn(4, 1), drawn(3, 2)
    dense = np.zeros((4, 1, TOP_K), dtype=np.int64)
    wide = [np.concatenate([dense[: len(part)], part], axis=1) for part in (prompt, generated)]
    wide[1] = np.concatenate([wide[1], np.zeros_like(wide[1][:1])])  # never fed in
    trace = imported(json_file(tmp_path, vllm_old(*wide)))

    assert by_sequence(trace) == [np.concatenate([prompt, generated]).tolist()]
    assert trace.shape.moe_layers == (1, 2, 3)
    assert trace.shape.num_layers == 4
    assert warned(trace, "1 layers that have no experts: 0")
    assert warned(trace, "1 of 8 rows that no router wrote")


def test_a_reply_that_is_wrong_is_named(tmp_path):
    good = vllm_old(drawn(2, 1), drawn(2, 2))
    twice = drawn(2, 2)
    twice[1, 2] = 5

    fails(lines_file(tmp_path, [good, vllm_old(drawn(2, 1), twice)]), "row 3 of line 2 in layer 2")
    fails(
        lines_file(tmp_path, [good, {"id": "x", "choices": [{}]}]), "line 2 has no routed_experts"
    )
    fails(lines_file(tmp_path, [good, vllm_old(drawn(2, 1)[:, :2], drawn(2, 2)[:, :2])]), "line 2")
    fails(json_file(tmp_path, {"choices": [{"routed_experts": [[1, 2], [3]]}]}), "no array of ids")
    fails(json_file(tmp_path, {"choices": [{"routed_experts": "!"}]}), "no base64")
    fails(json_file(tmp_path, {"choices": [{"routed_experts": [[[1.5, 2]]]}]}), "is float64")
    fails(json_file(tmp_path, {"choices": 3, "routed_experts": 1}), "choices of reply 0")
    unknown = vllm_new(drawn(2), drawn(2))
    del unknown["usage"]
    fails(json_file(tmp_path, unknown), "pass --phase")
    long = vllm_new(drawn(2), drawn(9))
    long["usage"]["completion_tokens"] = 1
    fails(json_file(tmp_path, long), "expected 2")
    cut = tmp_path / "cut.jsonl"
    cut.write_text(json.dumps(good) + '\n{"choices": [')
    fails(cut, "line 2 is not JSON")


# --- SGLang's replies --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told", [{"top_k": TOP_K}, {"layers": LAYERS}, {"top_k": TOP_K, "layers": LAYERS}]
)
def test_sglang_replies_give_the_routing_put_in(tmp_path, told):
    parts = [(drawn(5, 1), drawn(4, 2)), (drawn(1, 3), drawn(2, 4))]
    replies = [sglang_reply(*part, name=f"r{n}") for n, part in enumerate(parts)]
    trace = imported(json_file(tmp_path, replies), **told)

    assert by_sequence(trace) == [np.concatenate(part).tolist() for part in parts]
    assert trace.table("sequences")["prompt_id"].to_pylist() == ["r0", "r1"]
    assert trace.table("sequences")["prompt_tokens"].to_pylist() == [5, 1]


@pytest.mark.parametrize("section", ["meta_info", "sglext"])
def test_sglang_openai_replies_are_read(tmp_path, section):
    prompt, generated = drawn(3, 1), drawn(2, 2)
    ids = sglang_reply(prompt, generated)["meta_info"]["routed_experts"]
    reply = {
        "id": "x",
        "usage": {"prompt_tokens": 3, "completion_tokens": 3},
        "choices": [{section: {"routed_experts": ids}}],
    }

    assert by_sequence(imported(json_file(tmp_path, reply), top_k=TOP_K)) == [
        np.concatenate([prompt, generated]).tolist()
    ]


def test_sglang_ids_that_fit_no_shape_are_refused(tmp_path):
    path = json_file(tmp_path, sglang_reply(drawn(3), drawn(2)))

    fails(path, "Pass --layers", UsageError)
    fails(path, "expected a multiple of 7 layers × 5", layers=7, top_k=5)
    fails(path, "do not divide into its 5 input tokens", top_k=4)
    fails(json_file(tmp_path, {"meta_info": {}}), "no meta_info.routed_experts", top_k=2)


# --- SGLang's recorder -------------------------------------------------------------------------


def test_a_recorder_dump_gives_the_passes_put_in(tmp_path):
    first, second = drawn(3, 1), drawn(2, 2)
    one, two = drawn(2, 3), drawn(1, 4)
    records = [
        record(1, 1, np.concatenate([first, second]), [0, 1, 2, 0, 1], [3, 2]),
        record(2, 2, one, [3, 2]),
        record(3, 2, two, [3]),  # the first has ended
    ]
    trace = imported(recorder_file(tmp_path, records))

    assert sizes(trace) == [("prefill", 5, 2), ("decode", 2, 2), ("decode", 1, 1)]
    assert by_sequence(trace) == [
        [*first.tolist(), one[0].tolist()],
        [*second.tolist(), *one[1:].tolist(), *two.tolist()],
    ]
    assert trace.shape.num_experts == EXPERTS
    assert not warned(trace, "guessed from the highest id")
    assert "token_ids" in trace.manifest.recorded
    assert trace.routing_arrays().token_id.min() == 1000
    assert warned(trace, "2 were told apart by positions")


def test_a_prompt_in_chunks_and_a_mixed_pass_stay_one_sequence_each(tmp_path):
    records = [
        record(1, 1, drawn(3, 1), [0, 1, 2], [3]),
        record(2, 1, drawn(2, 2), [0, 1], [2]),  # the second prompt's first chunk
        record(3, 3, drawn(3, 3), [2, 3, 3], [2, 1]),  # its last, and the first sequence
        record(4, 2, drawn(2, 4), [4, 4]),
    ]
    trace = imported(recorder_file(tmp_path, records))
    rows = trace.routing_arrays()
    is_first = rows.layer == 0

    assert rows.sequence[is_first].tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 1]
    assert warned(trace, "1 passes hold prompts and decoded tokens")


def test_padding_idle_passes_and_moved_experts_are_mended(tmp_path):
    torch = pytest.importorskip("torch")
    ids = drawn(2, 1)
    dense = np.concatenate([np.full((2, 1, TOP_K), -1), ids], axis=1)
    padded = np.concatenate([dense, dense[:1]])
    moved = torch.arange(EXPERTS).flip(0).repeat(LAYERS + 1, 1)
    records = [
        record(1, 1, dense, [0, 1], [2]),
        record(2, 2, padded, [2, 0, 0]),  # a graph of three
        record(3, 4, dense[:0], []),
        record(4, 5, dense, [3, 4]),  # speculative
    ]
    trace = imported(recorder_file(tmp_path, records, moved))

    assert sizes(trace) == [("prefill", 2, 1), ("decode", 1, 1)]
    assert by_sequence(trace) == [(EXPERTS - 1 - np.concatenate([ids, ids[:1]])).tolist()]
    assert trace.shape.moe_layers == (1, 2, 3)
    for words in ("moved or doubled", "1 passes idle", "forward mode 5", "no experts: 0"):
        assert warned(trace, words)


def test_a_limit_keeps_the_first_passes_of_a_dump(tmp_path):
    records = [record(1, 1, drawn(3), [0, 1, 2], [3])]
    records += [record(2 + n, 2, drawn(1, n), [3 + n]) for n in range(5)]
    trace = imported(recorder_file(tmp_path, records), limit_tokens=5)

    assert len(sizes(trace)) == 3
    assert warned(trace, "first 3 of 6 passes")


def test_a_dump_that_is_no_routing_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "stat.pt"
    torch.save({"rank": 0, "logical_count": torch.zeros(3)}, path)
    fails(path, "per_token; its other modes")
    fails(recorder_file(tmp_path, []), "no pass with tokens")
    broken = record(1, 1, drawn(3), [0, 1, 2], [3])
    broken["positions"] = [0]
    fails(recorder_file(tmp_path, [broken]), "record 0 has 3 rows")
    short = record(1, 1, drawn(3), [0, 1, 2], [9])
    fails(recorder_file(tmp_path, [short]), "add up to 9")
    twice = drawn(3)
    twice[2, 1] = 4
    fails(
        recorder_file(tmp_path, [record(1, 1, twice, [0, 1, 2], [3])]),
        "row 2 of record 0 in layer 1",
    )


# --- files of torch.save are never run ---------------------------------------------------------


def archive(folder: Path, program: bytes) -> Path:
    path = folder / "evil.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("evil/data.pkl", program)
        file.writestr("evil/data/0", b"\0" * 8)
    return path


STORAGE = b"(U\x07storageX\x07\0\0\0storagectorch\nIntStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"cos\nsystem\n(X\x05\0\0\0false tR.", "os system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x05false\x85R.", "os system"),
        (b"cbuiltins\neval\nX\x011\x85R.", "builtins eval"),
        (b"ctorch\nload\nX\x01\0\0\x00x\x85R.", "torch load"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch\nIntStorage\nK\0tR.", "no tensor"),
        (b"ctorch\nIntStorage\n)R.", "no tensor"),
        (b"(ios\nsystem\n.", "opcode INST"),
        (b"(X\x05\0\0\0falsecos\nsystem\no.", "os system"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"}(X\x01\0\0\0xK\x01db.", "opcode"),
        (b"Ptorch\n.", "opcode PERSID"),
        (b"X\x01\0\0\0xK\x01\x86Q.", "damaged"),
        (b"0.", "opcode POP"),
        (b"R.", "damaged"),
        (b"t.", "damaged"),
        (b"h\x05.", "damaged"),
        (b"K\x01", "damaged|does not end"),
        (b"\xff\xff", "damaged"),
    ],
)
def test_a_file_that_asks_for_more_than_data_is_refused(tmp_path, program, words):
    fails(archive(tmp_path, program), words, format="sglang")


def test_an_object_that_would_run_on_loading_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (mark,))

    path = tmp_path / "evil.pt"
    torch.save({"records": [Evil()]}, path)
    fails(path, "asks for '__builtin__ getattr'")

    assert not mark.exists()


def test_a_tensor_cannot_ask_for_more_memory_than_the_file_has(tmp_path):
    torch = pytest.importorskip("torch")
    wide = record(1, 1, drawn(3), [0, 1, 2], [3])
    wide["topk_ids_of_layer"] = torch.zeros(1, dtype=torch.int32).expand(1 << 20, 1 << 20, 8)
    fails(recorder_file(tmp_path, [wide]), "repeats its storage")


def test_slices_and_turned_tensors_are_read_as_torch_has_them(tmp_path):
    torch = pytest.importorskip("torch")
    from expertflow.tracer.importers.torch_file import read_torch_file

    whole = torch.arange(60, dtype=torch.int64).reshape(3, 4, 5)
    made = {
        "turned": whole.permute(2, 0, 1),
        "part": whole[1:, ::2, 1:3],
        "empty": whole[:0],
        "half": torch.ones(2, dtype=torch.float16),
        "flag": torch.tensor([True, False]),
        "plain": [None, True, -5, 2**40, 1.5, ("a", b"".decode()), {"k": []}],
    }
    torch.save(made, tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")

    for name in ("turned", "part", "empty", "half", "flag"):
        assert found[name].array().tolist() == made[name].tolist()
        assert list(found[name].array().shape) == list(made[name].shape)
    assert found["plain"] == made["plain"]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 255))
def test_no_damage_to_a_program_does_more_than_refuse(tmp_path_factory, noise, place, byte):
    from expertflow.tracer.importers.torch_file import read_torch_file

    folder = tmp_path_factory.getbasetemp()
    program = b"\x80\x02}q\0(X\x07\0\0\0recordsq\x01]q\x02X\x01\0\0\0nK\x05u."
    body = bytearray(program + noise)
    body[place % len(body)] = byte
    with contextlib.suppress(InputError):  # and nothing else
        read_torch_file(archive(folder, bytes(body)))


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_dump_is_an_input_error(tmp_path, seed):
    path = recorder_file(tmp_path, [record(1, 1, drawn(3), [0, 1, 2], [3])])
    body, dice = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(4):
        body[dice.randrange(len(body))] = dice.randrange(256)
    path.write_bytes(bytes(body[: dice.choice([len(body), len(body) // 2])]))

    try:
        imported(path, format="sglang")
    except InputError:
        assert not (tmp_path / "t.partial").exists()


# --- llama.cpp ---------------------------------------------------------------------------------


def decode(count, seed=0) -> list[np.ndarray]:
    return [drawn(1, seed + n) for n in range(count)]


@pytest.mark.parametrize("header", ["layer,expert\n", ""])
def test_a_csv_of_pairs_gives_the_routing_put_in(tmp_path, header):
    passes = [drawn(4, 1), *decode(3, 5), drawn(2, 2), *decode(2, 9)]
    trace = imported(csv_file(tmp_path, moe_trace(passes), header), top_k=TOP_K)

    assert sizes(trace) == [
        (p, n, 1)
        for p, n in [("prefill", 4), *[("decode", 1)] * 3, ("prefill", 2), *[("decode", 1)] * 2]
    ]
    assert by_sequence(trace) == [
        np.concatenate(passes[:4]).tolist(),
        np.concatenate(passes[4:]).tolist(),
    ]
    assert warned(trace, "marks no sequences")


@pytest.mark.parametrize(
    "line",
    [
        lambda layer, expert: {"layer": layer, "expert": expert},
        lambda layer, expert: [layer, expert],
        lambda layer, expert: {"layer_id": layer, "expert_id": expert, "t": 0.5},
    ],
)
def test_json_lines_of_pairs_give_the_routing_put_in(tmp_path, line):
    passes = decode(6)
    path = lines_file(tmp_path, [line(*pair) for pair in moe_trace(passes)])
    trace = imported(path)

    assert by_sequence(trace) == [np.concatenate(passes).tolist()]
    assert warned(trace, "experts per token, 2, is guessed")


def test_lines_of_whole_rows_are_read(tmp_path):
    passes = [drawn(3, 1), *decode(2, 4)]
    rows = [
        (layer, ids[t, layer].tolist())
        for ids in passes
        for layer in range(LAYERS)
        for t in range(len(ids))
    ]
    listed = imported(lines_file(tmp_path, [{"layer": n, "experts": ids} for n, ids in rows]))
    spaced = csv_file(
        tmp_path, [(n, " ".join(map(str, ids))) for n, ids in rows], "layer_id,expert_ids\n"
    )

    assert by_sequence(listed) == [np.concatenate(passes).tolist()] == by_sequence(imported(spaced))
    assert not warned(listed, "is guessed: it divides")


def test_phase_and_rank_are_believed_where_they_are_told(tmp_path):
    passes = [drawn(1, 1), *decode(2, 4)]
    lines = [
        ("prefill" if n == 0 else "decode", n, layer, rank, expert)
        for n, ids in enumerate(passes)
        for layer in range(LAYERS)
        for rank, expert in enumerate(ids[0, layer].tolist())
    ]
    trace = imported(csv_file(tmp_path, lines, "phase,token,layer,rank,expert\n"))

    assert sizes(trace) == [("prefill", 1, 1), ("decode", 1, 1), ("decode", 1, 1)]
    assert by_sequence(trace) == [np.concatenate(passes).tolist()]


def test_a_warm_up_pass_is_left_out(tmp_path):
    everything = np.tile(np.arange(EXPERTS)[::-1], (2, LAYERS, 1))
    passes = [drawn(3, 1), *decode(4, 3)]
    lines = moe_trace([everything, *passes])
    trace = imported(csv_file(tmp_path, lines))

    assert by_sequence(trace) == [np.concatenate(passes).tolist()]
    assert warned(trace, "takes all 8 experts")


def test_missing_rows_of_the_last_layer_demand_no_other_expert(tmp_path):
    prompt, rest = drawn(4, 1), decode(3, 5)
    lines = [(n, e) for n, e in moe_trace([prompt]) if n < LAYERS - 1]
    lines += [(LAYERS - 1, e) for e in prompt[-1, -1].tolist()]
    trace = imported(csv_file(tmp_path, lines + moe_trace(rest)), top_k=TOP_K)
    found = np.asarray(by_sequence(trace)[0])

    assert found[:4, :-1].tolist() == prompt[:, :-1].tolist()
    assert found[:4, -1].tolist() == [prompt[-1, -1].tolist()] * 4
    assert found[4:].tolist() == np.concatenate(rest).tolist()
    assert warned(trace, "last layer lacks rows in 1 passes")


def test_parts_of_a_prompt_without_last_layer_are_joined(tmp_path):
    part, end, rest = drawn(3, 1), drawn(2, 2), decode(2, 5)
    lines = [(n, e) for n, e in moe_trace([part]) if n < LAYERS - 1] + moe_trace([end, *rest])
    trace = imported(csv_file(tmp_path, lines), top_k=TOP_K)

    assert sizes(trace)[0] == ("prefill", 5, 1)
    assert by_sequence(trace)[0][3:5] == end.tolist()
    assert warned(trace, "1 parts of prompts have no last layer")


def test_ids_read_without_strides_are_left_out(tmp_path):
    layers, experts = 6, 32
    ranking = np.argsort(np.random.default_rng(0).random((layers, experts)), axis=1)
    wrong = ranking[:, : 8 * TOP_K].reshape(layers, 8, TOP_K).swapaxes(0, 1)
    rest = [drawn(1, n, layers=layers, experts=experts) for n in range(4)]
    trace = imported(csv_file(tmp_path, moe_trace([wrong, *rest])), top_k=TOP_K)

    assert by_sequence(trace) == [np.concatenate(rest).tolist()]
    assert warned(trace, "read without the tensor's strides")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer,expert,count\n0,1,5\n", "counts by expert"),
        ("layer,token\n0,1\n", "its columns are layer, token"),
        ("layer,expert\n0,1\n0,x\n", "line 3 is .*'x'"),
        ("layer,expert\n0,1\n1,-1\n", "line 3"),
        ("layer,expert\n0,1\n1\n", "line 3 has 1 cells"),
        ("layer,expert\n0,1\n0,2\n", "layer 0 alone"),
        ("layer,expert\n", "no line with"),
        ("layer,expert\n0,1\n0,1\n1,2\n1,3\n0,4\n0,5\n1,6\n1,7\n", "token 0 of the pass at line 2"),
        ("layer,expert,phase\n0,1,warm\n1,1,warm\n", "phase 'warm'"),
        ('{"layer": 0, "expert": 1}\n{"layer": 0}\n', "line 2 is"),
        ('{"layer": 0, "expert": 1}\n{"layer"\n', "line 2 is not JSON"),
        ('{"layer": 0, "expert": 1}\n{"layer": 0, "expert": true}\n', "line 2"),
        ("hello\nworld\n", "of no format that is known"),
        ("", "of no format that is known"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, words):
    path = tmp_path / "log.txt"
    path.write_text(text)
    fails(path, words)


def test_a_wrong_number_of_experts_is_named_by_line(tmp_path):
    path = csv_file(tmp_path, moe_trace(decode(3)))
    fails(path, "layer 0 at line 2 has 2 choices; expected a multiple of 3", top_k=3)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_any_passes_survive_a_round_trip_through_a_log(
    tmp_path_factory, lengths, layers, top_k, seed
):
    folder = tmp_path_factory.mktemp("log")
    # Ids of one token repeat in the next, so that no pass looks as if strides had been ignored.
    passes = [
        np.concatenate([drawn(1, seed, layers, top_k), drawn(n, seed, layers, top_k)])[:n]
        for n in lengths
    ]
    trace = imported(csv_file(folder, moe_trace(passes)), top_k=top_k)

    assert np.concatenate(by_sequence(trace)).tolist() == np.concatenate(passes).tolist()
    assert [tokens for _, tokens, _ in sizes(trace)] == lengths


# --- the command, and what is common -----------------------------------------------------------


def ran(capsys, *args) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(stop.value.code), out, err


def test_the_command_tells_formats_apart(capsys, tmp_path):
    np.savez(tmp_path / "routing.npz", expert_ids=drawn(4), seq_bounds=[0, 4])
    files = {
        "npz": tmp_path / "routing.npz",
        "vllm": json_file(tmp_path, vllm_old(drawn(2), drawn(2)), "vllm.json"),
        "sglang": json_file(tmp_path, sglang_reply(drawn(2), drawn(2)), "sglang.json"),
        "llamacpp": csv_file(tmp_path, moe_trace(decode(3))),
    }
    assert set(files) == set(FORMATS) - {"auto"}
    for name, path in files.items():
        assert detect(path) == name
        more = ("--top-k", "2") if name in ("sglang", "llamacpp") else ()
        more += ("--layout", "tokens-first") if name == "npz" else ()
        code, text, err = ran(
            capsys, "import", path, "--out", tmp_path / name, "--json", *more, "--experts", "8"
        )
        document = json.loads(text)
        assert code == 0
        assert document["source"] == {"source": path.name, "format": name}
        assert document["warnings"]
        assert all(words in err for words in document["warnings"])
        assert ran(capsys, "check", tmp_path / name)[0] == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--format", "vlm"), "Did you mean 'vllm'"),
        (("--layers", "3"), "--layers says nothing"),
        (("--phase", "decode"), "--phase says nothing"),
        (("--domain", "x"), "--domain says nothing"),
        (("--top-k", "0"), "--top-k must be at least 1"),
    ],
)
def test_options_that_say_nothing_are_refused(capsys, tmp_path, more, words):
    path = json_file(tmp_path, vllm_old(drawn(2), drawn(2)))
    code, _, err = ran(capsys, "import", path, "--out", tmp_path / "t", *more)

    assert code == 2
    assert words in err


def test_a_malformed_file_ends_with_code_3_and_leaves_nothing(capsys, tmp_path):
    path = csv_file(tmp_path, [(0, 1), (1, "many")])
    code, _, err = ran(capsys, "import", path, "--out", tmp_path / "t")

    assert code == 3
    assert "line 3" in err
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    from expertflow.tracer.importers import untimed

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(untimed, "_steps_rows", broken)
    path = csv_file(tmp_path, moe_trace(decode(3)))
    with pytest.raises(OSError, match="No space"):
        import_file(ImportRequest(file=path, out=tmp_path / "t"))

    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_published_decode_routing_keeps_its_reuse(tmp_path):
    path = DATA / "gpt-oss-20b-decode" / "routing.npz"
    if not path.is_file():
        pytest.skip("the published routing is not on this machine")
    import_file(ImportRequest(file=path, out=tmp_path / "t", experts=32, limit_tokens=5000))
    stats = routing_stats(Trace.open(tmp_path / "t"))

    assert stats.reuse_chance == pytest.approx(0.125)
    assert stats.decode.reuse == pytest.approx(0.44, abs=0.02)


def test_published_prefill_routing_keeps_its_reuse(tmp_path):
    path = DATA / "deepseek-v2-lite-prefill" / "law.npz"
    if not path.is_file():
        pytest.skip("the published routing is not on this machine")
    import_file(
        ImportRequest(file=path, out=tmp_path / "t", phase="prefill", experts=64, limit_tokens=3000)
    )
    stats = routing_stats(Trace.open(tmp_path / "t"))

    assert stats.reuse_chance == pytest.approx(6 / 64)
    assert stats.prefill.reuse is not None
    assert stats.prefill.reuse > 1.5 * stats.reuse_chance
